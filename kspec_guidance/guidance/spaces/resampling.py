"""Averages and resampling of axes as matrix products, whose adjoints are products with the transposed matrices.

The backward passes of pooling and interpolation have no deterministic version on CUDA; matrix products have one.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as nnf

__all__ = ["bilinear_matrix", "block_mean_matrix", "resample"]


def block_mean_matrix(n: int, m: int, device: torch.device) -> Tensor:
    """Matrix ``[n, m]`` of the means over ``m`` blocks of ``n`` entries.

    Blocks are those of adaptive average pooling: they overlap if ``m`` does not divide ``n``.
    """
    block, entry = torch.arange(m, device=device), torch.arange(n, device=device)[:, None]
    start, stop = block * n // m, ((block + 1) * n + m - 1) // m
    return ((entry >= start) & (entry < stop)).float() / (stop - start)


def bilinear_matrix(n: int, m: int, device: torch.device) -> Tensor:
    """Matrix ``[n, m]`` of the bilinear resampling of ``n`` entries to ``m``, with antialiasing."""
    eye = torch.eye(n, device=device)[None, None]
    return nnf.interpolate(eye, (m, n), mode="bilinear", antialias=True, align_corners=False)[0, 0].mT


def resample(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The last axes of ``x`` ``[..., n_1, ..., n_k]`` multiplied by matrices ``[n_i, m_i]``: ``[..., m_1, ..., m_k]``."""
    for axis, matrix in enumerate(matrices, start=-len(matrices)):
        x = (x.movedim(axis, -1) @ matrix).movedim(-1, axis)
    return x
