"""Vendi scores of every order, and RKE."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import (
    NOT_POSITIVE,
    SEMIDEFINITE,
    FeatureMap,
    KernelLike,
    as_kernel,
    check_samples,
    map_rows,
    on_host,
    smaller_matrix,
    sum_over_pairs,
    unit_gram,
)
from kspec_guidance.kernels import CosineKernel, Kernel, l2_normalize
from kspec_guidance.kernels.spectrum import check_order, largest_eigenvalues, renyi_entropy, symmetric_eigenvalues, truncate
from kspec_guidance.utils.arguments import is_integer

__all__ = [
    "entropy_and_log",
    "entropy_of",
    "kernel_entropy",
    "matrix_vendi_score",
    "mean_cosine",
    "rke_score",
    "vendi_score",
]

EMPTY = 1e-15  # eigenvalues of a matrix of trace 1 below this are rounding errors
BLOCK_ROWS = 512  # rows of the kernel matrix that RKE computes at once: a block stays in the cache of a processor


def entropy_of(matrix: Tensor, order: float = 1.0, truncation: int | None = None, semidefinite: bool = False) -> Tensor:
    """Renyi entropy of a semi-definite matrix ``[..., n, n]`` scaled to trace 1; order 2 needs no eigenvalues.

    Where ``semidefinite`` is known and need not be checked, a truncated entropy of order 1 or more of a large matrix needs
    the largest eigenvalues only: see :func:`~kspec_guidance.kernels.spectrum.largest_eigenvalues`. Values with a relative
    error of 2e-9 change an entropy of t values, in nats, by less than 1e-7.

    Raises:
        ValueError: for an order outside (0, inf], or negative eigenvalues.
    """
    if check_order(order) == 2 and truncation is None:
        return -(matrix.square().sum((-2, -1)) / matrix.diagonal(dim1=-2, dim2=-1).sum(-1).square()).log()
    if semidefinite and order >= 1 and is_integer(truncation, 1):
        top = largest_eigenvalues(matrix, truncation)  # type: ignore[arg-type]
        if top is not None:
            return renyi_entropy(truncate(top.clamp_min(0) / matrix.trace().clamp_min(1), truncation), order)
    spectrum = symmetric_eigenvalues(matrix)
    lowest, trace = float(spectrum.detach().amin()), float(matrix.detach().diagonal(dim1=-2, dim2=-1).sum(-1).amax())
    if lowest < -NOT_POSITIVE * trace:
        raise ValueError(
            f"the kernel matrix has negative eigenvalues, down to {lowest / trace:.3g} of their sum: its function is no "
            "kernel, since a kernel is positive semi-definite"
        )
    spectrum = spectrum.clamp_min(0)
    mass = spectrum.sum(-1, keepdim=True)
    spectrum = spectrum / (mass if truncation is None else mass.clamp_min(1))
    return renyi_entropy(truncate(spectrum, truncation), order)


def entropy_and_log(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """``-tr C log C`` of a semi-definite matrix ``[n, n]`` of trace 1, and ``log C``; the gradient is ``-log C - I``."""
    l, v = torch.linalg.eigh(matrix)
    return torch.special.entr(l.clamp_min(0)).sum(), (v * l.clamp_min(EMPTY).log()) @ v.mT


def kernel_entropy(
    x: Tensor,
    kernel: KernelLike | None = None,
    order: float = 1.0,
    truncation: int | None = None,
    feature_map: FeatureMap | None = None,
) -> Tensor:
    """Renyi entropy ``H_q(K / n)`` in nats ``[...]``: the logarithm of :func:`vendi_score`, with its arguments."""
    x = check_samples(x)
    wide = feature_map is None and not (isinstance(kernel, CosineKernel | None) and x.shape[-1] < x.shape[-2])
    if check_order(order) == 2 and truncation is None and wide and x.shape[-2] > BLOCK_ROWS:
        return _collision_entropy(x, as_kernel(kernel))
    known = feature_map is not None or kernel is None or isinstance(kernel, SEMIDEFINITE)
    return entropy_of(smaller_matrix(x, kernel, feature_map), order, truncation, known)


def _collision_entropy(x: Tensor, kernel: Kernel) -> Tensor:
    """``-log(||K||_F^2 / n^2)`` from blocks on and above the diagonal, so the matrix is never held whole."""
    x, n = on_host(x), x.shape[-2]
    kernel = kernel.fit(x.detach())
    squares = sum_over_pairs(lambda a, b: unit_gram(kernel, a, b).square().sum((-2, -1)), x, BLOCK_ROWS)
    return -(squares / n**2).log()


def vendi_score(
    x: Tensor,
    kernel: KernelLike | None = None,
    order: float = 1.0,
    truncation: int | None = None,
    feature_map: FeatureMap | None = None,
) -> Tensor:
    """Vendi score of order q: the effective number of distinct samples, in [1, n].

    ``exp(H_q)`` of the eigenvalues of ``K / n`` (Friedman, Dieng 2022, arXiv 2210.02410; orders: Pasarkar, Dieng 2023,
    arXiv 2310.12952). Identical samples give 1, n orthogonal ones give n. With random Fourier features as ``feature_map``
    it is FKEA (Ospanov et al. 2024, arXiv 2407.02961); :class:`~kspec_guidance.metrics.VendiScore` streams.

    Args:
        x: samples ``[..., n, d]``.
        kernel: cosine by default, computed from the smaller of ``n x n`` and ``d x d``. An unset bandwidth is the median
            distance. A plain function of rows ``[n, d]`` and ``[m, d]`` that returns ``[n, m]`` is a kernel too. Kernels
            are normalised to a unit diagonal.
        order: q in (0, inf].
        truncation: number of eigenvalues kept (Ospanov, Farnia 2024, arXiv 2410.21719).
        feature_map: map of ``x`` to rows ``[..., n, D]`` whose inner products are the kernel, or those rows; O(n) time.

    Raises:
        ValueError: for an empty set, NaN, an order outside (0, inf], or a function that is not positive semi-definite.

    >>> round(vendi_score(torch.eye(5)).item(), 6)
    5.0
    """
    return kernel_entropy(x, kernel, order, truncation, feature_map).exp()


def matrix_vendi_score(
    K: Tensor,
    order: float = 1.0,
    weights: Tensor | Sequence[float] | None = None,
    truncation: int | None = None,
) -> Tensor:
    """Vendi score ``[...]`` of a given kernel matrix, with probabilities of the samples.

    ``exp(H_q)`` of the eigenvalues of ``diag(p)^(1/2) K diag(p)^(1/2)`` (Friedman, Dieng 2022, arXiv 2210.02410, section
    3). A sample with weight 2 counts as two copies. The matrix is scaled to a unit diagonal.

    Args:
        K: symmetric positive semi-definite ``[..., n, n]``, with a positive diagonal.
        order: q in (0, inf].
        weights: of the samples ``[n]`` or ``[..., n]``, at least 0; scaled to sum 1. Uniform by default.
        truncation: number of eigenvalues kept.

    Raises:
        ValueError: for a matrix that is not square, symmetric, finite and positive semi-definite, or wrong weights.

    >>> round(matrix_vendi_score(torch.eye(3), weights=torch.tensor([2.0, 1.0, 1.0])).item() ** 2, 6)
    8.0
    """
    k = on_host(check_samples(K, "K"))
    n = k.shape[-1]
    if k.shape[-2] != n:
        raise ValueError(f"K must be square, of shape [n, n], got {list(k.shape)}; vendi_score takes rows of features")
    diagonal = k.diagonal(dim1=-2, dim2=-1)
    if not (diagonal > 0).all():
        raise ValueError("K must have a positive diagonal; a sample is similar to itself")
    scale = diagonal.rsqrt()
    k = k * scale[..., :, None] * scale[..., None, :]
    if float((k - k.mT).detach().abs().amax()) > NOT_POSITIVE:
        raise ValueError("K must be symmetric: entries (i, j) and (j, i) differ")
    if float(k.detach().abs().amax()) > 1 + NOT_POSITIVE:
        raise ValueError(
            "K is not positive semi-definite: an entry exceeds the root of the product of its diagonal entries"
        )
    if weights is None:
        return entropy_of(k / n, order, truncation).exp()
    w = on_host(torch.as_tensor(weights))
    if w.ndim == 0 or w.shape[-1] != n or not torch.isfinite(w).all() or (w < 0).any() or not (w.sum(-1) > 0).all():
        raise ValueError(f"weights must be {n} finite numbers of at least 0, not all 0; got shape {list(w.shape)}")
    root = (w / w.sum(-1, keepdim=True)).sqrt()
    return entropy_of(root[..., :, None] * k * root[..., None, :], order, truncation).exp()


def rke_score(
    x: Tensor,
    kernel: KernelLike | None = None,
    feature_map: FeatureMap | None = None,
    unbiased: bool = False,
) -> Tensor:
    """Renyi kernel entropy score ``n^2 / ||K||_F^2`` (Jalali, Li, Farnia, NeurIPS 2023): Vendi of order 2.

    Needs no eigenvalues, and holds only a block of a large kernel matrix.

    The score of n draws from a distribution grows with n, by ``E ||K||_F^2 / n^2 = 1/n + (1 - 1/n) s``, where s is the mean
    of ``k(x, x')^2`` over independent pairs. ``unbiased`` gives ``1 / s``, with s estimated from the pairs of different
    samples: the score of the distribution, for sets of unequal size. It is infinite if no two samples are alike.

    Args:
        x: samples ``[..., n, d]``.
        kernel: see :func:`vendi_score`.
        feature_map: see :func:`vendi_score`; to rows of norm 1, if ``unbiased``.
        unbiased: estimate the score of the distribution that the samples are drawn from, instead of that of the samples.

    Raises:
        ValueError: as :func:`vendi_score`; if ``unbiased``, for less than two samples, or features of another norm.

    >>> round(rke_score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])).item(), 6)  # 9 / 5
    1.8
    >>> round(rke_score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]]), unbiased=True).item(), 6)  # 6 / 2
    3.0
    """
    if unbiased and feature_map is not None:
        feature_map = unit_rows(map_rows(feature_map, x))
    score = vendi_score(x, kernel, order=2.0, feature_map=feature_map)
    return 1 / mean_of_pairs(1 / score, x.shape[-2]) if unbiased else score


def mean_cosine(x: Tensor) -> Tensor:
    """Mean cosine of the pairs of different samples, in [-1, 1]: the mean pairwise similarity, MSS, of many papers.

    It falls as diversity grows, and knows no number of images: two kinds and twenty can have the same mean.

    Args:
        x: samples ``[..., n, d]``.

    Raises:
        ValueError: as :func:`vendi_score`, or for less than two samples.

    >>> round(mean_cosine(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])).item(), 6)  # one pair of three
    0.333333
    """
    u = l2_normalize(on_host(check_samples(x)))
    n = u.shape[-2]
    if n < 2:
        raise ValueError(f"a mean over pairs needs at least two samples, got {n}")
    return (u.sum(-2).square().sum(-1) - u.square().sum((-2, -1))) / (n * (n - 1))


def mean_of_pairs(mean: Tensor, n: int) -> Tensor:
    """The mean over pairs of different samples ``[...]``, from the mean over all n^2 pairs. A sample with itself gives 1.

    Raises:
        ValueError: for less than two samples.
    """
    if n < 2:
        raise ValueError(f"an unbiased score needs at least two samples, got {n}")
    return ((mean * n**2 - n) / (n * (n - 1))).clamp_min(0)


def unit_rows(features: Tensor) -> Tensor:
    """The features ``[..., n, D]``, after checking that their rows have norm 1.

    Raises:
        ValueError: if they have not.
    """
    norms = torch.linalg.vector_norm(features, dim=-1)
    if not torch.allclose(norms, torch.ones_like(norms), atol=1e-4):
        low, high = float(norms.min()), float(norms.max())
        raise ValueError(
            f"an unbiased score needs features of norm 1, got {low:.3g} to {high:.3g}; use random Fourier features"
        )
    return features
