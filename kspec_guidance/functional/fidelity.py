"""Fidelity to a reference set: Frechet distance, precision, recall, density and coverage."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from kspec_guidance.functional.inputs import check_matrix, check_pair_of_sets, on_host
from kspec_guidance.kernels.distances import pair_distances
from kspec_guidance.utils.arguments import is_integer

__all__ = [
    "FidelityScores",
    "NeighbourScores",
    "fidelity_scores",
    "frechet_distance",
    "frechet_of_factors",
    "neighbour_scores",
    "precision_score",
]

BLOCK_ROWS = 512  # rows of the matrix of distances that are held at once
SPARE = 4  # candidates beside the nearest neighbours, for equal distances
MANY = 0.01  # share of unsure values above which a block is computed in float64


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
    if not is_integer(nearest, 1) or nearest >= min(len(a), len(b)):
        smaller = min(len(a), len(b))
        raise ValueError(f"nearest must be an integer of at least 1 and below {smaller}, the smaller set, got {nearest!r}")
    return a, b


class _Distances:
    """Squared distances of rows, such that equal pairs have equal values and can be compared.

    A matrix product is fast, but has an error, and its last bits depend on the place of a pair in the matrix. Its values
    are compared where they differ by more than a bound of its error; the others are computed again in float64, from the
    differences of the rows. So products may be in float32: the results are the same.

    The bound: with unit roundoff u and centred rows of norms ``|a|`` and ``|b|``, rounding the rows changes a squared
    distance by at most ``4 u (|a|^2 + |b|^2)``, a sum of d products in any order has an error of at most ``d u |a| |b|``
    (Higham 2002, section 3.1), and the norms and sums add ``5 u (|a|^2 + |b|^2)``. Together this is below
    ``e (|a|^2 + |b|^2)`` with ``e = (d + 16) u``. As ``|b|^2 <= 2 |a|^2 + 2 D`` for a squared distance D, it is below
    ``3 e (|a|^2 + D)``: a number for each row, however far other rows are.
    """

    def __init__(self, a: Tensor, b: Tensor):
        self.a, self.b, centre = a, b, b.mean(0)
        self.centred = a - centre, b - centre
        self._parts: dict[torch.dtype, tuple[Tensor, ...]] = {}

    def precisions(self) -> list[tuple[torch.dtype, float]]:
        """Those of a product, the fastest first, each with ``3 e`` rounded up; float32 where it suffices."""
        found = [(k, 1.6 * (self.a.shape[1] + 16) * torch.finfo(k).eps) for k in (torch.float32, torch.float64)]
        largest = max(float(z.abs().amax()) for z in self.centred)
        return found if found[0][1] < MANY and (largest == 0 or 1e-12 < largest < 1e12) else found[1:]

    def block(self, rows: slice, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Approximate values of some rows of ``a`` with all of ``b`` ``[k, m]``, and ``|a|^2`` ``[k, 1]`` and underflow."""
        if dtype not in self._parts:
            a, b = (z.to(dtype) for z in self.centred)
            self._parts[dtype] = a, b, a.square().sum(1, keepdim=True), b.square().sum(1)
        a, b, aa, bb = self._parts[dtype]
        return (a[rows] @ b.T).mul_(-2).add_(aa[rows]).add_(bb), aa[rows] + a.shape[1] * torch.finfo(dtype).tiny

    def exact(self, i: Tensor, j: Tensor) -> Tensor:
        """Values of pairs of rows, from their differences."""
        return pair_distances(self.a, self.b, (i, j))


def _blocks(n: int) -> list[slice]:
    return [slice(start, start + BLOCK_ROWS) for start in range(0, n, BLOCK_ROWS)]


