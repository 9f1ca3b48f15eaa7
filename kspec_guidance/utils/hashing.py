"""Digests of values, of tensors, and of the weights of a network."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.utils.placement import stored_weights

__all__ = ["fingerprint", "hash_json", "hash_tensors", "weights_fingerprint"]


def hash_json(value: Any, digits: int = 64) -> str:
    """SHA-256 of a value as JSON with sorted keys, in hexadecimal; other types are converted to strings."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:digits]


def hash_tensors(tensors: Mapping[str, Tensor], about: str = "", digits: int = 64) -> str:
    """SHA-256 of named tensors (names, types, shapes and bytes) and a text, in hexadecimal."""
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)  # without a copy
    return digest.hexdigest()[:digits]


def weights_fingerprint(network: Any) -> str:
    """Digest of all weights of a module, 12 hexadecimal digits; for other callables, of their name."""
    if isinstance(network, nn.Module):
        return hash_tensors(stored_weights(network), type(network).__qualname__, 12)
    return hash_json([getattr(network, "__module__", ""), getattr(network, "__qualname__", type(network).__qualname__)], 12)


def fingerprint(module: Any) -> str:
    """A short identifier of a network: its class, and a digest of the shapes and some values of three of its weights.

    Values are rounded, so that float32 and float16 weights of one network have the same identifier.
    """
    digest = hashlib.sha256(type(module).__name__.encode())
    if isinstance(module, nn.Module):
        parameters = list(module.named_parameters())
        for name, p in [parameters[0], parameters[len(parameters) // 2], parameters[-1]] if parameters else []:
            digest.update(f"{name}{list(p.shape)}".encode())
            if p.device.type != "meta":
                sample = p.detach().flatten()[:256].to("cpu", torch.float32)
                digest.update((sample * 64).round().to(torch.int32).numpy().tobytes())
    return f"{type(module).__name__}-{digest.hexdigest()[:12]}"
