"""What a call of a pipeline begins from: the noises, where they can be read and replaced.

This file relies on two facts of diffusers: a modular pipeline runs its ``_blocks``, and a loop of blocks reads what it
begins from with ``get_block_state``.
"""

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.modular_pipelines import LoopSequentialPipelineBlocks
from torch import Tensor

from kspec_guidance.loop.scheduler_hook import Function, MethodPatch

__all__ = ["denoising_loops", "has_starts", "patch_starts"]


def denoising_loops(blocks: Any) -> tuple[list[Any], list[Any]]:
    """All loops in modular blocks, and those of them that go over the steps of the scheduler in blocks of their own."""
    inner = list(getattr(blocks, "sub_blocks", {}).values())
    if isinstance(blocks, LoopSequentialPipelineBlocks):
        found = [blocks]
    else:
        found = [loop for block in inner for loop in denoising_loops(block)[0]]
    return found, [loop for loop in found if _takes_steps(loop)]


def _takes_steps(loop: Any) -> bool:
    """Whether the blocks of a loop take an index and a timestep."""
    calls = [inspect.signature(block.__call__).parameters for block in loop.sub_blocks.values()]
    return all({"i", "t"} <= parameters.keys() for parameters in calls)


def _owners(pipe: Any) -> list[tuple[Any, str]]:
    """Objects and their methods through which the noises pass."""
    if callable(getattr(pipe, "prepare_latents", None)):
        return [(pipe, "prepare_latents")]
    return [(loop, "get_block_state") for loop in denoising_loops(getattr(pipe, "_blocks", None))[1]]


def has_starts(pipe: Any) -> bool:
    """Whether :func:`patch_starts` finds the noises of a pipeline."""
    return bool(_owners(pipe))


def patch_starts(pipe: Any, change: Callable[[Any], Any], tag: Any) -> list[MethodPatch]:
    """Replace what the next call of a pipeline begins from.

    Args:
        pipe: a pipeline with ``prepare_latents``, or a modular one whose steps are blocks of a loop.
        change: gets what ``prepare_latents`` returns, or the tensors at the first loop of a modular pipeline by name, and
            returns their replacement.
        tag: see :class:`MethodPatch`.

    Returns:
        Patches to be removed after the call.
    """
    begun: list[bool] = []  # whether a loop has: later ones continue from its result

    def around_latents(original: Function) -> Function:
        return lambda *args, **kwargs: change(original(*args, **kwargs))

    def around_loop(original: Function) -> Function:
        def get_block_state(state: Any) -> Any:
            if not begun:
                begun.append(True)
                state.values.update(change({k: v for k, v in state.values.items() if _tensors(v)}))
            return original(state)

        return get_block_state

    patches: list[MethodPatch] = []
    for owner, name in _owners(pipe):
        patches.append(MethodPatch(owner, name, around_latents if name == "prepare_latents" else around_loop, tag))
    return patches


def _tensors(value: Any) -> bool:
    """Whether a value is a tensor, or a list or tuple of them."""
    parts = value if isinstance(value, list | tuple) else [value]
    return bool(parts) and all(isinstance(part, Tensor) for part in parts)
