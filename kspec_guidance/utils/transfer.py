"""Copies from an accelerator to the host.

Each copy waits until the device has finished all earlier work, so a guided step makes at most one.
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

__all__ = ["on_host", "read", "surely_none"]

_HOST_COPIES: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of tensors on an accelerator, each with its version


def on_host(values: Tensor) -> Tensor:
    """Values on the CPU, for reading only. A tensor on an accelerator is copied once, for all that ask until it changes.

    For what is constant in a run: the noise levels of a scheduler, which are replaced in each run, and prompt features.
    Changes in place are counted by torch, except of tensors made in ``torch.inference_mode()``.
    """
    if values.device.type == "cpu":
        return values.detach() if values.requires_grad else values
    found = _HOST_COPIES.get(values)
    version = 0 if values.is_inference() else values._version
    if found is None or found[0] != version:
        found = _HOST_COPIES[values] = version, values.detach().cpu()
    return found[1]


def read(*tensors: Tensor) -> list[Tensor]:
    """Small tensors as tensors on the CPU: those of an accelerator are copied in one transfer, as floating point.

    >>> [t.tolist() for t in read(torch.tensor([1.0, 2.0]), torch.tensor(True))]
    [[1.0, 2.0], True]
    """
    remote = [t for t in tensors if t.device.type != "cpu"]
    if not remote:
        return list(tensors)
    packed = torch.cat([t.detach().flatten() for t in remote]).cpu()  # in the dtype to which all can be promoted
    packed = packed.to(torch.promote_types(packed.dtype, torch.float32))
    copies = iter(packed.split([t.numel() for t in remote]))
    return [t if t.device.type == "cpu" else next(copies).view(t.shape) for t in tensors]


def surely_none(mask: Tensor) -> bool:
    """Whether no entry of a mask is true, if the host knows this without waiting; False for tensors on an accelerator.

    For work that may be skipped where the mask is empty, and changes nothing there.
    """
    return mask.device.type == "cpu" and not bool(mask.any())
