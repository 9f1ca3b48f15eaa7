"""A simulated accelerator: tensors that say ``cuda`` or ``mps``, hold their numbers on the CPU, and obey a device's rules.

Emulated: operations compute real numbers, so whole runs can be compared with runs on the CPU. Modules move to the device
and back, also by the hooks of accelerate and diffusers, and autograd works. As on a device, errors are raised for tensors
of two devices, for generators of another device, for float64 on MPS, and for operations without a deterministic
implementation. Copies to the host and other operations that wait for the device are counted, by their place in the package;
so are copies to CUDA that wait until it has done its earlier work, which are all that are not ``non_blocking``.

Not emulated: kernels, so neither their rounding nor which dtypes they accept; streams, time and free memory; autocast; two
devices at once. To the C++ side of torch a tensor is on ``lazy``, since it would ask a driver about any other device.
"""

import contextlib
import os
import traceback
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

import kspec_guidance

PACKAGE = os.path.dirname(kspec_guidance.__file__)
aten = torch.ops.aten
WAITING = {  # operations whose result, or its size, the host needs
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.equal.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten._unique2.default,
    aten.unique_dim.default,
    aten.repeat_interleave.Tensor,
    aten._linalg_eigh.default,
    aten._linalg_eigvals.default,
    aten._linalg_svd.default,
    aten.linalg_cholesky_ex.default,
    aten.linalg_qr.default,
}
INDEXING = {aten.index.Tensor, aten.index_put_.default, aten.index_put.default, aten._index_put_impl_.default}
SENDING = {aten.where.self, *INDEXING}  # they copy numbers and indices of the CPU to the device
COPIES = {aten._to_copy.default, aten.copy_.default, aten._copy_from.default, aten.copy.default}
NONDETERMINISTIC = {aten.cumsum.default, aten.cumsum_.default, aten._adaptive_avg_pool2d_backward.default}


class DeviceTensor(torch.Tensor):
    """A tensor of the simulated device; ``held`` has its numbers."""

    held: Tensor
    on: torch.device
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor, device: torch.device | None = None, requires_grad: bool = False) -> Any:
        if device is None:  # accelerate calls the class of an old parameter with a tensor of any device
            return torch.nn.Parameter(held, requires_grad)
        self = torch.Tensor._make_wrapper_subclass(
            cls,
            held.size(),
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device="lazy",
        )
        self.held, self.on = held, device
        return self

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self.on

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return self.on.type == "cuda"

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"can't convert {self.on} tensor to numpy")

    def __repr__(self, **kwargs: Any) -> str:
        return f"DeviceTensor({self.held!r}, device={self.device})"

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{function} on a tensor of a simulated device that is no longer active")


class Event:
    """Stands for an event of CUDA: any two are 2 ms apart."""

    def __init__(self, enable_timing: bool = False):
        pass

    def record(self, stream: Any) -> None:
        """Nothing is queued."""

    def synchronize(self) -> None:
        """Nothing is awaited."""

    def elapsed_time(self, end: "Event") -> float:
        return 2.0


class SimulatedDevice(TorchDispatchMode):
    """The mode under which the device exists.

    Args:
        kind: ``cuda``, or ``mps``, which has no float64.

    Attributes:
        reads: number of times the host waited for the device, by place in the package.
        paused: whether reads are not counted, as during the scheduler's own step.
    """

    def __init__(self, kind: str = "cuda"):
        super().__init__()
        self.device = torch.device(kind, 0)
        self.reads: Counter[str] = Counter()
        self.paused = 0
        self._restore = contextlib.ExitStack()
        if kind == "cuda":
            self._mode_key = torch._C._TorchDispatchModeKey.FAKE  # torch then leaves the driver alone

    def __enter__(self) -> "SimulatedDevice":
        lifted, overwrite = torch._C._only_lift_cpu_tensors(), torch.__future__.get_overwrite_module_params_on_conversion()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device=) copies through this mode
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # ``param.data =`` would not replace ``held``
        patches = pytest.MonkeyPatch()
        patches.setattr(torch.cuda, "Event", Event)
        patches.setattr(torch.cuda, "current_stream", lambda device: None)
        patches.setattr(torch.mps, "empty_cache", lambda: None)
        self._restore.callback(torch._C._set_only_lift_cpu_tensors, lifted)
        self._restore.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
        self._restore.callback(patches.undo)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._restore.close()

    @contextlib.contextmanager
    def not_counting(self):
        self.paused += 1
        try:
            yield
        finally:
            self.paused -= 1

    def to_host(self, x: Any) -> Any:
        """The numbers of a tensor, without a copy and uncounted, for assertions."""
        return x.held if isinstance(x, DeviceTensor) else x

    def _ours(self, device: Any) -> bool:
        return device is not None and torch.device(device).type in (self.device.type, "lazy")

    def _count(self, function: Any) -> None:
        if self.paused:
            return
        for frame in reversed(traceback.extract_stack()):
            if frame.filename.startswith(PACKAGE):
                place = f"{os.path.relpath(frame.filename, PACKAGE)}:{frame.lineno} {frame.line} [{function}]"
                self.reads[place] += 1
                return

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
        ours = [t for t in leaves if isinstance(t, DeviceTensor)]
        goes = kwargs.get("device")
        if not ours and not self._ours(goes):
            return function(*args, **kwargs)
        on_device = self._ours(goes) if goes is not None else bool(ours)
        if function in COPIES:
            if function in (aten.copy_.default, aten.copy.default):
                on_device = isinstance(args[0], DeviceTensor)
            source = args[0] if function is aten._to_copy.default else args[1]
            sent = on_device and not isinstance(source, DeviceTensor) and self.device.type == "cuda"
            blocking = not kwargs.get("non_blocking", len(args) > 2 and bool(args[2]))
            if (ours and not on_device) or (sent and blocking):
                self._count(function)
        else:
            others = [t for t in leaves if not isinstance(t, DeviceTensor) and t.ndim]
            if ours and others and function not in INDEXING:
                raise RuntimeError(
                    f"{function}: expected all tensors on the same device, found {self.device} and the CPU: "
                    f"{[list(t.shape) for t in others]}"
                )
            if function in INDEXING and not isinstance(args[0], DeviceTensor):
                raise RuntimeError(f"{function}: indices on {self.device} of a tensor on the CPU")
            masks = [t for t in ours[1:] if t.dtype in (torch.bool, torch.uint8)] if function in INDEXING else []
            sent = [t for t in leaves if not isinstance(t, DeviceTensor)] if ours and function in SENDING else []
            if function in WAITING or masks or sent:
                self._count(function)
            floating = bool(ours) and ours[0].is_floating_point()
            if function in NONDETERMINISTIC and floating and torch.are_deterministic_algorithms_enabled():
                raise RuntimeError(f"{function} has no deterministic implementation")
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type != self.device.type:
            raise RuntimeError(f"{function}: a generator of {generator.device} for {self.device}")
        held = tree_map(lambda t: t.held if isinstance(t, DeviceTensor) else t, (args, kwargs))
        if self._ours(goes):
            held[1]["device"] = torch.device("cpu")
        out = function(*held[0], **held[1])
        if function is aten._to_copy.default and on_device is not bool(ours) and out is args[0]:
            out = out.clone()
        if function is aten._local_scalar_dense.default or not on_device:
            return out
        out = tree_map(self._wrap, out)
        return return_and_correct_aliasing(function, args, kwargs, out)

    def _wrap(self, x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        if x.dtype == torch.float64 and self.device.type == "mps":
            raise TypeError("float64 does not exist on mps")
        return DeviceTensor(x, self.device)
