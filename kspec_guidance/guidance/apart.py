"""Moves that end once samples are apart: the distance that each sample still lacks."""

import torch
from torch import Tensor

from kspec_guidance.kernels.distances import squared_distances
from kspec_guidance.objectives import Pairs
from kspec_guidance.utils.precision import full_precision

__all__ = ["missing_distance"]


def missing_distance(x: Tensor, sizes: Tensor, pairs: Pairs, apart: float, normalize: bool = True) -> Tensor:
    """Distance ``[n, 1]`` that each row lacks to be ``apart`` from the nearest of its prompt, in batch and memory.

    With prompts of weights between 0 and 1 it is the largest ``w (apart - d)``, ``d`` the distance; 0 where that is below
    0. The sparse pushes of SPELL (arXiv 2410.06025) end likewise, at a radius.

    Args:
        x: rows ``[n, d]``.
        sizes: their norms ``[n, 1]``.
        pairs: weights within the batch, and the relevant rows of the memory.
        apart: distance relative to the norm.
        normalize: whether rows are compared at norm 1, else as they are: relative to the norms' root mean square.
    """
    with full_precision(x.device):
        rows: Tensor = x / (sizes + (sizes == 0)) if normalize else x
        reach: float | Tensor = apart if normalize else apart * sizes.square().mean().sqrt()
        near = ((1 - squared_distances(rows).sqrt() / reach) * pairs.inside).amax(1).clamp_min(0)
        if pairs.selection is not None:
            near = torch.maximum(near, pairs.selection.closeness(rows, reach))
        return apart * near[:, None]
