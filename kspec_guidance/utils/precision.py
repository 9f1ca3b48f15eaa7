"""Matrix products in full precision, whatever the caller has set for its networks."""

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

__all__ = ["full_precision"]

_lock = threading.Lock()
_depth = 0
_restore: list[str] | None = None


def full_precision(device: torch.device) -> AbstractContextManager[None]:
    """A context in which float32 products on this device are float32: without ``torch.autocast``, TF32 or bfloat16.

    Distances of near rows are small differences of large products, so reduced precision would make them noise. The
    settings of products are global: while one thread is in this context, all threads compute in full precision.
    """
    autocast = torch.is_autocast_enabled(device.type)
    if not autocast and not _depth and _reduced() is None:
        return nullcontext()
    return _full_precision(device.type)


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    global _depth, _restore
    with _lock:
        if not _depth:
            _restore = _reduced()
            if _restore is not None:
                _set(["highest"] if len(_restore) == 1 else ["ieee", "ieee"])
        _depth += 1
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        with _lock:
            _depth -= 1
            if not _depth and _restore is not None:
                _set(_restore)
                _restore = None


def _reduced() -> list[str] | None:
    """The settings that reduce the precision of products: one for all backends, or those of two; None if there are none."""
    try:
        found = torch.get_float32_matmul_precision()
    except RuntimeError:  # settings of torch 2.9 per backend are in use, and the two kinds must not be mixed
        return [products.fp32_precision for products in _per_backend()]
    return None if found == "highest" else [found]


def _set(values: list[str]) -> None:
    if len(values) == 1:
        torch.set_float32_matmul_precision(values[0])
    else:
        for products, value in zip(_per_backend(), values, strict=True):
            products.fp32_precision = value


def _per_backend() -> list[Any]:
    return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
