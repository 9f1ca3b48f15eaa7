"""KEN: the modes of a set that are more frequent than in a reference set."""

import math
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import (
    FeatureMap,
    KernelLike,
    as_kernel,
    check_pair_of_sets,
    check_paired,
    joint_gram,
    map_rows,
    on_host,
    unit_gram,
)
from kspec_guidance.kernels import CosineKernel
from kspec_guidance.kernels.spectrum import (
    cholesky_factor,
    own_products,
    own_products_of_factor,
    symmetric_eigenvalues,
)

__all__ = [
    "SignedSpectrum",
    "conditional_ken_score",
    "differential_spectrum",
    "entropy_of_mass",
    "ken_score",
    "relative_rke_score",
    "root",
]


WELL_CONDITIONED = 1e-9  # smallest squared pivot, to the largest, for which the Cholesky factor is used


def _accurate_factor(g: Tensor) -> Tensor | None:
    """The Cholesky factor ``[..., n, n]``; None if there is none, or it is not accurate."""
    r = cholesky_factor(g)
    if r is None:
        return None
    pivots = r.diagonal(dim1=-2, dim2=-1).square()
    return r if bool((pivots.amin(-1) > WELL_CONDITIONED * pivots.amax(-1)).all()) else None


def root(g: Tensor) -> Tensor:
    """``R`` with ``R R' = G``: the Cholesky factor if it is accurate, else the symmetric root."""
    r = _accurate_factor(g)
    return _symmetric_root(g) if r is None else r


def _symmetric_root(g: Tensor) -> Tensor:
    e, u = torch.linalg.eigh(g)
    noise = e.shape[-1] * torch.finfo(e.dtype).eps * e.amax(-1, keepdim=True)  # its root would be 1e-8
    return (u * torch.where(e > noise, e, 0.0).sqrt()[..., None, :]) @ u.mT


class SignedSpectrum(torch.autograd.Function):
    """Eigenvalues of ``G S`` for a positive semi-definite ``G`` and a diagonal ``S`` of signs, with its eigenvectors.

    They are those of the symmetric ``R' S R`` with ``R R' = G``. With ``R' S R w = l w`` of unit ``w``,
    ``d l / d G = S R w w' R' S / l``: no differences of eigenvalues, so repeated eigenvalues are no problem. The
    eigenvectors are empty unless requested or needed for the gradient.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, sign: Tensor, vectors: bool) -> tuple[Tensor, Tensor]:
        r, n = _accurate_factor(g), int((sign > 0).sum())
        values_only = not vectors and not ctx.needs_input_grad[0]
        if r is not None and r.ndim == 2 and values_only and bool((sign[:n] > 0).all()):
            # R' S R = 2 R_+' R_+ - R' R, where the rows of R_+ have n numbers that are not 0
            inner = own_products_of_factor(r).neg_()  # its lower triangle, which is all that eigenvalues are computed from
            inner[:n, :n].add_(own_products_of_factor(r[:n, :n]), alpha=2)
        else:
            r = _symmetric_root(g) if r is None else r
            inner = own_products(r[..., sign > 0, :]) - own_products(r[..., sign < 0, :])
        if not values_only:
            l, w = torch.linalg.eigh(inner)
            found = r @ w
        else:
            l, found = symmetric_eigenvalues(inner), g.new_empty(0)
        ctx.save_for_backward(l, found, sign)
        ctx.mark_non_differentiable(found)
        return l, found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        l, vectors, sign = ctx.saved_tensors
        noise = l.shape[-1] * torch.finfo(l.dtype).eps * l.abs().amax(-1, keepdim=True)
        weight = torch.where(l.abs() > noise, grads[0] / torch.where(l == 0, 1.0, l), 0.0)
        sv = sign[..., :, None] * vectors
        return (sv * weight[..., None, :]) @ sv.mT, None, None


def check_eta(eta: float) -> None:
    if not 0 <= eta < math.inf:
        raise ValueError(f"eta is the weight of the reference set and must be at least 0 and finite, got {eta}")


def _map_both(feature_map: FeatureMap, x: Tensor, y: Tensor) -> Tensor:
    """Feature rows ``[..., n + m, D]`` of two sets."""
    if isinstance(feature_map, Tensor):
        return map_rows(feature_map, torch.cat([on_host(x), on_host(y)], dim=-2))
    return torch.cat([map_rows(feature_map, x), map_rows(feature_map, y)], dim=-2)


def differential_spectrum(
    x: Tensor,
    reference: Tensor,
    kernel: KernelLike | None,
    eta: float,
    feature_map: FeatureMap | None = None,
    vectors: bool = True,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``C_X - eta C_ref``, ascending, and each eigenfunction's values at the samples of both sets.

    With ``G`` the kernel matrix of both sets, rows weighted by ``n^-1/2`` and ``(eta / m)^1/2``, and ``S`` the signs of
    the two sets, ``G S`` has the same non-zero eigenvalues. It is symmetrised by a root of ``G``, so they are real.

    Returns:
        ``[..., n + m]`` and ``[..., n + m, n + m]``.

    Raises:
        ValueError: for a negative ``eta``, no samples, different widths, or NaN.
    """
    check_eta(eta)
    x, y = check_pair_of_sets(x, reference)
    if feature_map is not None:
        phi = _map_both(feature_map, x, y)
        k = phi @ phi.mT
    else:
        both = torch.cat([on_host(x), on_host(y)], dim=-2)
        k = unit_gram(as_kernel(kernel).fit(both.detach()), both)
    return _signed_spectrum(k, x.shape[-2], eta, vectors)


