"""Nested values with tensors as JSON, bit for bit: for small states that are kept in one file or message."""

import base64
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["from_json", "to_json"]

KEYS = {"shape", "dtype", "data"}  # of a tensor


def to_json(value: Any) -> Any:
    """The value with each tensor as its shape, dtype, and base64 of its bytes in little-endian order.

    >>> to_json({"x": torch.zeros(1)})
    {'x': {'shape': [1], 'dtype': 'float32', 'data': 'AAAAAA=='}}
    """
    if isinstance(value, Tensor):
        x = value.detach().cpu().contiguous().numpy()
        data = x.astype(x.dtype.newbyteorder("<"), copy=False).tobytes()
        return {"shape": list(x.shape), "dtype": str(x.dtype), "data": base64.b64encode(data).decode()}
    if isinstance(value, Mapping):
        return {k: to_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [to_json(v) for v in value]
    return value


def from_json(value: Any) -> Any:
    """The inverse of :func:`to_json`, with lists in place of tuples."""
    if isinstance(value, Mapping):
        if set(value) != KEYS:
            return {k: from_json(v) for k, v in value.items()}
        dtype = np.dtype(value["dtype"]).newbyteorder("<")
        found = np.frombuffer(base64.b64decode(value["data"]), dtype=dtype)
        return torch.from_numpy(found.astype(dtype.newbyteorder("="))).reshape(value["shape"])
    if isinstance(value, list):
        return [from_json(v) for v in value]
    return value
