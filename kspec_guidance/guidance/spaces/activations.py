"""Activations of the denoiser, at the cost of running its first half again."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from kspec_guidance.guidance.spaces.base import FeatureSpace, Pullback, by_autograd
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.utils.placement import accelerate_hooks, diffusers_hooks

__all__ = ["Activations"]


class _Reached(Exception):
    """Stops the denoiser once its features are read."""


def middle_of(denoiser: nn.Module) -> nn.Module:
    """The middle block: ``mid_block`` of a UNet, else the middle of the longest list of blocks.

    Raises:
        ValueError: for a network with neither.
    """
    block = getattr(denoiser, "mid_block", None)
    if isinstance(block, nn.Module):
        return block
    lists = [m for m in denoiser.children() if isinstance(m, nn.ModuleList) and len(m)]
    if not lists:
        raise ValueError(f"no middle block found in {type(denoiser).__name__}; name one: Activations(module='blocks.3')")
    longest = max(lists, key=len)
    return longest[len(longest) // 2]


def _largest(output: Any) -> Tensor:
    found = [o for o in (output if isinstance(output, tuple | list) else [output]) if isinstance(o, Tensor)]
    return max(found, key=Tensor.numel)


def wanted_rows(arguments: dict[str, Any], n: int) -> dict[str, Any]:
    """The arguments of a denoiser's call for its last ``n`` rows: with classifier-free guidance the conditional half."""
    rows = next((len(v) for v in arguments.values() if isinstance(v, Tensor) and v.ndim > 1), n)

    def cut(v: Any) -> Any:
        if isinstance(v, Tensor) and v.ndim and len(v) == rows and rows > n:
            return v[rows - n :]
        if isinstance(v, dict):
            return {k: cut(w) for k, w in v.items()}
        if isinstance(v, tuple | list) and v and all(isinstance(w, Tensor) for w in v):
            return type(v)(cut(w) for w in v)
        return v

    return {k: cut(v) for k, v in arguments.items()}


def check_stateless(denoiser: nn.Module, why: str) -> None:
    """Check that the denoiser keeps no state from one call to the next; ``why`` says what its cache would do.

    Raises:
        ValueError: if it does.
    """
    found = {type(h).__name__ for part in denoiser.modules() for h in diffusers_hooks(part) if h._is_stateful}
    if found:
        raise ValueError(
            f"{why} (here {', '.join(sorted(found))}); call denoiser.disable_cache(), or choose another space, such as "
            "'x0' or 'pooled'"
        )


def check_whole(denoiser: nn.Module, space: str) -> None:
    """Check that this process holds the whole denoiser.

    Raises:
        ValueError: if it does not.
    """
    if getattr(denoiser, "_parallel_config", None) is not None:
        raise ValueError(
            f"space={space!r} needs all tokens in one process, and enable_parallelism has split the denoiser; choose "
            "another space, such as 'x0' or 'pooled'"
        )


def _offload(denoiser: nn.Module) -> None:
    """Offload the weights that a forward pass loaded but, being stopped, did not offload."""
    for part in denoiser.modules():
        for hook in accelerate_hooks(part):
            if getattr(hook, "offload", False) and not all(p.is_meta for p in part.parameters(recurse=False)):
                hook.post_forward(part, None)  # of enable_sequential_cpu_offload
        for hook in diffusers_hooks(part):
            if hasattr(hook, "group") and hook.group.offload_leader is part:  # of enable_group_offload
                hook.group.offload_()


@dataclass(frozen=True)
class Activations(FeatureSpace):
    """Means over positions of a middle block of the denoiser (arXiv 2606.27371).

    The denoiser runs again up to that block, with gradients, on the conditional half of its first call at this step.
    Features at different noise levels are not comparable, so the memory stores one row of features per guided step, and
    compares only rows of the same step; a run that ends before its last guided step is not added to the memory.

    Args:
        module: name of the block in the denoiser, such as ``mid_block`` or ``transformer_blocks.9``; None for the middle
            block.
    """

    module: str | None = None
    name: ClassVar[str] = "activations"
    step_by_step: ClassVar[bool] = True
    needs_denoiser_call: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.name}({self.module or 'middle'})"

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        if denoiser_call is None:
            raise ValueError(
                "space='activations' needs the arguments of the denoiser: attach the guide to a pipeline with a denoiser"
            )
        denoiser = getattr(denoiser_call.module, "_orig_mod", denoiser_call.module)
        check_stateless(denoiser, "space='activations' runs the denoiser twice a step, and its cache would count two steps")
        check_whole(denoiser, self.name)
        block = denoiser.get_submodule(self.module) if self.module else middle_of(denoiser)
        arguments = wanted_rows(denoiser_call.arguments, len(x))
        name = next(k for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim > 1)

        def until_block(leaf: Tensor) -> Tensor:
            outputs: list[Tensor] = []

            def stop(module: nn.Module, args: Any, output: Any) -> None:
                outputs.append(_largest(output))
                raise _Reached

            handle = block.register_forward_hook(stop)
            try:
                denoiser.forward(**{**arguments, name: leaf})
            except _Reached:
                pass
            finally:
                handle.remove()
                _offload(denoiser)
            return outputs[0]

        def means(y: Tensor) -> Tensor:
            y = y.view(len(x), -1, *y.shape[1:]) if len(y) != len(x) else y
            return y.mean(1) if y.ndim == 3 else y.flatten(2).mean(2)  # of tokens, or of positions

        rows, pullback = by_autograd(until_block, arguments[name], means, modules=[denoiser])

        def to_x(g: Tensor) -> Tensor:
            d = pullback(g).float()
            if d.ndim != x.ndim:
                return d.flatten(1)[:, : x[0].numel()].view(x.shape)
            return d[tuple(slice(0, s) for s in x.shape)]  # without the channels or tokens of a condition

        return rows, to_x

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "module": self.module}
