"""Digests of values, of tensors, and of the weights of a network."""

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.utils.placement import stored_weights

__all__ = [
    "fingerprint",
    "has_adapters",
    "hash_json",
    "hash_tensors",
    "same_network",
    "sampled_fingerprint",
    "state_fingerprint",
    "weights_fingerprint",
]

FINGERPRINT = re.compile(r"([^-(),]+)(?:-([0-9a-f]{12}))?(?:\(((?:[+-]\d+)+)\))?(.*)")
NUMBER = re.compile(r"[+-]\d+")


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


def has_adapters(module: Any) -> bool:
    """Whether parts of a module have adapters of peft, such as LoRAs, active or not."""
    if not isinstance(module, nn.Module):
        return False
    layers = [(part, kind) for part in module.modules() for kind in getattr(part, "adapter_layer_names", ())]
    return any(len(getattr(part, kind, ())) for part, kind in layers)


def state_fingerprint(module: nn.Module, values: int = 1024) -> str | None:
    """Digest of what decides the output of a module, quickly: some values of each weight, and settings of its parts.

    None if a weight cannot be read so, as some quantised ones, and those that offloading keeps elsewhere.

    Adapters that are merged change most values of a weight a little; others are weights of their own, and their strengths,
    and whether they are active, are settings.

    Args:
        module: the module; a compiled one counts as what it was made from.
        values: largest number of values of a weight that are read, evenly spaced.
    """
    module = getattr(module, "_orig_mod", module)
    settings = []
    for name, part in module.named_modules():
        public = {k: v for k, v in vars(part).items() if not k.startswith("_")}
        adapters = {k: getattr(part, k, None) for k in ("active_adapters", "disable_adapters")}
        settings.append([name, {k: v for k, v in {**public, **adapters}.items() if _is_plain(v)}])
    return sampled_fingerprint(module, values, hash_json(settings))


def sampled_fingerprint(module: nn.Module, values: int = 1024, about: str = "") -> str | None:
    """Digest of some values of each weight, and a text; None if a weight cannot be read so."""
    module = getattr(module, "_orig_mod", module)
    try:
        read = {name: w.detach().flatten()[:: max(w.numel() // values, 1)] for name, w in stored_weights(module).items()}
        return hash_tensors(read, type(module).__qualname__ + about)
    except (RuntimeError, NotImplementedError, TypeError):
        return None


def _is_plain(value: Any) -> bool:
    """Whether a value consists of numbers and texts."""
    if isinstance(value, dict):
        return all(isinstance(k, str) and _is_plain(v) for k, v in value.items())
    return all(map(_is_plain, value)) if isinstance(value, list | tuple) else isinstance(value, bool | int | float | str)


def fingerprint(module: Any) -> str:
    """An identifier of a network, to be compared by :func:`same_network`: class, digest of the architecture, projections.

    The digest is of the names and shapes of all parameters. The projections are inner products, in hundredths, of 256
    values of the first, middle and last matrix, scaled to norm 1, with two cosines. They differ between networks of one
    architecture that were trained apart. Networks without values (on the meta device, as under sequential offloading)
    have no projections. A compiled network counts as what it was made from.
    """
    module = getattr(module, "_orig_mod", module)
    digest, matrices = hashlib.sha256(type(module).__name__.encode()), []
    if isinstance(module, nn.Module):
        for name, p in module.named_parameters():
            digest.update(f"{name}{list(p.shape)}".encode())
            if p.ndim > 1 and p.is_floating_point():
                matrices.append(p)
    chosen = [matrices[0], matrices[len(matrices) // 2], matrices[-1]] if matrices else []
    numbers = (
        "" if any(p.device.type == "meta" for p in chosen) else "".join(f"{z:+d}" for p in chosen for z in projections(p))
    )
    return f"{type(module).__name__}-{digest.hexdigest()[:12]}" + (f"({numbers})" if numbers else "")


def projections(p: Tensor) -> list[int]:
    """Inner products, in hundredths, of the first 256 values, scaled to norm 1, with two cosines; 0 for infinite values."""
    w = p.detach().flatten()[:256].to("cpu", torch.float32).double().nan_to_num(0.0, 0.0, 0.0)
    waves = torch.cos(torch.outer(torch.tensor([1.0, 2.0], dtype=torch.float64), torch.arange(len(w), dtype=torch.float64)))
    return [round(100 * z) for z in (waves @ (w / w.norm().clamp_min(1e-30))).tolist()]


# Rounding to bfloat16 changes each value by at most 2^-9 of itself, and so a projection by at most 2^-8 |cosine|, 4.5
# hundredths; rounding to hundredths adds one. A digest of rounded values has no such bound: near a boundary it flips.
TOLERANCE = 6


def same_network(a: str, b: str) -> bool:
    """Whether two fingerprints may be of one network: equal up to projections that differ by rounding, and missing parts.

    >>> same_network("CLIPTextModel-3f2a9c8d1e00(+12-45)", "CLIPTextModel-3f2a9c8d1e00(+13-45)")
    True
    >>> same_network("CLIPTextModel-3f2a9c8d1e00(+12-45)", "CLIPTextModel-3f2a9c8d1e00(+12+88)")
    False
    """
    parts = [FINGERPRINT.fullmatch(f) for f in (a, b)]
    if a == b or None in parts:
        return a == b
    (cls, digest, x, suffix), (other_cls, other, y, other_suffix) = (match.groups() for match in parts if match is not None)
    if (cls, suffix) != (other_cls, other_suffix) or (digest and other and digest != other):
        return False
    x, y = (NUMBER.findall(numbers or "") for numbers in (x, y))
    return (
        not x or not y or (len(x) == len(y) and all(abs(int(i) - int(j)) <= TOLERANCE for i, j in zip(x, y, strict=True)))
    )
