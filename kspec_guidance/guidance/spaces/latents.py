"""Spaces of negligible cost: latents, clean or noisy, and their block means."""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance.features import RandomProjection
from kspec_guidance.guidance.spaces.base import FeatureSpace, Pullback
from kspec_guidance.guidance.spaces.resampling import block_mean_matrix, resample
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.utils.arguments import is_integer

__all__ = ["Latents", "Pooled", "X0"]

COLUMNS = 16


@dataclass(frozen=True)
class X0(FeatureSpace):
    """The clean prediction."""

    name: ClassVar[str] = "x0"
    direct: ClassVar[bool] = True

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        return x.flatten(1), lambda g: g.view(x.shape)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[1:])

    def final(self, x: Tensor, call: CallContext) -> Tensor:
        return x


@dataclass(frozen=True)
class Latents(X0):
    """The noisy sample, moved after the step as in the papers, or before it as in the code of SPARKE.

    Args:
        before: compare and move the sample before the step; the model output stays that of the sample as it was.
        as_compared: store in the memory what was compared at the last step, without its move: with ``before`` the noisy
            sample that the last step starts from. By default the finished sample is stored.
    """

    before: bool = False
    as_compared: bool = False
    name: ClassVar[str] = "latents"
    noisy: ClassVar[bool] = True

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "before": self.before, "as_compared": self.as_compared}


@lru_cache(maxsize=4)
def _projection(input_dim: int, output_dim: int, seed: int, device: torch.device) -> Tensor:
    """The matrix ``[input_dim, output_dim]`` of a projection, in memory column by column: the order of both products."""
    with torch.inference_mode(False):
        return RandomProjection(input_dim, output_dim, seed).matrix.mT.contiguous().to(device).mT


def _parts(rows: Tensor, matrix: Tensor) -> list[Tensor]:
    """The columns of a projection that are multiplied at once: a few on a CPU, whose BLAS is slow for few rows."""
    return list(matrix.split(matrix.shape[1] if len(rows) == 1 or rows.device.type != "cpu" else COLUMNS, 1))


def _projected(x: Tensor, matrix: Tensor) -> Tensor:
    """``x @ matrix``."""
    return torch.cat([x @ columns for columns in _parts(x, matrix)], 1)


def _projected_back(g: Tensor, matrix: Tensor) -> Tensor:
    """``g @ matrix.mT``."""
    parts, found = _parts(g, matrix), None
    for part, columns in zip(g.split([columns.shape[1] for columns in parts], 1), parts, strict=True):
        found = part @ columns.mT if found is None else found.addmm_(part, columns.mT)
    assert found is not None
    return found


@dataclass(frozen=True)
class Pooled(FeatureSpace):
    """Block means of the clean prediction, or a random projection of it: low dimension, suitable for wide kernels.

    Images and clips are averaged to ``grid`` blocks per axis (for clips also in time); sequences to ``grid ** 2`` blocks
    along the longer axis, which for packed tokens is the raster order of the image.

    Args:
        grid: number of blocks per axis.
        project: width of a random projection in place of block means.
        seed: seed of the projection.
    """

    grid: int = 4
    project: int | None = None
    seed: int = 0
    name: ClassVar[str] = "pooled"

    def __post_init__(self) -> None:
        for name, value in (("grid", self.grid), ("project", self.project)):
            if value is not None and not is_integer(value, 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
            if value is not None:
                object.__setattr__(self, name, int(value))  # one of numpy could not be saved

    @property
    def label(self) -> str:
        return self.name if self.project is None else f"{self.name}(project={self.project}, seed={self.seed})"

    def _linear(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        """A view of ``x``, and the matrices by which its last axes are multiplied."""
        if x.ndim not in (3, 4, 5) or self.project is not None:
            x = x.flatten(1)
            if self.project is None or self.project >= x.shape[1]:
                return x, []
            return x, [_projection(x.shape[1], self.project, self.seed, x.device)]
        if x.ndim == 3:
            x = x.mT if x.shape[1] > x.shape[2] else x  # positions last
            return x, [block_mean_matrix(x.shape[2], min(self.grid**2, x.shape[2]), x.device)]
        return x, [block_mean_matrix(s, min(self.grid, s), x.device) for s in x.shape[2:]]

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        samples, matrices = self._linear(x)
        projected = self.project is not None and matrices
        means = _projected(samples.float(), matrices[0]) if projected else resample(samples.float(), matrices)

        def pullback(g: Tensor) -> Tensor:
            if projected:
                return _projected_back(g.float(), matrices[0]).view(x.shape)
            d = resample(g.float().view(means.shape), [m.mT for m in matrices])
            return d.view(x.shape) if d.ndim != x.ndim else d.mT if samples.shape != x.shape else d

        return means.flatten(1), pullback

    def shape(self, x: Tensor) -> tuple[int, ...]:
        samples, matrices = self._linear(x[:1])
        before, after = (math.prod(m.shape[k] for m in matrices) for k in (0, 1))
        return (samples.numel() // before * after,)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "grid": self.grid, "project": self.project, "seed": self.seed}
