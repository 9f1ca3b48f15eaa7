"""Fidelity to a reference set: Frechet distance, precision, recall, density and coverage."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import check_matrix, check_pair_of_sets, on_host
from kspec_guidance.kernels.distances import pair_distances

__all__ = [
    "FidelityScores",
    "NeighbourScores",
    "fidelity_scores",
    "frechet_distance",
    "frechet_of_factors",
    "neighbour_scores",
    "precision_score",
]

BLOCK_ROWS = 1024  # rows of the matrix of distances that are held at once


def _check(x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    a, b = check_pair_of_sets(check_matrix(x), check_matrix(reference, "reference"))
    return on_host(a.detach()), on_host(b.detach())


def _mean_and_factor(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean ``[d]``, and ``R`` with ``R' R`` the covariance matrix of the rows ``[n, d]``."""
    mean = z.mean(0)
    centred = z - mean
    residue = centred.mean(0)  # the rounding error of the mean
    return mean + residue, torch.linalg.qr((centred - residue) / math.sqrt(len(z) - 1), mode="r").R


def frechet_distance(x: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to ``x`` ``[n, d]`` and ``reference`` ``[m, d]``, at least 0.

    FID for Inception features (Heusel et al. 2017, arXiv 1706.08500). ``tr (C_x C_y)^(1/2)`` is the sum of the singular
    values of ``R_x R_y'``, where ``R' R`` are the covariances: no root of a rounding error is taken, so the value is
    accurate for singular covariances (fewer samples than features, constant features) and means far from the origin.

    Args:
        x: ``[n, d]``.
        reference: ``[m, d]``.

    Raises:
        ValueError: for fewer than two samples in a set, different widths, or NaN.
    """
    x, y = _check(x, reference)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a Frechet distance needs at least two samples in each set, got {len(x)} and {len(y)}")
    return float(frechet_of_factors(*_mean_and_factor(x - y[0]), *_mean_and_factor(y - y[0])))


def frechet_of_factors(mean_x: Tensor, r_x: Tensor, mean_y: Tensor, r_y: Tensor) -> Tensor:
    """Frechet distance of two Gaussians with means ``[d]`` and covariances ``R' R`` ``[d, d]``."""
    spread = r_x.square().sum() + r_y.square().sum() - 2 * torch.linalg.svdvals(r_x @ r_y.T).sum()
    return (mean_x - mean_y).square().sum() + spread.clamp_min(0)


@dataclass(frozen=True)
class NeighbourScores:
    """Fidelity of a set to a reference by nearest neighbours.

    Attributes:
        precision, recall, coverage: in [0, 1].
        density: at least 0; can exceed 1.
    """

    precision: float
    recall: float
    density: float
    coverage: float


@dataclass(frozen=True)
class FidelityScores(NeighbourScores):
    """The same, and the Frechet distance.

    Attributes:
        frechet_distance: at least 0.
    """

    frechet_distance: float


def _check_nearest(x: Tensor, reference: Tensor, nearest: int) -> tuple[Tensor, Tensor]:
    a, b = _check(x, reference)
    if not isinstance(nearest, int) or not 1 <= nearest < min(len(a), len(b)):
        smaller = min(len(a), len(b))
        raise ValueError(f"nearest must be an integer of at least 1 and below {smaller}, the smaller set, got {nearest!r}")
    return a, b


class _Distances:
    """Squared distances of rows, such that equal pairs have equal values and can be compared.

    A matrix product is fast, but its last bits depend on the place of a pair in the matrix. Its values are compared
    where they differ by more than its error; the others are computed again, from the differences of the rows.
    """

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b, centre = a, b, b.mean(0)
        self.centred = a - centre, b - centre
        self.norms = tuple(z.square().sum(1) for z in self.centred)
        self.error = 8 * (a.shape[1] + 4) * torch.finfo(a.dtype).eps

    def block(self, rows: slice) -> tuple[Tensor, Tensor]:
        """Approximate values of some rows of ``a`` with all of ``b``, and bounds of their errors ``[k, m]``."""
        norms = self.norms[0][rows, None] + self.norms[1]
        return torch.addmm(norms, self.centred[0][rows], self.centred[1].T, alpha=-2), self.error * norms

    def refine(self, d2: Tensor, rows: slice, unsure: Tensor) -> Tensor:
        """``d2`` with the values at ``unsure`` computed from differences."""
        d2[unsure] = pair_distances(self.a[rows], self.b, unsure.nonzero(as_tuple=True))
        return d2


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, n, BLOCK_ROWS)]


