"""Copies from an accelerator to the host.

Each copy waits until the device has finished all earlier work, so a guided step makes at most one.
"""

from functools import reduce

import torch
from torch import Tensor

__all__ = ["read", "surely_none"]


def read(*tensors: Tensor) -> list[Tensor]:
    """Small tensors as tensors on the CPU: those of an accelerator are copied in one transfer, as floating point.

    >>> [t.tolist() for t in read(torch.tensor([1.0, 2.0]), torch.tensor(True))]
    [[1.0, 2.0], True]
    """
    remote = [t for t in tensors if t.device.type != "cpu"]
    if not remote:
        return list(tensors)
    dtype = reduce(torch.promote_types, (t.dtype for t in remote), torch.float32)
    packed = torch.cat([t.detach().flatten().to(dtype) for t in remote]).cpu()
    copies = iter(packed.split([t.numel() for t in remote]))
    return [t if t.device.type == "cpu" else next(copies).view(t.shape) for t in tensors]


def surely_none(mask: Tensor) -> bool:
    """Whether no entry of a mask is true, if the host knows this without waiting; False for tensors on an accelerator.

    For work that may be skipped where the mask is empty, and changes nothing there.
    """
    return mask.device.type == "cpu" and not bool(mask.any())