def _radii(z: Tensor, nearest: int) -> Tensor:
    """Squared distance of each row ``[n]`` to its ``nearest``-th neighbour among the other rows."""
    distances, radii = _Distances(z, z), []
    candidates = min(nearest + SPARE, len(z) - 1)
    for rows in _blocks(len(z)):
        for dtype, bound in distances.precisions():
            d2, norms = distances.block(rows, dtype)
            d2.diagonal(rows.start).fill_(math.inf)
            near, index = d2.topk(candidates, largest=False)
            least = near.clamp_min(0)
            low, high = near - bound * (norms + least), near + bound * (norms + least)
            kth_low, kth_high = low[:, nearest - 1, None], high[:, nearest - 1, None]
            incomplete = (low[:, -1:] <= kth_high).squeeze(1) & (candidates < len(z) - 1)  # others may be as near
            if dtype == torch.float64 or incomplete.double().mean() <= MANY:
                break
        unsure = (low <= kth_high) & (high >= kth_low)
        values = torch.where(low > kth_high, math.inf, -1.0).double()  # or surely nearer
        i, j = unsure.nonzero(as_tuple=True)
        values[i, j] = distances.exact(rows.start + i, index[i, j])
        radius = values.sort(dim=1).values[:, nearest - 1]
        for row in incomplete.nonzero().flatten().tolist():
            unsure = (d2[row] - bound * (norms[row] + d2[row].clamp_min(0))) <= kth_high[row]
            unsure[rows.start + row] = False
            (j,) = unsure.nonzero(as_tuple=True)
            radius[row] = distances.exact(torch.full_like(j, rows.start + row), j).kthvalue(nearest).values
        radii.append(radius)
    return torch.cat(radii)


def _inside(d2: Tensor, radii: Tensor) -> Tensor:
    """Whether distances are within open balls; the centre belongs to its ball even if the radius is 0."""
    return (d2 < radii) | ((d2 == 0) & (radii == 0))


def _memberships(x: Tensor, reference: Tensor, *radii: Tensor) -> Iterator[list[Tensor]]:
    """For some rows of ``x`` at a time and each of the radii: which of them lie in which balls, bool ``[k, m]``.

    Radii are of the balls around the rows of the reference ``[m]``, or of ``x`` ``[n, 1]``.
    """
    distances = _Distances(x, reference)
    for rows in _blocks(len(x)):
        for dtype, bound in distances.precisions():
            d2, norms = distances.block(rows, dtype)
            found, unsure = [], []
            for r in radii:
                r = r[rows] if r.ndim == 2 else r
                surely = d2 < (r * (1 - bound)).to(dtype) - bound * norms
                perhaps = d2 <= (r * (1 + 2 * bound)).to(dtype) + 2 * bound * norms
                found.append((surely, r))
                unsure.append((perhaps & ~surely).nonzero(as_tuple=True))
            if dtype == torch.float64 or sum(len(i) for i, _ in unsure) <= MANY * d2.numel() * len(radii):
                break
        for (inside, r), (i, j) in zip(found, unsure, strict=True):
            inside[i, j] = _inside(distances.exact(rows.start + i, j), r.expand(d2.shape)[i, j])
        yield [inside for inside, _ in found]


def in_manifold(x: Tensor, reference: Tensor, nearest: int = 5) -> Tensor:
    """Which rows of ``x`` lie inside the reference's manifold, bool ``[n]``; see :func:`precision_score`.

    Arguments are those of :func:`neighbour_scores`.

    Raises:
        ValueError: as :func:`neighbour_scores`.
    """
    a, b = _check_nearest(x, reference, nearest)
    return torch.cat([inside.any(1) for (inside,) in _memberships(a, b, _radii(b, nearest))])


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
    precise, balls = 0, 0
    covered, recalled = np.zeros(len(b), dtype=bool), np.zeros(len(b), dtype=bool)
    for blocks in _memberships(a, b, _radii(b, nearest), _radii(a, nearest)[:, None]):
        in_reference, in_own = (inside.numpy() for inside in blocks)  # numpy counts the entries of masks faster
        precise += int(in_reference.any(1).sum())
        balls += int(np.count_nonzero(in_reference))
        covered |= in_reference.any(0)
        recalled |= in_own.any(0)
    return NeighbourScores(
        precision=precise / len(a),
        recall=float(recalled.mean()),
        density=balls / (len(a) * nearest),
        coverage=float(covered.mean()),
    )


def fidelity_scores(x: Tensor, reference: Tensor, nearest: int = 5) -> FidelityScores:
    """The scores of :func:`neighbour_scores`, and the :func:`frechet_distance`.

    Arguments are those of :func:`neighbour_scores`.

    Raises:
        ValueError: as :func:`neighbour_scores`.
    """
    found = neighbour_scores(x, reference, nearest)
    return FidelityScores(**vars(found), frechet_distance=frechet_distance(x, reference))
