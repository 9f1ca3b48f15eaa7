"""FeatureSpace: feature rows of samples, and the pullback of gradients in them."""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge
from torch.overrides import TorchFunctionMode

from kspec_guidance.guidance.spaces.lean import lean_call
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.loop.context import CallContext, DenoiserCall

__all__ = ["FeatureSpace", "Pullback", "by_autograd", "constant_weights", "evaluate"]

Pullback = Callable[[Tensor], Tensor]


def _constant(x: Any) -> Any:
    if isinstance(x, Tensor):
        return x.clone() if x.is_inference() else x.detach() if isinstance(x, nn.Parameter) else x
    return type(x)(map(_constant, x)) if type(x) in (tuple, list) else x


class _ConstantWeights(TorchFunctionMode):
    """Operations take parameters, and tensors of inference mode, as constants."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        if name in ("__get__", "__set__"):  # attributes, such as the ``data`` that offloading replaces
            return func(*args, **kwargs)
        if name == "to":  # offloading relies on parameters that remain parameters where nothing is moved
            out = func(*args, **kwargs)
            return out.detach() if isinstance(args[0], nn.Parameter) and out is not args[0] else out
        in_place = name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__"))
        kept = {"out": kwargs["out"]} if "out" in kwargs else {}
        first, rest = (args[:1], args[1:]) if in_place else ((), args)
        rest, kwargs = tuple(map(_constant, rest)), {k: _constant(v) for k, v in kwargs.items()} | kept
        found = None if in_place or kept else lean_call(func, rest, kwargs)
        return func(*first, *rest, **kwargs) if found is None else found


def _is_compiled(module: Any) -> bool:
    parts = module.modules() if isinstance(module, nn.Module) else ()
    return any(p._compiled_call_impl is not None or hasattr(p, "_orig_mod") for p in parts) or any(
        hasattr(v, "_torchdynamo_orig_callable") for v in (module, *getattr(module, "__dict__", {}).values())
    )  # Module.compile(), torch.compile(module), and compiled functions and methods


class _ForceEager:
    """Compiled code runs uncompiled. The setting of torch is one for all threads, so the last to leave resets it."""

    def __init__(self) -> None:
        self.lock, self.users = threading.Lock(), 0
        self.stance: Any = None

    def __enter__(self) -> None:
        with self.lock:
            self.users += 1
            self.stance = self.stance or torch.compiler.set_stance("force_eager")

    def __exit__(self, *error: Any) -> None:
        with self.lock:
            self.users -= 1
            if not self.users:
                self.stance.__exit__(*error)
                self.stance = None


_force_eager = _ForceEager()


@contextmanager
def constant_weights() -> Iterator[None]:
    """Autograd with respect to the inputs of networks, also within ``torch.inference_mode``.

    Networks are not changed, so threads may share them. No operation saves its input for a gradient of weights, and group
    norms before activations are computed again, see :func:`~kspec_guidance.guidance.spaces.lean.lean_call`. Tensors that
    were created in inference mode can be saved for the backward pass, which uses the weights of the forward pass, although
    hooks of offloading have moved them away since.
    """
    with torch.inference_mode(False), torch.enable_grad(), _ConstantWeights():
        yield


def _normalised(x: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """``x`` with the largest absolute value of each of its ``n`` samples scaled to 1, and these values ``[n]``."""
    size = x.reshape(n, -1).abs().amax(1).clamp_min(torch.finfo(x.dtype).tiny)
    return (x.reshape(n, -1) / size[:, None]).view(x.shape), size


def _vjp(y: Tensor, x: Tensor, w: Tensor) -> Tensor:
    """Gradient ``[n, ...]`` of ``y * w`` in ``x``.

    Given tensors, ``torch.autograd.grad`` leaves the modes of torch functions during the backward pass; then gradient
    checkpointing would not compute the same operations again. Given edges of the graph it stays in them.
    """
    return torch.autograd.grad(get_gradient_edge(y), get_gradient_edge(x), w.to(y))[0]


def _eager(modules: Sequence[Any]) -> Any:
    """A context in which these modules run uncompiled, since gradients and hooks would compile them again."""
    compiled = hasattr(torch.compiler, "set_stance") and any(map(_is_compiled, modules))  # since torch 2.6
    return _force_eager if compiled else nullcontext()


def evaluate(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    head: Callable[[Tensor], Tensor] = lambda y: y,
    chunk: int | None = None,
    modules: Sequence[Any] = (),
) -> Tensor:
    """Rows ``head(network(x))`` ``[n, d]`` without a gradient; arguments as for :func:`by_autograd`."""
    with _eager(modules), torch.inference_mode(False), torch.no_grad():
        parts = x.detach().split(chunk or len(x))
        return torch.cat([head(as_float(network(p))).flatten(1).float().to(x.device) for p in parts])


class _Graph:
    """One evaluation ``head(network(x))`` of a chunk of samples with its graph; to be used in :func:`constant_weights`."""

    def __init__(self, network: Callable[[Tensor], Tensor], head: Callable[[Tensor], Tensor], x: Tensor):
        self.leaf = x.clone().requires_grad_()
        self.y = network(self.leaf)
        self.top = as_float(self.y.detach()).requires_grad_()
        self.features = head(self.top).flatten(1)

    def pullback(self, w: Tensor) -> Tensor:
        """Gradient in the samples ``[n, ...]`` of a gradient in the rows, in float32 at least; once."""
        w, size = _normalised(as_float(w), len(self.leaf))
        w, factor = _normalised(_vjp(self.features, self.top, w), len(self.leaf))
        d = as_float(_vjp(self.y, self.leaf, w))
        return d * (size * factor.to(size)).view(-1, *[1] * (d.ndim - 1))


def by_autograd(
    network: Callable[[Tensor], Tensor],
    x: Tensor,
    head: Callable[[Tensor], Tensor] = lambda y: y,
    chunk: int | None = None,
    modules: Sequence[Any] = (),
) -> tuple[Tensor, Pullback]:
    """Rows ``head(network(x))`` ``[n, d]`` and the pullback of a gradient in them, ``chunk`` samples at a time.

    At most the graph of one chunk is in memory: that of the last chunk is kept for the pullback, which evaluates the
    network again for the others. The network may compute in half precision and on another device; the head receives its
    output in float32. Gradients are scaled to 1 before they enter the network, since small values are zero in float16.

    Args:
        network: differentiable function of samples.
        x: samples ``[n, ...]``.
        head: differentiable function of the network's output, of rows ``[n, ...]``.
        chunk: number of samples at a time; None for all.
        modules: those that are called; they run uncompiled, since gradients and hooks would compile them again.
    """
    with torch.inference_mode(False):
        *others, last = parts = x.detach().split(chunk or len(x))
        rows = [evaluate(network, part, head, modules=modules) for part in others]
        with _eager(modules), constant_weights():
            kept = [_Graph(network, head, last)]
        found = torch.cat([*rows, kept[0].features.detach().float().to(x.device)])

    def pullback(g: Tensor) -> Tensor:
        weights, gradients = g.split(chunk or len(x)), []
        with _eager(modules), constant_weights():
            for part, w in zip(reversed(parts), reversed(weights), strict=True):
                gradients.append((kept.pop() if kept else _Graph(network, head, part)).pullback(w))
            return torch.cat(gradients[::-1])

    return found, pullback


@dataclass(frozen=True)
class FeatureSpace:
    """Base class: a space in which samples are compared.

    Attributes:
        name: name in guides and settings.
        direct: whether the features are the flattened samples.
        noisy: whether moves apply to the noisy sample, rather than to the clean prediction.
        step_by_step: whether features of different steps are not comparable, so that the memory stores one row of features
            per guided step.
        needs_denoiser_call: whether the space uses the arguments of the denoiser's call.
        inside: whether moves apply inside that call, to what a block of the denoiser returns.
    """

    name: ClassVar[str] = ""
    direct: ClassVar[bool] = False
    noisy: ClassVar[bool] = False
    step_by_step: ClassVar[bool] = False
    needs_denoiser_call: ClassVar[bool] = False
    inside: ClassVar[bool] = False

    @property
    def label(self) -> str:
        """The name, and in brackets what else decides the features: memories of two labels cannot be compared."""
        return self.name

    @property
    def before(self) -> bool:
        """Whether a noisy sample is compared and moved before the step, whose model output stays, rather than after it."""
        return False

    @property
    def as_compared(self) -> bool:
        """Whether the memory stores what was compared at the last step, rather than the finished sample."""
        return False

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
