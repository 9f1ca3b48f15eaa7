"""KEN: how much of a set is more frequent than in a reference set."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import FeatureMap, check_pair_of_sets, map_rows
from kspec_guidance.kernels import CosineKernel, Kernel

__all__ = ["differential_spectrum", "entropy_of_mass", "ken_score"]


class _SignedSpectrum(torch.autograd.Function):
    """Eigenvalues of ``G S`` for a positive semi-definite ``G`` and a diagonal ``S`` of signs, with its eigenvectors.

    They are those of the symmetric ``R S R`` with ``R = G^1/2``. With ``R S R w = l w`` of unit ``w``,
    ``d l / d G = S R w w' R S / l``: no differences of eigenvalues, so equal ones do no harm.
    """

    @staticmethod
    def forward(ctx: Any, g: Tensor, sign: Tensor) -> tuple[Tensor, Tensor]:
        e, u = torch.linalg.eigh(g)
        noise = e.shape[-1] * torch.finfo(e.dtype).eps * e.amax(-1, keepdim=True)  # its root would be 1e-8
        root = (u * torch.where(e > noise, e, 0.0).sqrt()[..., None, :]) @ u.mT
        inner = (root * sign[..., None, :]) @ root
        l, w = torch.linalg.eigh((inner + inner.mT) / 2)
        vectors = root @ w  # of G S, on the right
        ctx.save_for_backward(l, vectors, sign)
        ctx.mark_non_differentiable(vectors)
        return l, vectors

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        l, vectors, sign = ctx.saved_tensors
        noise = l.shape[-1] * torch.finfo(l.dtype).eps * l.abs().amax(-1, keepdim=True)
        weight = torch.where(l.abs() > noise, grads[0] / torch.where(l == 0, 1.0, l), 0.0)
        sv = sign[..., :, None] * vectors
        return (sv * weight[..., None, :]) @ sv.mT, None


def differential_spectrum(
    x: Tensor, reference: Tensor, kernel: Kernel | None, eta: float, feature_map: FeatureMap | None = None
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of ``C_X - eta C_ref``, ascending, and each one's values at the samples of both sets, as columns.

    By kernels: with ``G`` the kernel matrix of both sets, rows weighed by ``n^-1/2`` and ``(eta / m)^1/2``, and ``S`` the
    signs of the two sets, ``G S`` has the same non-zero eigenvalues. It is symmetrised by ``G^1/2``, so they are
    exactly real.

    Returns:
        ``[..., n + m]`` and ``[..., n + m, n + m]``.

    Raises:
        ValueError: for a negative ``eta``, no samples, different widths, or NaN.
    """
    if not eta >= 0:
        raise ValueError(f"eta weighs the reference set and must be at least 0, got {eta}")
    x, y = check_pair_of_sets(x, reference)
    n, m = x.shape[-2], y.shape[-2]
    both = torch.cat([x, y], dim=-2)
    if feature_map is not None:
        phi = map_rows(feature_map, both)
        k = phi @ phi.mT
    else:
        k = (kernel or CosineKernel()).fit(both.detach()).normalised(both)
    weight = torch.cat([k.new_full((n,), n**-0.5), k.new_full((m,), (eta / m) ** 0.5)])
    sign = torch.cat([torch.ones(n), -torch.ones(m)]).to(k)
    return _SignedSpectrum.apply(weight[:, None] * k * weight, sign)


def entropy_of_mass(l: Tensor) -> Tensor:
    """``(sum l) H(l / sum l)`` ``[...]`` over the positive ones of ``l`` ``[..., n]``; 0 if there are none."""
    positive = l > l.shape[-1] * torch.finfo(l.dtype).eps * l.abs().amax(-1, keepdim=True)
    safe = torch.where(positive, l, 1.0)
    mass = torch.where(positive, l, 0.0).sum(-1, keepdim=True)
    share = torch.where(positive, safe / torch.where(mass > 0, mass, 1.0), 1.0)
    return -torch.where(positive, safe * share.log(), 0.0).sum(-1)


def ken_score(
    x: Tensor, reference: Tensor, kernel: Kernel | None = None, eta: float = 1.0, feature_map: FeatureMap | None = None
) -> Tensor:
    """Kernel-based entropic novelty ``[...]``, in nats (Zhang et al. 2024, arXiv 2402.17287), at least 0.

    ``(sum l) H(l / sum l)`` over the positive eigenvalues of ``C_X - eta C_ref``: modes of ``x`` that are more than ``eta``
    times as frequent as in the reference. Equal sets give 0 for ``eta >= 1``; k equally frequent new modes give ``log k``.

    Args:
        x: samples ``[..., n, d]``.
        reference: ``[..., m, d]``.
        kernel: cosine by default; an open bandwidth takes the median rule over both sets.
        eta: how many times as frequent.
        feature_map: a map for both sets, with random Fourier features the route of FINC (arXiv 2412.02700);
            :class:`~kspec_guidance.metrics.KENScore` streams.

    Raises:
        ValueError: for a negative ``eta``, no samples, different widths, or NaN.

    >>> round(ken_score(torch.eye(4), torch.ones(3, 4)[:, :1] * torch.eye(4)[:1]).item(), 4)  # 3 of 4 modes are new
    0.824
    """
    return entropy_of_mass(differential_spectrum(x, reference, kernel, eta, feature_map)[0])
