"""Digests of tensors and weights."""

import hashlib
from typing import Any

import torch
from torch import nn

__all__ = ["fingerprint"]


def fingerprint(module: Any) -> str:
    """A short name for a text encoder: its class, width, and a hash of some of its weights."""
    digest = hashlib.sha256(type(module).__name__.encode())
    if isinstance(module, nn.Module):
        parameters = list(module.named_parameters())
        for name, p in [parameters[0], parameters[len(parameters) // 2], parameters[-1]] if parameters else []:
            digest.update(f"{name}{list(p.shape)}".encode())
            if p.device.type != "meta":
                # rounded, so that the same weights in half precision are the same encoder
                sample = p.detach().flatten()[:256].to("cpu", torch.float32)
                digest.update((sample * 64).round().to(torch.int32).numpy().tobytes())
    return f"{type(module).__name__}-{digest.hexdigest()[:12]}"
