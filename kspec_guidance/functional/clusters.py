"""Kinds of images: groups of samples that a person would call the same, and their effective number."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from kspec_guidance.functional.inputs import check_matrix, on_host
from kspec_guidance.functional.modes import Mode
from kspec_guidance.kernels.distances import SAME_DISTANCE, evenly_spaced, l2_normalize, squared_distances

__all__ = ["effective_number", "kind_labels", "kinds", "kinds_score"]

LINKAGE_ROWS = 3000  # rows whose distances are held at once: about 250 MB at the most
BLOCK_ROWS = 4096  # rows that are assigned to kinds at once


@torch.no_grad()
def kind_labels(x: Tensor, distance: float = SAME_DISTANCE) -> Tensor:
    """The number of each sample's kind ``[n]``, 0 for the largest kind.

    Average-linkage clustering (Sokal, Michener 1958) of the rows scaled to norm 1: groups are merged while the mean
    distance between their samples is at most ``distance``. Of more than 3,000 rows, 3,000 evenly spaced ones are clustered,
    others join the kind of the smallest root mean square distance, and those that are far from every kind are clustered
    in turn.

    Args:
        x: features ``[n, d]``.
        distance: largest mean Euclidean distance within a kind, in 0..2; 0.75 is a cosine of 0.72.

    Raises:
        ValueError: for an empty set, NaN, or a distance outside 0..2.

    >>> kind_labels(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])).tolist()
    [1, 0, 0]
    """
    if not 0 <= distance <= 2:
        raise ValueError(f"distance must lie in 0..2, the distances between rows of norm 1, got {distance}")
    u = l2_normalize(on_host(check_matrix(x)))
    labels, left, known = torch.full((len(u),), -1), torch.arange(len(u)), 0
    while len(left):
        chosen = left[evenly_spaced(len(left), LINKAGE_ROWS)]
        labels[chosen] = cut(average_linkage(u[chosen]), distance) + known
        means = _means(u[chosen], labels[chosen] - known)
        left = left[labels[left] < 0]
        for rows in left.split(BLOCK_ROWS):
            squares = u[rows].square().sum(1, keepdim=True) + means[:, -1] - 2 * u[rows] @ means[:, :-1].T
            nearest = squares.min(1)
            labels[rows] = torch.where(nearest.values <= distance**2, nearest.indices + known, -1)
        left = left[labels[left] < 0]
        known += len(means)
    _, labels, sizes = labels.unique(return_inverse=True, return_counts=True)
    first = torch.full((len(sizes),), len(u)).scatter_reduce(0, labels, torch.arange(len(u)), "amin")
    order = np.lexsort((first.numpy(), -sizes.numpy()))  # by size, then by the first sample
    return torch.from_numpy(order.argsort())[labels]


def average_linkage(u: Tensor) -> np.ndarray:
    """The tree of average linkage of rows ``[n, d]`` of norm 1, as SciPy writes it; empty for one row."""
    from scipy.cluster.hierarchy import linkage
    from scipy.spatial.distance import squareform

    if len(u) == 1:
        return np.empty((0, 4))
    return linkage(squareform(squared_distances(u).sqrt_().numpy(), checks=False), "average")


def cut(tree: np.ndarray, distance: float) -> Tensor:
    """Labels ``[n]`` from 0 of the clusters of a tree whose mean distances are at most ``distance``."""
    from scipy.cluster.hierarchy import fcluster

    if not len(tree):
        return torch.zeros(1, dtype=torch.long)
    return torch.from_numpy(fcluster(tree, distance, "distance")).long() - 1


def _means(u: Tensor, labels: Tensor) -> Tensor:
    """The mean row of each cluster, and the mean squared norm of its rows, ``[k, d + 1]``."""
    rows = torch.cat([u, u.square().sum(1, keepdim=True)], 1)
    total = torch.zeros(int(labels.max()) + 1, rows.shape[1], dtype=rows.dtype).index_add_(0, labels, rows)
    return total / labels.bincount()[:, None]


@torch.no_grad()
def kinds(x: Tensor, distance: float = SAME_DISTANCE) -> list[Mode]:
    """The kinds of samples in ``x`` ``[n, d]``, largest first; each sample is in one, so that their shares add up to 1.

    The samples of a kind are all listed, from the one of the largest mean cosine with the kind (its medoid) to the
    smallest; ``values`` has these cosines. Arguments as for :func:`kind_labels`.
    """
    labels = kind_labels(x, distance)
    u, sizes = l2_normalize(on_host(x)), labels.bincount().tolist()
    found = []
    for indices in labels.argsort(stable=True).split(sizes):
        cosines, order = (u[indices] @ u[indices].mean(0)).sort(descending=True, stable=True)
        found.append(Mode(len(indices) / len(u), indices[order].tolist(), cosines.tolist()))
    return found


def effective_number(sizes: Sequence[int] | Tensor) -> float:
    """Hill number of order 2 ``n^2 / sum n_k^2`` of the sizes of groups: how many equal groups are as diverse (Hill 1973).

    Raises:
        ValueError: if there is no sample, or a size is negative.

    >>> effective_number([5, 5, 5]), round(effective_number([8, 1, 1]), 3)
    (3.0, 1.515)
    """
    counts = torch.as_tensor(sizes, dtype=torch.float64)
    if counts.ndim != 1 or not counts.sum() > 0 or bool((counts < 0).any()):
        raise ValueError(f"sizes must be a list of numbers of samples, at least one above 0, got {sizes}")
    return float(counts.sum().square() / counts.square().sum())


def kinds_score(x: Tensor, distance: float = SAME_DISTANCE) -> Tensor:
    """Effective number of kinds, in [1, n]: 1 if all samples are of one kind, n if each is of its own.

    Arguments and errors as for :func:`kind_labels`. On image sets of known composition it is nearer to the truth than
    spectral scores of any bandwidth; see the page on diversity figures in the documentation.
    """
    return torch.tensor(effective_number(kind_labels(x, distance).bincount()), dtype=torch.float64)