def _radii(z: Tensor, nearest: int) -> Tensor:
    """Squared distance of each row ``[n]`` to its ``nearest``-th neighbour among the other rows."""
    distances, radii = _Distances(z, z), []
    for rows in _blocks(len(z)):
        d2, error = distances.block(rows)
        d2.diagonal(rows.start).fill_(math.inf)
        kth = d2.kthvalue(nearest, dim=1, keepdim=True).values
        error = error.amax(1, keepdim=True)
        below, above = d2 < kth - 2 * error, d2 > kth + 2 * error
        exact = distances.refine(d2, rows, ~(below | above))
        radii.append(exact.masked_fill(below, -1).masked_fill(above, math.inf).kthvalue(nearest, dim=1).values)
    return torch.cat(radii)


def _inside(d2: Tensor, radii: Tensor) -> Tensor:
    """Whether distances are within open balls; the centre belongs to its ball even if the radius is 0."""
    return (d2 < radii) | ((d2 == 0) & (radii == 0))


def _memberships(x: Tensor, reference: Tensor, radii: Tensor, own: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Which rows of ``x`` lie in which balls of the reference, and which of those in the balls of ``x``: ``[n, m]``."""
    distances, in_reference, in_own = _Distances(x, reference), [], []
    for rows in _blocks(len(x)):
        d2, error = distances.block(rows)
        unsure = (d2 - radii).abs() <= error
        if own is not None:
            unsure |= (d2 - own[rows, None]).abs() <= error
        d2 = distances.refine(d2, rows, unsure)
        in_reference.append(_inside(d2, radii))
        if own is not None:
            in_own.append(_inside(d2, own[rows, None]))
    return torch.cat(in_reference), torch.cat(in_own or in_reference)


def in_manifold(x: Tensor, reference: Tensor, nearest: int = 5) -> Tensor:
    """Which rows of ``x`` lie inside the reference's manifold, bool ``[n]``; see :func:`precision_score`.

    Arguments are those of :func:`neighbour_scores`.

    Raises:
        ValueError: as :func:`neighbour_scores`.
    """
    a, b = _check_nearest(x, reference, nearest)
    return _memberships(a, b, _radii(b, nearest))[0].any(1)


def precision_score(x: Tensor, reference: Tensor, nearest: int = 5) -> float:
    """Share of ``x`` inside the reference's manifold (Kynkaanniemi et al. 2019, arXiv 1904.06991), in [0, 1].

    The manifold is the union of the balls described in :func:`neighbour_scores`.

    Arguments are those of :func:`neighbour_scores`.

    Raises:
        ValueError: as :func:`neighbour_scores`.
    """
    return float(in_manifold(x, reference, nearest).double().mean())


def neighbour_scores(x: Tensor, reference: Tensor, nearest: int = 5) -> NeighbourScores:
    """Precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of a sample reaches to its ``nearest``-th neighbour in its own set, and is open, as in the code of Naeem et
    al.: a sample at exactly that distance is outside. So a set without ties has density 1 against itself. The centre
    always belongs to its ball, also where more than ``nearest`` copies of a sample make the radius 0. Distances that are
    equal compare as equal: a copy of a reference sample scores as that sample does.

    Args:
        x: ``[n, d]``.
        reference: ``[m, d]``.
        nearest: number of neighbours, below the size of the smaller set.

    Raises:
        ValueError: for too few samples, different widths, or NaN.
    """
    a, b = _check_nearest(x, reference, nearest)
    in_reference, in_own = _memberships(a, b, _radii(b, nearest), _radii(a, nearest))
    return NeighbourScores(
        precision=float(in_reference.any(1).double().mean()),
        recall=float(in_own.any(0).double().mean()),
        density=float(in_reference.double().sum(1).mean() / nearest),
        coverage=float(in_reference.any(0).double().mean()),
    )


def fidelity_scores(x: Tensor, reference: Tensor, nearest: int = 5) -> FidelityScores:
    """The scores of :func:`neighbour_scores`, and the :func:`frechet_distance`.

    Arguments are those of :func:`neighbour_scores`.

    Raises:
        ValueError: as :func:`neighbour_scores`.
    """
    found = neighbour_scores(x, reference, nearest)
    return FidelityScores(**vars(found), frechet_distance=frechet_distance(x, reference))