def _signed_spectrum(k: Tensor, n: int, eta: float, vectors: bool) -> tuple[Tensor, Tensor]:
    """As :func:`differential_spectrum`, from the kernel matrix ``[..., n + m, n + m]`` of both sets."""
    m = k.shape[-1] - n
    weight = torch.cat([k.new_full((n,), n**-0.5), k.new_full((m,), (eta / m) ** 0.5)])
    sign = torch.cat([torch.ones(n), -torch.ones(m)]).to(k)
    return SignedSpectrum.apply((weight[:, None] * k).mul_(weight), sign, vectors)


def entropy_of_mass(l: Tensor) -> Tensor:
    """``(sum l) H(l / sum l)`` ``[...]`` over the positive values of ``l`` ``[..., n]``; 0 if there are none."""
    positive = l > l.shape[-1] * torch.finfo(l.dtype).eps * l.abs().amax(-1, keepdim=True)
    safe = torch.where(positive, l, 1.0)
    mass = torch.where(positive, l, 0.0).sum(-1, keepdim=True)
    share = torch.where(positive, safe / torch.where(mass > 0, mass, 1.0), 1.0)
    return torch.where(positive, safe * -share.log(), 0.0).sum(-1)


def ken_score(
    x: Tensor, reference: Tensor, kernel: KernelLike | None = None, eta: float = 1.0, feature_map: FeatureMap | None = None
) -> Tensor:
    """Kernel-based entropic novelty ``[...]``, in nats (Zhang et al. 2024, arXiv 2402.17287), at least 0.

    ``(sum l) H(l / sum l)`` over the positive eigenvalues of ``C_X - eta C_ref``: modes of ``x`` that are more than ``eta``
    times as frequent as in the reference. Equal sets give 0 for ``eta >= 1``; k equally frequent new modes give ``log k``.

    Args:
        x: samples ``[..., n, d]``.
        reference: ``[..., m, d]``.
        kernel: cosine by default; an unset bandwidth is the median distance over both sets.
        eta: factor by which a mode must be more frequent, at least 0.
        feature_map: a map for both sets; with random Fourier features this is FINC (arXiv 2412.02700);
            :class:`~kspec_guidance.metrics.KENScore` streams.

    Raises:
        ValueError: for a negative ``eta``, no samples, different widths, or NaN.

    >>> round(ken_score(torch.eye(4), torch.ones(3, 4)[:, :1] * torch.eye(4)[:1]).item(), 4)  # 3 of 4 modes are new
    0.824
    """
    check_eta(eta)
    x, y = check_pair_of_sets(x, reference)
    n, m, phi = x.shape[-2], y.shape[-2], None
    if feature_map is not None:
        phi = _map_both(feature_map, x, y)
    elif isinstance(kernel, CosineKernel | None) and x.shape[-1] < n + m:
        phi = CosineKernel.features(torch.cat([on_host(x), on_host(y)], dim=-2))
    if phi is None or phi.shape[-1] >= n + m:
        return entropy_of_mass(differential_spectrum(x, y, kernel, eta, feature_map, vectors=False)[0])
    a, b = phi[..., :n, :], phi[..., n:, :]
    return entropy_of_mass(symmetric_eigenvalues(own_products(a) / n - eta * own_products(b) / m))


