"""The modes behind a score, each with its most typical samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import FeatureMap, KernelLike, check_matrix, gram, map_rows
from kspec_guidance.functional.novelty import differential_spectrum
from kspec_guidance.kernels.spectrum import noise_level

__all__ = ["Mode", "larger_side", "novel_modes", "top_modes"]


@dataclass(frozen=True)
class Mode:
    """One mode, or one kind: its share of the set, and its most typical samples.

    Attributes:
        share: the eigenvalue, or the share of the set that is of this kind.
        samples: indices, largest value first.
        values: of the eigenfunction at these samples, or their mean cosines with the samples of the kind.
    """

    share: float
    samples: list[int]
    values: list[float]


def larger_side(x: Tensor) -> Tensor:
    """The sign ``[k, 1]`` of the side of each row ``[k, n]`` with the larger sum of squares; eigenvectors have either."""
    larger = x.clamp_min(0).square().sum(1) >= x.clamp_max(0).square().sum(1)
    return torch.where(larger, 1.0, -1.0)[:, None].to(x)


def _largest(values: Tensor, shares: Tensor, per_mode: int) -> list[Mode]:
    """Modes from columns of values at the samples."""
    modes = []
    for share, v in zip(shares.tolist(), values.mT * larger_side(values.mT), strict=True):
        top = v.topk(min(per_mode, len(v)))
        keep = top.values > 1e-6 * top.values[0]
        modes.append(Mode(share, top.indices[keep].tolist(), top.values[keep].tolist()))
    return modes


@torch.no_grad()
def top_modes(
    x: Tensor,
    kernel: KernelLike | None = None,
    modes: int = 10,
    per_mode: int = 8,
    feature_map: FeatureMap | None = None,
) -> list[Mode]:
    """The largest modes of ``x`` ``[n, d]``: eigenvectors of ``K / n``, or of the features' second moment (FKEA).

    Args:
        x: ``[n, d]``.
        kernel: as for :func:`~kspec_guidance.functional.vendi_score`.
        modes: number of modes; fewer are returned if fewer have an eigenvalue above 0.
        per_mode: number of samples listed for each mode.
        feature_map: as for :func:`~kspec_guidance.functional.vendi_score`.
    """
    x = check_matrix(x)
    n = len(x)
    if feature_map is not None and (phi := map_rows(feature_map, x)).shape[-1] < n:
        l, u = torch.linalg.eigh(phi.mT @ phi / n)
        values = phi @ u
    else:
        k = gram(x, kernel) if feature_map is None else map_rows(feature_map, x) @ map_rows(feature_map, x).mT
        l, u = torch.linalg.eigh(k / n)
        values = u * (l.clamp_min(0) * n).sqrt()
    best = l.argsort(descending=True)[:modes]
    best = best[l[best] > noise_level(l)]
    return _largest(values[:, best], l[best] / l.clamp_min(0).sum(), per_mode)


@torch.no_grad()
def novel_modes(
    x: Tensor,
    reference: Tensor,
    kernel: KernelLike | None = None,
    eta: float = 1.0,
    modes: int = 10,
    per_mode: int = 8,
    feature_map: FeatureMap | None = None,
) -> list[Mode]:
    """The modes of ``x`` ``[n, d]`` that are more than ``eta`` times as frequent as in ``reference`` ``[m, d]``.

    The positive eigenvalues behind :func:`~kspec_guidance.functional.ken_score`, largest first; fewer than ``modes`` if
    fewer are positive. Swap the sets to find the modes that ``x`` lacks.
    """
    check_matrix(x), check_matrix(reference, "reference")
    l, vectors = differential_spectrum(x, reference, kernel, eta, feature_map)
    best = l.argsort(descending=True)[:modes]
    best = best[l[best] > 1e-9]
    return _largest(vectors[: len(x), best] * len(x) ** 0.5, l[best], per_mode)
