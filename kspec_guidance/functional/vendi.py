"""Vendi scores of every order, and RKE."""

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import (
    FeatureMap,
    KernelLike,
    as_kernel,
    check_samples,
    on_host,
    smaller_matrix,
    unit_gram,
)
from kspec_guidance.kernels import CosineKernel, Kernel
from kspec_guidance.kernels.spectrum import check_order, eigenvalues, renyi_entropy, truncate

__all__ = ["entropy_of", "kernel_entropy", "rke_score", "vendi_score"]

BLOCK_ROWS = 1024  # rows of the kernel matrix that RKE computes at once


def entropy_of(matrix: Tensor, order: float = 1.0, truncation: int | None = None) -> Tensor:
    """Renyi entropy of a semi-definite matrix ``[..., n, n]`` scaled to trace 1; order 2 needs no eigenvalues."""
    if check_order(order) == 2 and truncation is None:
        return -(matrix.square().sum((-2, -1)) / matrix.diagonal(dim1=-2, dim2=-1).sum(-1).square()).log()
    spectrum = eigenvalues(matrix)
    mass = spectrum.sum(-1, keepdim=True)
    spectrum = spectrum / (mass if truncation is None else mass.clamp_min(1))
    return renyi_entropy(truncate(spectrum, truncation), order)


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
    if check_order(order) == 2 and truncation is None and wide and x.shape[-2] > 4 * BLOCK_ROWS:
        return _collision_entropy(x, as_kernel(kernel))
    return entropy_of(smaller_matrix(x, kernel, feature_map), order, truncation)


def _collision_entropy(x: Tensor, kernel: Kernel) -> Tensor:
    """``-log(||K||_F^2 / n^2)`` from blocks on and above the diagonal, so the matrix is never held whole."""
    x, n = on_host(x), x.shape[-2]
    kernel, total = kernel.fit(x.detach()), torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device)
    parts = x.split(BLOCK_ROWS, dim=-2)
    for i, a in enumerate(parts):
        for b in parts[i:]:
            squares = unit_gram(kernel, a, b).square().sum((-2, -1))
            total = total + (squares if b is a else 2 * squares)
    return -(total / n**2).log()


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
        ValueError: for an empty set, NaN, or an order outside (0, inf].

    >>> round(vendi_score(torch.eye(5)).item(), 6)
    5.0
    """
    return kernel_entropy(x, kernel, order, truncation, feature_map).exp()


def rke_score(x: Tensor, kernel: KernelLike | None = None, feature_map: FeatureMap | None = None) -> Tensor:
    """Renyi kernel entropy score ``n^2 / ||K||_F^2`` (Jalali, Li, Farnia 2023, arXiv 2310.11714): Vendi of order 2.

    Needs no eigenvalues, and holds only a block of a large kernel matrix. Arguments and errors are those of
    :func:`vendi_score`.

    >>> round(rke_score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])).item(), 6)  # 9 / 5
    1.8
    """
    return vendi_score(x, kernel, order=2.0, feature_map=feature_map)
