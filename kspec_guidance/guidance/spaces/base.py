"""FeatureSpace: feature rows of samples, and the pullback of gradients in them."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance.loop.context import CallContext, DenoiserCall

__all__ = ["FeatureSpace", "Pullback", "by_autograd"]

Pullback = Callable[[Tensor], Tensor]


def by_autograd(f: Callable[[Tensor], Tensor], x: Tensor, chunk: int | None = None) -> tuple[Tensor, Pullback]:
    """Rows ``f(x)`` ``[n, d]`` and the pullback of a gradient in them, ``chunk`` samples at a time.

    The pullback evaluates ``f`` again, so that at most the graph of one chunk is in memory.
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
    """Base class: a space in which samples are compared.

    Attributes:
        name: name in guides and settings.
        direct: whether the features are the flattened samples.
        noisy: whether moves apply to the noisy sample after the step, rather than to the clean prediction before it.
        step_by_step: whether features of different steps are not comparable, so that the memory stores one row of features
            per guided step.
        needs_denoiser_call: whether the space uses the arguments of the denoiser's call.
    """

    name: ClassVar[str] = ""
    direct: ClassVar[bool] = False
    noisy: ClassVar[bool] = False
    step_by_step: ClassVar[bool] = False
    needs_denoiser_call: ClassVar[bool] = False

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        """Feature rows ``[n, d]`` of packed samples ``[n, ...]``, and the pullback of a gradient in them.

        Args:
            x: samples.
            call: the current pipeline call.
            denoiser_call: the denoiser's first call at this step, if the space needs it.
        """
        raise NotImplementedError

    def shape(self, x: Tensor) -> tuple[int, ...] | None:
        """Shape of one sample's features; None if it is unknown before they are computed."""
        return None

    def final(self, x: Tensor, call: CallContext) -> Tensor:
        """Features of finished samples ``[n, ...]``, for the memory."""
        return self.features(x, call)[0]

    def describe(self) -> dict[str, Any]:
        """Name and settings, ready for JSON.

        Raises:
            TypeError: for a space whose settings cannot be saved.
        """
        return {"name": self.name}
