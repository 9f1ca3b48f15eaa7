"""FeatureSpace: feature rows of samples, and the way back of a gradient in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["FeatureSpace", "Pull", "Scene", "by_autograd"]

Pull = Callable[[Tensor], Tensor]


@dataclass
class Scene:
    """What a space may look at beside the prediction.

    ``pipe`` is None where a bare scheduler is guided; ``call`` is the denoiser with the arguments of its first call at this
    step, ``size`` the height and width asked for.
    """

    pipe: Any = None
    call: tuple[nn.Module, dict[str, Any]] | None = None
    size: tuple[int, int] | None = None


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None = None) -> tuple[Tensor, Pull]:
    """Rows ``f(x)`` ``[n, d]`` and the map from a gradient in them to one in ``x``, ``chunk`` samples at a time.

    Nothing is kept between the two: each chunk runs again when its gradient is asked for, so that the graph of one chunk
    is all that is ever held.
    """
    parts = x.detach().split(chunk or len(x))
    with torch.no_grad():
        rows = torch.cat([f(p).flatten(1).float() for p in parts])

    def pull(g: Tensor) -> Tensor:
        out = []
        for p, w in zip(parts, g.split(chunk or len(x)), strict=True):
            with torch.enable_grad():
                leaf = p.clone().requires_grad_()
                y = f(leaf).flatten(1)
                (d,) = torch.autograd.grad(y, leaf, w.to(y))
            out.append(d)
        return torch.cat(out)

    return rows, pull


@dataclass(frozen=True)
class FeatureSpace:
    """Base class. ``noisy`` spaces move the noisy sample after the step, the others the clean prediction before it."""

    name: ClassVar[str] = ""
    noisy: ClassVar[bool] = False

    def features(self, x: Tensor, scene: Scene) -> tuple[Tensor, Pull]:
        """Feature rows ``[n, d]`` of packed samples ``[n, ...]``, and the pull-back of a gradient."""
        raise NotImplementedError

    def shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Shape of one sample's features, where it is known without work."""
        return None

    def final(self, x: Tensor, scene: Scene) -> Tensor:
        """What the memory keeps of finished samples ``[n, ...]``."""
        return self.features(x, scene)[0]

    def describe(self) -> dict[str, Any]:
        """Name and settings, ready for JSON."""
        return {"name": self.name}
