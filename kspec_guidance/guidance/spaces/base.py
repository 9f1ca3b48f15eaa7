"""FeatureSpace: feature rows of samples, and the pull-back of a gradient in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance.loop.context import CallContext, DenoiserCall

__all__ = ["FeatureSpace", "Pullback", "by_autograd"]

Pullback = Callable[[Tensor], Tensor]


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None = None) -> tuple[Tensor, Pullback]:
    """Rows ``f(x)`` ``[n, d]`` and the map from a gradient in them to one in ``x``, ``chunk`` samples at a time.

    Nothing is kept between the two: each chunk runs again when its gradient is asked for, so that the graph of one chunk
    is all that is ever held.
    """
    parts = x.detach().split(chunk or len(x))
    with torch.no_grad():
        rows = torch.cat([f(p).flatten(1).float() for p in parts])

    def pullback(g: Tensor) -> Tensor:
        out = []
        for part, cotangent in zip(parts, g.split(chunk or len(x)), strict=True):
            with torch.enable_grad():
                leaf = part.clone().requires_grad_()
                y = f(leaf).flatten(1)
                (d,) = torch.autograd.grad(y, leaf, cotangent.to(y))
            out.append(d)
        return torch.cat(out)

    return rows, pullback


@dataclass(frozen=True)
class FeatureSpace:
    """Base class: where samples are compared.

    Attributes:
        name: by which guides and settings know it.
        direct: whether samples are their own features, flattened.
        noisy: whether it moves the noisy sample after the step, rather than the clean prediction before it.
        step_by_step: whether features of different steps cannot be compared, so that the memory keeps one row of features
            for each guided step.
        needs_denoiser_call: whether it uses the arguments of the denoiser's call.
    """

    name: ClassVar[str] = ""
    direct: ClassVar[bool] = False
    noisy: ClassVar[bool] = False
    step_by_step: ClassVar[bool] = False
    needs_denoiser_call: ClassVar[bool] = False

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        """Feature rows ``[n, d]`` of packed samples ``[n, ...]``, and the pull-back of a gradient in them.

        Args:
            x: samples.
            call: the pipeline call at hand.
            denoiser_call: the denoiser's first call at this step, where the space needs it.
        """
        raise NotImplementedError

    def shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Shape of one sample's features; None where it is not known before they are formed."""
        return None

    def final(self, x: Tensor, call: CallContext) -> Tensor:
        """What the memory keeps of finished samples ``[n, ...]``."""
        return self.features(x, call)[0]

    def describe(self) -> dict[str, Any]:
        """Name and settings, ready for JSON.

        Raises:
            TypeError: for a space whose settings cannot be written.
        """
        return {"name": self.name}
