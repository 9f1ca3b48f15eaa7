"""Spaces of negligible cost: latents, clean or noisy, and their block means."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as nnf

from kspec_guidance.features import RandomProjection
from kspec_guidance.guidance.spaces.base import FeatureSpace, Pullback, by_autograd
from kspec_guidance.loop.context import CallContext, DenoiserCall

__all__ = ["Latents", "Pooled", "X0"]


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
    """The noisy sample, moved after the step as in the papers."""

    name: ClassVar[str] = "latents"
    noisy: ClassVar[bool] = True


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
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")

    def _map(self, x: Tensor) -> Tensor:
        if self.project is not None or x.ndim not in (3, 4, 5):
            rows = x.flatten(1)
            if self.project is None or self.project >= rows.shape[1]:
                return rows
            return RandomProjection(rows.shape[1], self.project, self.seed)(rows)
        if x.ndim == 3:
            x = x.mT if x.shape[1] > x.shape[2] else x
            return nnf.adaptive_avg_pool1d(x, min(self.grid**2, x.shape[2]))
        size: Any = tuple(min(self.grid, s) for s in x.shape[2:])
        return nnf.adaptive_avg_pool2d(x, size) if x.ndim == 4 else nnf.adaptive_avg_pool3d(x, size)

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        return by_autograd(self._map, x)

    def shape(self, x: Tensor) -> tuple[int, ...]:
        return (self._map(torch.zeros_like(x[:1])).numel(),)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "grid": self.grid, "project": self.project, "seed": self.seed}
