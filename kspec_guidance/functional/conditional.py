"""Scores of samples given their prompts: Conditional-Vendi, Information-Vendi, conditional RKE."""

import torch
from torch import Tensor

from kspec_guidance.features import tensor_product
from kspec_guidance.functional.inputs import (
    FeatureMap,
    KernelLike,
    as_kernel,
    check_paired,
    gram,
    map_rows,
    on_host,
    second_moment,
    sum_over_pairs,
    unit_gram,
)
from kspec_guidance.functional.vendi import BLOCK_ROWS, entropy_of, mean_of_pairs, unit_rows
from kspec_guidance.kernels.spectrum import check_order

__all__ = ["conditional_entropy", "conditional_rke_score", "conditional_vendi_score", "information_vendi_score"]

FeatureMaps = tuple[FeatureMap, FeatureMap]


def _joint(
    x: Tensor,
    prompt_features: Tensor,
    kernel: KernelLike | None,
    prompt_kernel: KernelLike | None,
    maps: FeatureMaps | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Matrices with the spectra of ``K / n``, of ``K_T / n``, and of their Hadamard product over ``n``."""
    x, prompt_features = check_paired(x, prompt_features)
    n = x.shape[-2]
    if maps is None:
        k, kt = gram(x, kernel), gram(prompt_features, prompt_kernel)
        return k / n, kt / n, k * kt / n
    if not isinstance(maps, tuple) or len(maps) != 2:
        raise ValueError("feature_map must be a pair: a map (or its rows) of x, and one of prompt_features")
    a, b = map_rows(maps[0], x), map_rows(maps[1], prompt_features)
    if a.shape[-1] * b.shape[-1] < n:
        both = second_moment(tensor_product(a, b))
    else:
        both = (a @ a.mT) * (b @ b.mT) / n
    return second_moment(a), second_moment(b), both


def _mean_squares(
    x: Tensor,
    prompt_features: Tensor,
    kernel: KernelLike | None,
    prompt_kernel: KernelLike | None,
    maps: FeatureMaps | None,
) -> tuple[Tensor, Tensor]:
    """``||K_T||_F^2 / n^2`` and ``||K o K_T||_F^2 / n^2``, from blocks of the matrices where there are many samples."""
    n = x.shape[-2] if x.ndim > 1 else 0
    if maps is not None or n <= BLOCK_ROWS:
        _, kt, joint = _joint(x, prompt_features, kernel, prompt_kernel, maps)
        return kt.square().sum((-2, -1)), joint.square().sum((-2, -1))
    x, prompt_features = (on_host(z) for z in check_paired(x, prompt_features))
    of_x, of_prompts = as_kernel(kernel).fit(x.detach()), as_kernel(prompt_kernel).fit(prompt_features.detach())
    widths = [x.shape[-1], prompt_features.shape[-1]]

    def block(a: Tensor, b: Tensor | None) -> Tensor:
        (a, t), (b, u) = a.split(widths, -1), (None, None) if b is None else b.split(widths, -1)
        squares = unit_gram(of_prompts, t, u).square()
        return torch.stack([squares.sum((-2, -1)), (unit_gram(of_x, a, b).square() * squares).sum((-2, -1))])

    related, alike = sum_over_pairs(block, torch.cat([x, prompt_features], dim=-1), BLOCK_ROWS) / n**2
    return related, alike


def conditional_entropy(
    x: Tensor,
    prompt_features: Tensor,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    order: float = 1.0,
    feature_map: FeatureMaps | None = None,
) -> Tensor:
    """``H_q(X | T) = H_q(K o K_T / n) - H_q(K_T / n)`` in nats ``[...]`` (Jalali et al. 2024, arXiv 2411.02817)."""
    if check_order(order) == 2 and feature_map is None:
        related, alike = _mean_squares(x, prompt_features, kernel, prompt_kernel, feature_map)
        return (related / alike).log()
    _, kt, joint = _joint(x, prompt_features, kernel, prompt_kernel, feature_map)
    return entropy_of(joint, order) - entropy_of(kt, order)


def conditional_vendi_score(
    x: Tensor,
    prompt_features: Tensor,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    order: float = 1.0,
    feature_map: FeatureMaps | None = None,
) -> Tensor:
    """Conditional-Vendi: the effective number of distinct samples *per prompt*, at least 1 for ``order >= 1``.

    The exponential of :func:`conditional_entropy`. With the same prompt for every sample it is the Vendi score of
    ``x``; with a different, orthogonal prompt for each sample it is 1.

    Args:
        x: samples ``[..., n, d]``.
        prompt_features: prompt features ``[..., n, p]``.
        kernel: of the samples; cosine by default.
        prompt_kernel: of the prompt features; cosine by default.
        order: q in (0, inf].
        feature_map: one map (or its rows) for ``x`` and one for ``prompt_features``, instead of the kernels.

    Raises:
        ValueError: for an empty set, NaN, different numbers of samples and prompts, or an order outside (0, inf].

    >>> import torch
    >>> round(conditional_vendi_score(torch.eye(4), torch.ones(4, 2)).item(), 6)
    4.0
    """
    return conditional_entropy(x, prompt_features, kernel, prompt_kernel, order, feature_map).exp()


def information_vendi_score(
    x: Tensor,
    prompt_features: Tensor,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    order: float = 1.0,
    feature_map: FeatureMaps | None = None,
) -> Tensor:
    """Information-Vendi ``exp(H(X) + H(T) - H(X, T))``: the part of the diversity that the prompts explain.

    The Vendi score of ``x`` is Conditional-Vendi times this one (Jalali et al. 2024, arXiv 2411.02817).
    """
    k, kt, joint = _joint(x, prompt_features, kernel, prompt_kernel, feature_map)
    return (entropy_of(k, order) + entropy_of(kt, order) - entropy_of(joint, order)).exp()


def conditional_rke_score(
    x: Tensor,
    prompt_features: Tensor,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    feature_map: FeatureMaps | None = None,
    unbiased: bool = False,
) -> Tensor:
    """Conditional RKE ``||K_T||_F^2 / ||K o K_T||_F^2``: Conditional-Vendi of order 2, without eigenvalues.

    SPARKE maximises it (Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173).

    Args:
        x: samples ``[..., n, d]``.
        prompt_features: ``[..., n, p]``.
        kernel: kernel of samples, see :func:`conditional_vendi_score`.
        prompt_kernel: kernel of prompts.
        feature_map: see :func:`conditional_vendi_score`; both to rows of norm 1, if ``unbiased``.
        unbiased: sum over pairs of different samples in both norms, see :func:`~kspec_guidance.functional.rke_score`:
            for sets of unequal size. Infinite if no two samples of related prompts are alike.

    Raises:
        ValueError: as :func:`conditional_vendi_score`; if ``unbiased``, for less than two samples, features of another
            norm, or if no two samples have related prompts.
    """
    if not unbiased:
        return conditional_vendi_score(x, prompt_features, kernel, prompt_kernel, 2.0, feature_map)
    if feature_map is not None:
        maps = feature_map
        feature_map = unit_rows(map_rows(maps[0], x)), unit_rows(map_rows(maps[1], prompt_features))
    means = _mean_squares(x, prompt_features, kernel, prompt_kernel, feature_map)
    related, alike = (mean_of_pairs(mean, x.shape[-2]) for mean in means)
    if not (related > 0).all():
        raise ValueError("no two samples have related prompts, so the score is undefined; score several images of a prompt")
    return related / alike
