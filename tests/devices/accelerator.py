"""An emulated accelerator: tensors with data of the CPU and a device of their own, which operations refuse to mix.

``with Accelerator():`` makes the device ``lazy`` usable: modules and tensors move to it and back by ``.to``, and an
operation on tensors of both devices raises as on a GPU. Of the device types without hardware on a test machine, ``lazy``
is one for which autograd runs in the calling thread.
"""

import types
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("lazy:0")
COPIES = {torch.ops.aten._to_copy, torch.ops.aten.copy_, torch.ops.aten.set_}


class OnAccelerator(Tensor):
    """A tensor on the emulated device; ``held`` has its data."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor, requires_grad: bool | None = None) -> Any:
        if requires_grad is not None:  # accelerate calls the class of an old parameter with a tensor of any device
            return torch.nn.Parameter(held, requires_grad)
        x = Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=DEVICE
        )
        x.held = held
        return x

    def __repr__(self) -> str:
        return f"OnAccelerator({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, classes: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    there = [isinstance(t, OnAccelerator) for t in given]
    if any(there) and func.overloadpacket not in COPIES:
        index = func.overloadpacket in (torch.ops.aten.index, torch.ops.aten.index_put_)
        if any(not on and t.ndim for t, on in zip(given[:1] if index else given, there, strict=False)):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but {func} was given tensors of cpu and lazy"
            )
    if "device" in kwargs and kwargs["device"] is not None:
        on = torch.device(kwargs["device"]).type == DEVICE.type
        kwargs = kwargs | {"device": torch.device("cpu") if on else kwargs["device"]}
    else:
        on = any(there)
    plain_args, plain_kwargs = tree_map(lambda t: t.held if isinstance(t, OnAccelerator) else t, (args, kwargs))
    out = func(*plain_args, **plain_kwargs)
    owners = {id(t.held): t for t in given if isinstance(t, OnAccelerator)}  # in-place operations return their argument
    owners |= {id(t): t for t in given}

    def wrapped(t: Any) -> Any:
        if not isinstance(t, Tensor) or id(t) in owners:
            return owners.get(id(t), t) if isinstance(t, Tensor) else t
        return OnAccelerator(t) if on else t

    return tree_map(wrapped, out)


class Accelerator(TorchDispatchMode):
    """Makes the device ``lazy`` usable."""

    def __enter__(self) -> Any:
        module = types.SimpleNamespace(empty_cache=lambda: None, current_device=lambda: 0, is_available=lambda: True)
        setattr(torch, DEVICE.type, module)  # as torch.cuda
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # ``data =`` would not replace ``held``
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        delattr(torch, DEVICE.type)
        torch.__future__.set_overwrite_module_params_on_conversion(False)

    def __torch_dispatch__(self, func: Any, classes: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})