def conditional_ken_score(
    x: Tensor,
    prompt_features: Tensor,
    reference: Tensor,
    reference_prompt_features: Tensor,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    eta: float = 1.0,
) -> Tensor:
    """Prompt-aware KEN ``[...]``, in nats: pairs of prompt and sample that are more frequent than in a reference.

    :func:`ken_score` with the kernel ``k(x, x') k_T(t, t')`` of pairs, the joint operator of PromptSplit (arXiv
    2602.04009). Samples that both sets have, but for other prompts, are novel here and not for KEN. With one prompt for all
    samples it is KEN.

    Args:
        x: samples ``[..., n, d]``.
        prompt_features: of ``x`` ``[..., n, p]``.
        reference: ``[..., m, d]``.
        reference_prompt_features: ``[..., m, p]``.
        kernel: of samples, cosine by default; an unset bandwidth is the median distance over both sets.
        prompt_kernel: of prompts, likewise.
        eta: factor by which a pair must be more frequent, at least 0.

    Raises:
        ValueError: as :func:`ken_score`, or for different numbers of samples and prompts.
    """
    check_eta(eta)
    x, t = check_paired(x, prompt_features)
    y, s = check_paired(reference, reference_prompt_features)
    both = [torch.cat([on_host(z) for z in check_pair_of_sets(*pair)], dim=-2) for pair in ((x, y), (t, s))]
    kernels = [as_kernel(k).fit(z.detach()) for k, z in zip((kernel, prompt_kernel), both, strict=True)]
    return entropy_of_mass(_signed_spectrum(joint_gram(both, kernels), x.shape[-2], eta, vectors=False)[0])


def relative_rke_score(x: Tensor, reference: Tensor, kernel: KernelLike | None = None) -> Tensor:
    """Relative Renyi kernel entropy ``[...]``, in nats, at least 0: 0 for sets with the same kernel covariance.

    Order 1/2 of the Renyi divergence, ``-2 log |C_X^(1/2) C_Y^(1/2)|_*``, which is ``-2 log`` of the sum of singular values
    of ``k(x_i, y_j) / (n m)^(1/2)`` (RRKE: Jalali, Li, Farnia 2023). For sets of separate modes with shares p and q it is
    ``-2 log sum (p q)^(1/2)``; infinite if they have no mode in common.

    Args:
        x: samples ``[..., n, d]``.
        reference: ``[..., m, d]``.
        kernel: cosine by default; an unset bandwidth is the median distance over both sets.

    Raises:
        ValueError: for no samples, different widths, or NaN.

    >>> round(relative_rke_score(torch.eye(3), torch.eye(3)[:1]).item(), 6)  # log 3
    1.098612
    """
    x, y = (on_host(z) for z in check_pair_of_sets(x, reference))
    n, m = x.shape[-2], y.shape[-2]
    made = as_kernel(kernel).fit(torch.cat([x, y], dim=-2).detach())
    overlap = torch.linalg.svdvals(unit_gram(made, x, y)).sum(-1) / math.sqrt(n * m)
    return -2 * overlap.clamp_max(1).log()
