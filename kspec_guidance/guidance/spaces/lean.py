"""Operations of networks with constant weights whose backward pass keeps less than that of torch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.nn import grad as nng

__all__ = ["lean_call"]

CONVOLUTIONS = {
    torch.conv1d: nng.conv1d_input,
    torch.conv2d: nng.conv2d_input,
    torch.conv3d: nng.conv3d_input,
}


class _Convolution(torch.autograd.Function):
    """A convolution that keeps its weight; that of torch keeps its input too, for the gradient of the weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, convolution: Callable[..., Tensor], weight: Tensor, *settings: Any) -> Tensor:
        ctx.convolution, ctx.weight, ctx.shape, ctx.settings = convolution, weight, x.shape, settings[1:]
        return convolution(x, weight, *settings)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        d = CONVOLUTIONS[ctx.convolution](ctx.shape, ctx.weight, g, *ctx.settings)
        return d, *[None] * (3 + len(ctx.settings))


class _SiLUOfNorm(torch.autograd.Function):
    """SiLU of a group norm, which the backward pass computes again from the input of the norm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, normed: Tensor, settings: tuple[Any, ...]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.settings = settings
        return nnf.silu(normed)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None]:
        with torch.enable_grad():
            x = ctx.saved_tensors[0].detach().requires_grad_()
            y = nnf.silu(torch.group_norm(x, *ctx.settings))
        return torch.autograd.grad(y, x, g)[0], None, None


def lean_call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """The result of ``func(*args, **kwargs)``, with a smaller graph; None if there is none for this call.

    Of a decoder's convolutions, group norms and activations, torch keeps the input of each for the backward pass. With
    constant weights the inputs of the norms suffice: a third of it, for the time of the norms. Gradients are the same.
    """
    x = args[0] if args else None
    if not isinstance(x, Tensor) or not x.requires_grad or torch.is_autocast_enabled(x.device.type):
        return None
    if func in CONVOLUTIONS:
        weight, *settings = _convolution(*args[1:], **kwargs)
        constant = not any(isinstance(w, Tensor) and w.requires_grad for w in (weight, settings[0]))
        return _Convolution.apply(x, func, weight, *settings) if constant and not isinstance(settings[2], str) else None
    if func is nnf.group_norm:
        of_norm = _group_norm(*args[1:], **kwargs)
        out = torch.group_norm(x, *of_norm)
        out._norm_of = x, of_norm  # type: ignore[attr-defined]
        return out
    if func is nnf.silu and hasattr(x, "_norm_of") and not any(args[1:]) and not any(kwargs.values()):
        before, of_norm = x._norm_of
        return _SiLUOfNorm.apply(before, x.detach(), of_norm)
    return None


def _convolution(
    weight: Any, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> tuple[Any, ...]:
    return weight, bias, stride, padding, dilation, groups


def _group_norm(num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5) -> tuple[Any, ...]:
    return num_groups, weight, bias, eps
