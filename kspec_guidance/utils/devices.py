"""Devices: copies between them, their free memory, and tensors that are usable in and out of inference mode."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

__all__ = ["free_bytes", "normal", "normal_tensors", "resolve_device", "send", "transfer"]


def transfer(x: Tensor, like: Tensor) -> Tensor:
    """``x`` in the dtype and on the device of ``like``; the smaller of both dtypes is copied between the devices.

    So half precision is widened, and float64 is narrowed, where it was: some devices (MPS) have no float64.
    """
    if x.dtype.itemsize > like.dtype.itemsize:
        x = x.to(like.dtype)
    return send(x, like.device).to(like.dtype)


def send(x: Tensor, device: torch.device) -> Tensor:
    """``x`` on another device. The host does not wait until CUDA has done its earlier work.

    ``x`` may be changed or freed afterwards, as buffers of rows are. This relies on how CUDA copies pageable memory: a call
    returns when the bytes are in the driver's staging buffers, and waits for these if it must. A copy from pinned memory
    reads it later, so that one blocks.
    """
    return x.to(device, non_blocking=x.device.type == "cpu" and device.type == "cuda" and not x.is_pinned())


@contextmanager
def normal_tensors() -> Iterator[None]:
    """Context (or decorator) without gradients, whose tensors can be changed in place and saved for backward later.

    Tensors that are made in ``torch.inference_mode()`` can be neither.
    """
    with torch.inference_mode(False), torch.no_grad():
        yield


def normal(x: Tensor) -> Tensor:
    """``x``, or a copy that is usable outside inference mode if ``x`` is not."""
    if not x.is_inference():
        return x
    with normal_tensors():
        return x.clone()


def resolve_device(device: torch.device | str) -> torch.device:
    """The device with its index, such as ``cuda:0`` for ``cuda``, as tensors report it.

    Raises:
        ValueError: for a device that is not available, or that stores no values (meta).
    """
    try:
        found = torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as error:
        raise ValueError(f"device {str(device)!r} is not available here: {str(error).splitlines()[0]}") from error
    if found.type == "meta":
        raise ValueError("tensors on the device 'meta' have no values; use a device such as 'cpu' or 'cuda'")
    return found


def free_bytes(device: torch.device) -> int | None:
    """Bytes that new tensors can take on a device, including those that PyTorch has reserved; None if unknown."""
    module = getattr(torch, device.type)
    if not hasattr(module, "mem_get_info") or not module.is_available():
        return None
    reserved = module.memory_reserved(device) - module.memory_allocated(device)
    return module.mem_get_info(device)[0] + reserved
