"""Device and dtype in which a module computes, with hooks of accelerate and diffusers that move or cast its weights."""

import itertools
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["accelerate_hooks", "compute_dtype", "diffusers_hooks", "execution_device", "stored_weights"]


def diffusers_hooks(module: nn.Module) -> list[Any]:
    """The hooks of diffusers on one module, without its submodules: caches, layerwise casting, group offloading."""
    registry = getattr(module, "_diffusers_hook", None)
    return [] if registry is None else list(registry.hooks.values())


def accelerate_hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate on one module: ``enable_model_cpu_offload``, ``enable_sequential_cpu_offload``."""
    hook = getattr(module, "_hf_hook", None)
    return [] if hook is None else list(getattr(hook, "hooks", [hook]))


def stored_weights(module: nn.Module) -> dict[str, Tensor]:
    """``module.state_dict()``, also if ``enable_sequential_cpu_offload`` keeps the weights in its hooks."""
    state = dict(module.state_dict())
    for name, part in module.named_modules():
        for hook in accelerate_hooks(part):
            for key in {*part._parameters, *part._buffers}:
                full = f"{name}.{key}" if name else key
                if full in state and state[full].is_meta and getattr(hook, "weights_map", None) is not None:
                    state[full] = hook.weights_map[key]
    return state


def execution_device(module: Any, default: torch.device) -> torch.device:
    """Device on which a component computes: that of its offloading hooks, else that of its weights.

    Args:
        module: the component.
        default: for callables that are not modules, and modules without weights.
    """
    if not isinstance(module, nn.Module):
        return default
    for part in module.modules():
        for hook in accelerate_hooks(part):
            if getattr(hook, "execution_device", None) is not None:
                return torch.device(hook.execution_device)
        for hook in diffusers_hooks(part):
            if hasattr(hook, "group"):  # enable_group_offload
                return torch.device(hook.group.onload_device)
    weights = next(itertools.chain(module.parameters(), module.buffers()), None)
    return default if weights is None else weights.device


def compute_dtype(module: Any, default: torch.dtype) -> torch.dtype:
    """Floating-point dtype in which a component computes; with layerwise casting its weights have another.

    Args:
        module: the component.
        default: for callables that are not modules, and modules without weights.
    """
    if not isinstance(module, nn.Module):
        return default
    for part in module.modules():
        for hook in diffusers_hooks(part):
            if hasattr(hook, "compute_dtype"):
                return hook.compute_dtype
    dtype = getattr(module, "dtype", None)
    if isinstance(dtype, torch.dtype) and dtype.is_floating_point:
        return dtype
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), default)
