"""What has been generated so far: exact rows, or one random-feature sum of constant size. Both saved as safetensors."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.files import replacing
from kspec_guidance.kernels import CosineKernel, as_float

__all__ = ["MemoryBank", "MemoryFileError", "RandomFeatureMemory"]

FORMAT = "kspec-guidance memory 1"
SCALE = 2.0**40  # fixed point of the random-feature sums: whole numbers add exactly, in any order


class MemoryFileError(ValueError):
    """A memory file that is cut off, altered, of another format, or made for something else."""


def _digest(tensors: dict[str, Tensor], about: str) -> str:
    digest = hashlib.sha256(about.encode())
    for name in sorted(tensors):
        tensor = tensors[name].contiguous()
        digest.update(f"{name}{tensor.dtype}{list(tensor.shape)}".encode())
        digest.update(tensor.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _write(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> None:
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    said = json.dumps(about)
    header = {"format": FORMAT, "kind": kind, "about": said, "sha256": _digest(tensors, said)}
    with replacing(path) as fresh:
        save_file(tensors, fresh, metadata=header)


def _read(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise MemoryFileError(f"{path} is no whole safetensors file ({error}); restore it from a copy") from error
    if header.get("format") != FORMAT:
        raise MemoryFileError(
            f"{path} holds {header.get('format', 'no format name')!r}, not {FORMAT!r}; was it saved by memory.save?"
        )
    if header.get("kind") != kind:
        raise MemoryFileError(f"{path} holds a {header.get('kind')!r}, expected a {kind!r}; load it with that class")
    if header.get("sha256") != _digest(tensors, header.get("about", "")):
        raise MemoryFileError(f"{path} was altered after it was written (checksum differs); restore it from a copy")
    return tensors, json.loads(header["about"])


def _rows(x: Tensor, what: str) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] == 0:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{what} must be a tensor [n, ...] with n of at least 1, got {got}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or infinite values; nothing was added")
    return as_float(x.detach()).flatten(1)


class _Described:
    """What a memory knows of its entries; it refuses entries that cannot be compared with them."""

    shape: tuple[int, ...] | None
    space: str | None
    prompt_encoder: str | None
    prompt_dim: int | None

    def __init__(self, space: str | None = None, prompt_encoder: str | None = None):
        self.space, self.prompt_encoder = space, prompt_encoder
        self.shape = self.prompt_dim = None

    def __len__(self) -> int:
        raise NotImplementedError

    def bind(self, shape: tuple[int, ...], space: str, prompt_encoder: str | None) -> None:
        """Claim the memory for a pipeline; what is still unknown is filled in.

        Raises:
            ValueError: if the memory was filled by something whose entries mean something else.
        """
        shape = tuple(shape)
        if len(self):
            cure = "use a separate memory for each, or clear() this one"
            if self.shape not in (None, shape):
                raise ValueError(f"memory holds features of shape {self.shape}, this pipeline makes {shape}; {cure}")
            if self.space not in (None, space):
                raise ValueError(f"memory holds entries of space {self.space!r}, this guide works in {space!r}; {cure}")
            if None not in (self.prompt_encoder, prompt_encoder) and self.prompt_encoder != prompt_encoder:
                raise ValueError(
                    f"memory holds prompts encoded by {self.prompt_encoder}, this pipeline uses {prompt_encoder}; {cure}"
                )
        self.shape, self.space = shape, space
        self.prompt_encoder = prompt_encoder if prompt_encoder is not None else self.prompt_encoder

    def _check(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        rows, shape = _rows(x, "samples"), tuple(x.shape[1:])
        if self.shape is not None and self.shape != shape:
            raise ValueError(f"memory holds features of shape {self.shape}, got {shape}; use a memory of its own for them")
        if t is not None:
            t = CosineKernel.unit(_rows(t, "prompt features"))[0]
            if len(t) != len(rows):
                raise ValueError(f"{len(rows)} samples but {len(t)} prompt features; one row for each sample")
        if len(self):
            width = None if t is None else t.shape[1]
            if self.prompt_dim != width:
                holds = "no prompts" if self.prompt_dim is None else f"prompt features of width {self.prompt_dim}"
                got = "no prompts" if width is None else f"width {width}"
                raise ValueError(f"memory holds {holds}, got {got}; use a separate memory, or clear() this one")
        return rows, t, shape

    def _about(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "space": self.space,
            "prompt_encoder": self.prompt_encoder,
            "prompt_dim": self.prompt_dim,
        }

    def _match(self, other: "_Described") -> None:
        if type(self) is not type(other):
            raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        for name in ("shape", "space", "prompt_encoder", "prompt_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (
                len(self)
                and len(other)
                and mine != theirs
                and (name in ("shape", "prompt_dim") or None not in (mine, theirs))
            ):
                raise ValueError(f"memories differ in {name}: {mine} here, {theirs} there; they cannot be merged")

    def _adopt(self, other: "_Described") -> None:
        for name in ("shape", "space", "prompt_encoder", "prompt_dim"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))


class MemoryBank(_Described):
    """Every finished sample as one row, with its prompt's features: the exact memory.

    Buffers double when full, so n single adds cost O(n) copies in all. Rows are float32 on the device of the first add.

    Args:
        space: the name of the space its entries live in; set by the first guide that uses it.
        prompt_encoder: fingerprint of what made the prompt features; likewise.

    >>> bank = MemoryBank()
    >>> bank.add(torch.zeros(2, 4, 8, 8))
    >>> len(bank), bank.shape
    (2, (4, 8, 8))
    """

    def __init__(self, space: str | None = None, prompt_encoder: str | None = None):
        super().__init__(space, prompt_encoder)
        self.clear()

    def clear(self) -> None:
        """Forget all entries; the bank may then be used for anything."""
        self._x: Tensor | None = None
        self._t: Tensor | None = None
        self._unit: Tensor | None = None
        self._count = self._unit_count = 0
        self.shape = self.prompt_dim = None

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} entries, shape={self.shape}, prompt_dim={self.prompt_dim}, space={self.space!r})"

    @property
    def x(self) -> Tensor:
        """Entries ``[n, d]``, flattened; a view."""
        return torch.empty(0, 0) if self._x is None else self._x[: self._count]

    @property
    def prompts(self) -> Tensor | None:
        """Prompt features ``[n, p]`` of norm 1, or None; a view."""
        return None if self._t is None else self._t[: self._count]

    def unit(self) -> Tensor:
        """Entries scaled to norm 1 ``[n, d]``; kept, so that each row is scaled once."""
        if self._x is None:
            return self.x
        if self._unit is None or len(self._unit) != len(self._x):
            fresh = torch.empty_like(self._x)
            if self._unit is not None:
                fresh[: self._unit_count] = self._unit[: self._unit_count]
            self._unit = fresh
        for start in range(self._unit_count, self._count, 512):  # in parts: scaling all at once would hold a third copy
            part = slice(start, min(start + 512, self._count))
            self._unit[part] = CosineKernel.unit(self._x[part])[0]
        self._unit_count = self._count
        return self._unit[: self._count]

    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Append samples ``[n, ...]`` and their prompt features ``[n, p]``, kept at norm 1, as guides compare them.

        Raises:
            ValueError: for shapes or widths other than what the bank holds, or values that are not finite; the bank is
                then unchanged.
        """
        self._append(*self._check(x, prompt_features))

    def _append(self, rows: Tensor, t: Tensor | None, shape: tuple[int, ...]) -> None:
        self.shape, self.prompt_dim = shape, None if t is None else t.shape[1]
        self._x = self._grown(self._x, rows)
        if t is not None:
            self._t = self._grown(self._t, t)
        self._count += len(rows)

    def _grown(self, buffer: Tensor | None, rows: Tensor) -> Tensor:
        need = self._count + len(rows)
        if buffer is None:
            buffer = rows.new_empty(max(need, 16), rows.shape[1], dtype=torch.float32)
        elif len(buffer) < need:
            larger = buffer.new_empty(max(need, 2 * len(buffer)), buffer.shape[1])
            larger[: self._count] = buffer[: self._count]
            buffer = larger
        buffer[self._count : need] = rows.to(buffer)
        return buffer

    def merge(self, other: "MemoryBank") -> "MemoryBank":
        """Append another bank's entries.

        Raises:
            ValueError: if the two hold different things.
        """
        self._match(other)
        if len(other):
            shape = other.shape
            assert shape is not None
            prompts = None if other.prompts is None else other.prompts.clone()
            self._append(other.x.clone(), prompts, shape)
            self._adopt(other)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum; the file appears whole or not at all."""
        tensors = {"x": self.x}
        if self.prompts is not None:
            tensors["prompts"] = self.prompts
        _write(path, "rows", tensors, self._about())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "MemoryBank":
        """
        Raises:
            FileNotFoundError: if there is no such file.
            MemoryFileError: if it is cut off, altered, or not a memory bank.
        """
        tensors, about = _read(path, "rows")
        bank = cls(about["space"], about["prompt_encoder"])
        if about["shape"] is not None and len(tensors["x"]):
            bank._append(tensors["x"], tensors.get("prompts"), tuple(about["shape"]))
        return bank


class RandomFeatureMemory(_Described):
    """``sum_i phi(m_i) psi(s_i)'``: all that a sum of kernels needs to know of its samples, in constant size.

    ``D x D_t`` numbers (``D`` without prompts), whatever the number of entries. The sums are kept in fixed point, as whole
    numbers, so merging and subtracting are exact and independent of order; 8 million entries fit before they overflow.

    Args:
        features: the map ``phi`` of the samples (flattened, scaled to norm 1 if ``unit``).
        prompt_features: the map ``psi`` of the prompts; None ignores prompts.
        unit: whether samples are scaled to norm 1 first.
    """

    total: Tensor

    def __init__(
        self,
        features: RandomFourierFeatures,
        prompt_features: RandomFourierFeatures | None = None,
        unit: bool = True,
        space: str | None = None,
        prompt_encoder: str | None = None,
    ):
        super().__init__(space, prompt_encoder)
        self.features, self.prompt_features, self.unit = features, prompt_features, unit
        self.clear()

    def clear(self) -> None:
        """Forget all entries."""
        size = [self.features.num_features]
        if self.prompt_features is not None:
            size.append(self.prompt_features.num_features)
        self.total = torch.zeros(size, dtype=torch.int64)
        self._count = 0
        self.shape = self.prompt_dim = None

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"RandomFeatureMemory({len(self)} entries in {self.total.numel()} numbers, shape={self.shape})"

    def _sum(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, int, int | None, tuple[int, ...]]:
        rows, t, shape = self._check(x, t)
        if self.prompt_features is not None and t is None:
            raise ValueError("this memory weighs samples by their prompts, but no prompt features came with them")
        width = None if t is None else t.shape[1]
        total = torch.zeros_like(self.total)
        for i in range(len(rows)):  # one by one: a product's rounding depends on how many rows it has
            row = rows[i : i + 1].double()
            part = self.features(CosineKernel.unit(row)[0] if self.unit else row)[0]
            if self.prompt_features is not None and t is not None:
                part = part[:, None] * self.prompt_features(t[i : i + 1].double())
            total += (part * SCALE).round().to(torch.int64).cpu()
        return total, len(rows), width, shape

    def _update(self, x: Tensor, t: Tensor | None, sign: int) -> None:
        total, count, width, shape = self._sum(x, t)
        self.total = self.total + sign * total
        self._count += sign * count
        self.shape, self.prompt_dim = shape, width

    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Add samples ``[n, ...]`` with prompt features ``[n, p]``."""
        self._update(x, prompt_features, 1)

    def subtract(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Take out samples that were added before; exact."""
        self._update(x, prompt_features, -1)

    def coefficients(self, t: Tensor | None, like: Tensor) -> Tensor:
        """``sum_i k_T(t, s_i) phi(m_i)`` ``[n or 1, D]`` for prompts ``t`` ``[n, p]`` in the dtype of ``like``."""
        total = (self.total.double() / SCALE).to(like.device)
        if self.prompt_features is None:
            return total[None].to(like)
        if t is None:
            raise ValueError("this memory weighs samples by their prompts, but no prompt features came with this call")
        psi = self.prompt_features(CosineKernel.unit(as_float(t))[0]).double()
        return (psi @ total.mT).to(like)

    def _key(self) -> list:
        maps = [m for m in (self.features, self.prompt_features) if m is not None]
        return [self.unit, *[[repr(m.kernel), m.input_dim, m.num_features, m.orthogonal, m.seed] for m in maps]]

    def merge(self, other: "RandomFeatureMemory") -> "RandomFeatureMemory":
        """Add another memory's entries; exact."""
        self._match(other)
        if self._key() != other._key():
            raise ValueError(f"memories use different random features: {self._key()} here, {other._key()} there")
        self.total = self.total + other.total
        self._count += len(other)
        self._adopt(other)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum."""
        _write(path, "random features", {"total": self.total}, {**self._about(), "count": len(self), "key": self._key()})

    def restore(self, path: str | os.PathLike) -> "RandomFeatureMemory":
        """Replace the entries by those of a file made with the same features.

        Raises:
            MemoryFileError: if the file is damaged, or was made with other features; nothing is changed then.
        """
        tensors, about = _read(path, "random features")
        if about["key"] != self._key():
            raise MemoryFileError(f"{path} was made with other random features: {about['key']}, here {self._key()}")
        self.total, self._count = tensors["total"], about["count"]
        self.shape = None if about["shape"] is None else tuple(about["shape"])
        self.space, self.prompt_encoder, self.prompt_dim = about["space"], about["prompt_encoder"], about["prompt_dim"]
        return self


Memory = MemoryBank | RandomFeatureMemory
