"""Fidelity: Frechet distance, precision, recall, density and coverage, computed with torchmetrics and scikit-learn."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kspec_guidance.functional.inputs import check_pair_of_sets

__all__ = ["FidelityScores", "fidelity_scores", "frechet_distance", "precision_score"]


class _Rows(nn.Module):
    """An identity module: torchmetrics expects a network, and the features are already computed."""

    def __init__(self, width: int):
        super().__init__()
        self.num_features = width

    def forward(self, x: Tensor) -> Tensor:
        return x


def frechet_distance(x: Tensor, reference: Tensor) -> float:
    """Frechet distance of the Gaussians fitted to ``x`` ``[n, d]`` and ``reference`` ``[m, d]``, by torchmetrics' FID.

    Raises:
        ValueError: for fewer than two samples in a set, different widths, or NaN.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    x, y = check_pair_of_sets(x, reference)
    if min(len(x), len(y)) < 2:
        raise ValueError(f"a Frechet distance needs at least two samples in each set, got {len(x)} and {len(y)}")
    shape = (1, 1, x.shape[1])
    metric = FrechetInceptionDistance(feature=_Rows(x.shape[1]), normalize=True, input_img_size=shape)
    metric.set_dtype(torch.float64)
    metric.update(y, real=True)
    metric.update(x, real=False)
    return float(metric.compute())


@dataclass(frozen=True)
class FidelityScores:
    """Fidelity of a set to a reference.

    Attributes:
        frechet_distance: at least 0.
        precision, recall, coverage: in [0, 1].
        density: at least 0; can exceed 1.
    """

    frechet_distance: float
    precision: float
    recall: float
    density: float
    coverage: float


def _check(x: Tensor, reference: Tensor, nearest: int) -> tuple[Tensor, Tensor]:
    a, b = (z.detach().cpu() for z in check_pair_of_sets(x, reference))
    if not 1 <= nearest < min(len(a), len(b)):
        raise ValueError(f"nearest must be at least 1 and below {min(len(a), len(b))}, the smaller set, got {nearest}")
    return a, b


def _radii(z: Tensor, nearest: int) -> Tensor:
    """Distance of each row ``[n]`` to its ``nearest``-th neighbour, by scikit-learn."""
    from sklearn.neighbors import NearestNeighbors

    return torch.from_numpy(NearestNeighbors(n_neighbors=nearest).fit(z.numpy()).kneighbors()[0][:, -1])


def precision_score(x: Tensor, reference: Tensor, nearest: int = 5) -> float:
    """Share of ``x`` inside the reference's manifold (Kynkaanniemi et al. 2019, arXiv 1904.06991), in [0, 1].

    The manifold is the union of balls around the reference samples, each reaching to its ``nearest``-th neighbour.

    Args:
        x: ``[n, d]``.
        reference: ``[m, d]``.
        nearest: number of neighbours, below the size of the smaller set.

    Raises:
        ValueError: for too few samples, different widths, or NaN.
    """
    a, b = _check(x, reference, nearest)
    return float((torch.cdist(a, b) <= _radii(b, nearest)).any(1).double().mean())


def fidelity_scores(x: Tensor, reference: Tensor, nearest: int = 5) -> FidelityScores:
    """Frechet distance, precision and recall (Kynkaanniemi et al. 2019), density and coverage (Naeem et al. 2020).

    The ball of a sample reaches to its ``nearest``-th neighbour in its own set.

    Args:
        x: ``[n, d]``.
        reference: ``[m, d]``.
        nearest: number of neighbours, below the size of the smaller set.

    Raises:
        ValueError: for too few samples, different widths, or NaN.
    """
    distance = frechet_distance(x, reference)
    a, b = _check(x, reference, nearest)
    radii = _radii(b, nearest)
    cross = torch.cdist(a, b)  # [n, m]
    in_reference, in_own = cross <= radii, cross <= _radii(a, nearest)[:, None]
    return FidelityScores(
        frechet_distance=distance,
        precision=float(in_reference.any(1).double().mean()),
        recall=float(in_own.any(0).double().mean()),
        density=float(in_reference.double().sum(1).mean() / nearest),
        coverage=float((cross.amin(0) <= radii).double().mean()),
    )
