"""MemoryBank: the exact memory, with one row per finished sample."""

import copy
import hashlib
import math
import os
import random
import weakref
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory.base import Memory, exclusive
from kspec_guidance.memory.io import read_tensors, write_tensors
from kspec_guidance.memory.selection import PromptWeights, Selection, prune
from kspec_guidance.memory.store import DTYPES, RowStore
from kspec_guidance.utils.arguments import is_integer
from kspec_guidance.utils.devices import free_bytes, resolve_device, send, transfer
from kspec_guidance.utils.transfer import on_host

__all__ = ["MemoryBank"]

FORGETTING = ("window", "reservoir", "restart")
FREE_SHARE = 1 / 8  # of a device's free memory: for rows of all banks; beyond it they move to the host
DEVICE_BYTES = 256 << 20  # that are used where an eighth is less, up to a quarter; and where free memory is unknown
DEVICE_SHARE = 0.25
NORM_NUMBERS = 1 << 16  # numbers that are converted to float64 at once, in the processor's cache
SETTINGS = ("dtype", "device", "folder", "limit", "forget", "half_life", "seed")


class MemoryBank(Memory):
    """The exact memory: one row per finished sample, with its prompt features.

    Rows are stored in chunks that never move, so adding a row costs the same for any number of rows. In addition to the
    rows, the bank stores a norm and two integers per row, and the features of each *distinct* prompt. A guided step reads
    only the rows that :meth:`select` returns, those with relevant prompts.

    Args:
        space: name of the entries' feature space; set by the first guide that uses the memory.
        prompt_encoder: fingerprint of the encoder of the prompt features; set likewise.
        dtype: dtype of the stored rows: float32, float16 or bfloat16. Sums are computed in float32 at least.
        device: device of the stored rows. By default that of the first samples, as long as the rows of all such banks take
            at most an eighth of its free memory, or 256 MiB where this is more and at most a quarter; beyond that the host.
            The rows that a run needs are copied to the device of its samples once, or by block if they exceed a quarter of
            its free memory.
        folder: store the rows in unnamed, memory-mapped files in this folder, for more rows than fit into RAM.
        limit: maximum number of rows; None for no limit.
        forget: which rows to drop at the ``limit``: ``window`` drops the oldest, ``reservoir`` random ones, so that the
            rows are a uniform sample of all that were added; ``restart`` drops all but the newest row as soon as the limit
            is reached.
        half_life: number of further samples after which a row has half its weight; None for no decay.
        seed: seed of the reservoir.

    Raises:
        ValueError: for settings outside their ranges, or a device that is not available.

    >>> bank = MemoryBank()
    >>> bank.add(torch.zeros(2, 4, 8, 8))
    >>> len(bank), bank.shape
    (2, (4, 8, 8))
    """

    def __init__(
        self,
        space: str | None = None,
        prompt_encoder: str | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        folder: str | os.PathLike | None = None,
        limit: int | None = None,
        forget: str = "window",
        half_life: float | None = None,
        seed: int = 0,
    ):
        super().__init__(space, prompt_encoder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if limit is not None:
            if not is_integer(limit, 1):
                raise ValueError(f"limit must be an integer of at least 1, or None for no limit; got {limit!r}")
            limit = int(limit)
        if forget not in FORGETTING:
            raise ValueError(f"forget must be one of {', '.join(FORGETTING)}, got {forget!r}")
        if forget == "restart" and (limit is None or limit < 2):
            raise ValueError(f"forget='restart' needs a limit of at least 2, got {limit!r}")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be a positive number of samples, got {half_life!r}")
        if folder is not None and device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"rows in a folder are on the CPU, not on {device}; leave device out")
        self.dtype, self.folder = dtype, folder
        self.device = None if device is None else resolve_device(device)
        self.limit, self.forget, self.half_life, self.seed = limit, forget, half_life, seed
        self.clear()

    @exclusive
    def clear(self) -> None:
        """Remove all entries; the bank can then be used for other samples."""
        self._store: RowStore | None = None
        self._norms = torch.empty(0, dtype=torch.float64, device="cpu")
        self._order = torch.empty(0, dtype=torch.int64, device="cpu")
        self._ids = torch.empty(0, dtype=torch.int32, device="cpu")  # index of each row's prompt among the distinct ones
        self._distinct = torch.empty(0, 0, dtype=torch.float32, device="cpu")  # features of the distinct prompts
        self._known: dict[bytes, int] = {}
        self._count = self._prompts = self._added = 0
        self.shape = self.prompt_dim = None

    def _settings(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in SETTINGS}

    @property
    def default_settings(self) -> bool:
        """Whether all settings have their default values."""
        return self._settings() == MemoryBank()._settings()

    def empty_copy(self) -> "MemoryBank":
        """A bank with the same settings and no entries."""
        return type(self)(self.space, self.prompt_encoder, **self._settings())

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} entries, shape={self.shape}, prompt_dim={self.prompt_dim}, space={self.space!r})"

    @property
    def total_added(self) -> int:
        """Number of samples added so far, kept or not."""
        return self._added

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, including reserved space."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def overhead_bytes(self) -> int:
        """Bytes of all other data: norms, prompts, indices and scratch buffers."""
        tensors = (self._norms, self._ids, self._order, self._distinct)
        scratch = 0 if self._store is None else self._store.scratch_bytes
        return sum(t.numel() * t.element_size() for t in tensors) + 150 * len(self._known) + scratch

    @property
    def x(self) -> Tensor:
        """Entries ``[n, d]``, flattened, float32; a view if there is a single float32 chunk."""
        if self._store is None:
            return torch.empty(0, 0)
        parts = [p.float() for p in self._store.view(0, self._count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    @property
    def prompts(self) -> Tensor | None:
        """Prompt features ``[n, p]`` of norm 1, or None."""
        if self.prompt_dim is None or not len(self):
            return None
        return self._distinct[self._ids[: self._count].long()]

    @exclusive
    def newest(self, max_rows: int, prompt: Tensor | None = None, tolerance: float = 0.0) -> tuple[Tensor, Tensor | None]:
        """The newest entries ``[k, d]``, oldest first, and their prompts.

        Args:
            max_rows: largest number of them.
            prompt: features ``[p]`` of norm 1 of the prompt whose entries are meant; None for all.
            tolerance: distance of prompt features up to which prompts are the same.
        """
        if self._store is None:
            return self.x, None
        by_age = self._order[: self._count].argsort()
        if prompt is not None and self.prompt_dim is not None:
            distinct = self._distinct[: self._prompts]
            same = torch.cdist(distinct, on_host(prompt)[None].to(distinct))[:, 0] <= tolerance
            by_age = by_age[same[self._ids[by_age].long()]]
        by_age = by_age[-max_rows:]
        indices, order = by_age.sort()
        prompts = None if self.prompt_dim is None else self._distinct[self._ids[by_age].long()]
        return self._store.gather(indices).float()[order.argsort()], prompts

    # -- adding ----------------------------------------------------------------------------------------------------

    @exclusive
    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Append samples ``[n, ...]`` and their prompt features ``[n, p]``, which are stored at norm 1.

        Raises:
            ValueError: for shapes or widths that differ from the bank's, or values that are not finite in its dtype; the
                bank is then unchanged.
            OSError: if the disk of ``folder`` is full; the bank is then unchanged.
        """
        self._append(*self._check(x, prompt_features))

    def _home(self, rows: Tensor, total: int) -> tuple[torch.device, int | None]:
        """The device of the rows, once there are ``total`` of them, and how many it has space for; None for any number."""
        if self.folder is not None or self.device is not None:
            return self.device or torch.device("cpu"), self.limit
        device = rows.device if self._store is None else self._store.device
        if device.type == "cpu":
            return device, self.limit
        stores = [bank._store for bank in _placed if bank is not self]
        others = sum(store.nbytes for store in stores if store is not None and store.device == device)
        room = _budget(device, others + self.nbytes) - others
        space = int(room // (rows.shape[1] * self.dtype.itemsize))
        if total > space:
            return torch.device("cpu"), self.limit
        _placed.add(self)
        return device, space if self.limit is None else min(space, self.limit)

    def _with_space(
        self, rows: Tensor, total: int, device: torch.device, limit: int | None
    ) -> tuple[RowStore, Tensor, Tensor]:
        """A store with space for ``total`` rows, and what :meth:`_stored` returns; the bank is not changed yet."""
        stored, norms = self._stored(rows, device)
        store = self._store
        if store is None:
            store = RowStore(rows.shape[1], self.dtype, device, self.folder)
        elif store.device != device:
            store = store.on(device)
        store.reserve(total, limit)
        return store, stored, norms

    def _stored(self, rows: Tensor, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rows as they are stored on ``device``, and their norms ``[n]`` in float64 on the host.

        Raises:
            ValueError: for values that are not finite in the dtype of the bank.
        """
        stored = transfer(rows, torch.empty(0, dtype=self.dtype, device=device))
        norms = _norms(stored)
        if not torch.isfinite(norms).all():  # or float32 norms have overflowed
            norms = _norms(stored.cpu())
        if not torch.isfinite(norms).all():
            if not torch.isfinite(as_float(rows)).all():
                raise ValueError("samples contain NaN or infinite values; nothing was added")
            wider = (
                "use a memory with dtype=torch.bfloat16 or torch.float32"
                if self.dtype == torch.float16
                else "scale them down"
            )
            raise ValueError(
                f"samples have values up to {float(as_float(rows).abs().max()):.3g}, more than {self.dtype} can store "
                f"({torch.finfo(self.dtype).max:.3g}); nothing was added; {wider}"
            )
        return stored, norms

    def _append(self, rows: Tensor, prompt_features: Tensor | None, shape: tuple[int, ...]) -> None:
        limit, count, dropped = self.limit or 2**62, self._count, 0
        if self.forget == "restart" and count + len(rows) >= limit:  # the rows after the last restart are all new ones
            dropped = len(rows) - 1 - (count + len(rows) - 1) % (limit - 1)
            count, rows = 0, rows[dropped:]
            prompt_features = None if prompt_features is None else prompt_features[dropped:]
        n = min(count + len(rows), limit)
        device, space = self._home(rows, n)
        try:
            store, stored, norms = self._with_space(rows, n, device, space)
        except torch.OutOfMemoryError:
            if self.device is not None:
                raise
            store, stored, norms = self._with_space(rows, n, torch.device("cpu"), self.limit)
        self._store, self._count, self._added = store, count, self._added + dropped
        self.shape, self.prompt_dim = shape, None if prompt_features is None else prompt_features.shape[1]
        ids = None if prompt_features is None else self._prompt_ids(prompt_features)
        self._grow(n)
        fresh = min(len(rows), n - self._count)
        if fresh:
            self._put(self._count, stored[:fresh], norms[:fresh], None if ids is None else ids[:fresh], self._added)
        self._count += fresh
        for k in range(fresh, len(rows)):  # the bank is full: each further row replaces another or is dropped
            added = self._added + k
            index = added % limit
            if self.forget == "reservoir":
                index = random.Random(f"{self.seed}/{added}").randrange(added + 1)
            if index < limit:
                self._put(index, stored[k : k + 1], norms[k : k + 1], None if ids is None else ids[k : k + 1], added)
        self._added += len(rows)

    def _put(self, index: int, rows: Tensor, norms: Tensor, ids: Tensor | None, added: int) -> None:
        """Write stored rows at ``index``; ``added`` is the number of samples that were added before them."""
        assert self._store is not None
        self._store.write(index, rows)
        span = slice(index, index + len(rows))
        self._norms[span] = norms
        self._order[span] = torch.arange(added, added + len(rows), device="cpu")
        if ids is not None:
            self._ids[span] = ids

    def _grow(self, n: int) -> None:
        def larger(old: Tensor) -> Tensor:
            fresh = old.new_zeros(max(n, 2 * len(old), 16))
            fresh[: len(old)] = old
            return fresh

        if len(self._norms) < n:
            self._norms, self._order, self._ids = larger(self._norms), larger(self._order), larger(self._ids)

    def _prompt_ids(self, prompt_features: Tensor) -> Tensor:
        """Indices ``[n]`` of the prompts among the distinct ones; new prompts are added."""
        ids = []
        for row in prompt_features.float():
            key = hashlib.blake2b(row.numpy(), digest_size=16).digest()
            number = self._known.get(key)
            if number is None:
                number = self._known[key] = self._prompts
                if self._distinct.shape[1] != len(row):
                    self._distinct = row.new_empty(0, len(row))
                if len(self._distinct) <= number:
                    larger = row.new_zeros(max(16, 2 * len(self._distinct)), len(row))
                    larger[:number] = self._distinct[:number]
                    self._distinct = larger
                self._distinct[number] = row
                self._prompts += 1
            ids.append(number)
        return torch.tensor(ids, dtype=torch.int32, device="cpu")

    @exclusive
    def parts(self, count: int) -> list["MemoryBank"]:
        """Banks of ``count`` equal parts of each row, with the prompts, order and settings of this one, for reading only.

        The rows are not copied.
        """
        rows = [] if self._store is None else self._store.view(0, self._count)
        norms = [_norms(view.unflatten(1, (count, -1))) for view in rows]
        parts = []
        for k in range(count):
            part = copy.copy(self)
            part.shape = None if self.shape is None else (math.prod(self.shape) // count,)
            if self._store is not None:
                width = self._store.width // count
                part._store = self._store.columns(k * width, (k + 1) * width)
                part._norms = torch.cat([found[:, k] for found in norms])
            parts.append(part)
        return parts

    # -- selection ---------------------------------------------------------------------------------------------------

    @exclusive
    def select(
        self,
        prompt_features: Tensor | None = None,
        prompt_weights: PromptWeights | None = None,
        tolerance: float = 0.0,
        normalize: bool = True,
    ) -> Selection:
        """The relevant rows for samples of these prompts ``[n, p]``; arguments as for :meth:`Memory.select`.

        Rows are chosen on the host, from one copy of the prompt features.
        """
        n, age = self._count, None
        if self.half_life is not None:
            age = torch.exp2((self._order[:n] + 1 - self._added).double() / self.half_life)
        norms = self._norms[:n]
        if prompt_features is None or prompt_weights is None or self.prompt_dim is None:
            return Selection(self._store, None, None if age is None else age.float()[None], norms, normalize)
        ids, distinct = self._ids[:n].long(), self._distinct[: self._prompts]
        t = as_float(on_host(prompt_features))
        weights = prompt_weights(t, distinct.to(t))
        counts = torch.bincount(ids, age, minlength=self._prompts)
        keep = prune(weights, counts, tolerance)
        indices = None if bool(keep.all()) else keep[ids].nonzero().squeeze(1)
        if indices is not None:
            ids, norms, age = ids[indices], norms[indices], None if age is None else age[indices]
        weights = weights[:, ids]
        if age is not None:
            weights = weights * age.to(weights)
        weights = send(weights, prompt_features.device)
        return Selection(self._store, indices, weights, norms, normalize, prompts=(distinct, ids))

    # -- merging and files -------------------------------------------------------------------------------------------

    @exclusive
    def merge(self, other: "MemoryBank") -> "MemoryBank":
        """Append another bank's entries.

        Raises:
            TypeError: for a memory of another class.
            ValueError: if the entries are not compatible; the bank is then unchanged.
        """
        self._check_mergeable(other)
        if len(other) and other._store is not None:
            assert other.shape is not None
            prompts, shape, parts, start = other.prompts, other.shape, other._store.view(0, len(other)), 0
            if self.dtype != other.dtype:  # check all before the first is added
                for part in parts:
                    self._stored(part, part.device)
            for part in parts:
                part = part.clone() if other is self else part
                self._append(part, None if prompts is None else prompts[start : start + len(part)], shape)
                start += len(part)
            self._adopt(other)
        return self

    @exclusive
    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum; the file appears whole or not at all."""
        n, tensors = self._count, {}
        if self._store is not None:
            tensors = {f"x{k:05d}": part for k, part in enumerate(self._store.view(0, n))}
            tensors |= {"order": self._order[:n]}
        if self.prompt_dim is not None and n:
            tensors |= {"prompts": self._distinct[: self._prompts], "ids": self._ids[:n]}
        settings = {name: getattr(self, name) for name in ("limit", "forget", "half_life", "seed")}
        write_tensors(path, "rows", tensors, {**self._description(), **settings, "seen": self._added})

    @classmethod
    @exclusive
    def load(cls, path: str | os.PathLike, **settings: Any) -> "MemoryBank":
        """Load a bank that :meth:`save` wrote.

        Args:
            path: path of the file.
            settings: ``dtype``, ``device`` and ``folder`` of the new bank; all other settings are in the file. Rows are
                loaded to the host, unless ``device`` is given.

        Raises:
            FileNotFoundError: if there is no such file.
            MemoryFileError: if the file is truncated, altered, or not a memory bank.
            ValueError: for rows that the given ``dtype`` cannot store.
        """
        tensors, about = read_tensors(path, "rows")
        parts = [tensors[name] for name in sorted(tensors) if name.startswith("x")]
        if parts and "dtype" not in settings:
            settings["dtype"] = parts[0].dtype
        saved = {name: about[name] for name in ("limit", "forget", "half_life", "seed")}
        bank = cls(about["space"], about["prompt_encoder"], **saved | settings)
        if about["shape"] is None or not parts:
            return bank
        n, ids = sum(map(len, parts)), tensors.get("ids")
        bank._store = RowStore(parts[0].shape[1], bank.dtype, bank.device or "cpu", bank.folder)
        bank._store.reserve(n, bank.limit)
        bank.shape = tuple(about["shape"])
        bank._grow(n)
        if ids is not None:
            bank.prompt_dim = tensors["prompts"].shape[1]
            bank._prompt_ids(tensors["prompts"])
        for part in parts:
            start = bank._count
            stored, norms = bank._stored(part, bank._store.device)
            bank._put(start, stored, norms, None if ids is None else ids[start : start + len(part)], 0)
            bank._count += len(part)
        bank._order[:n] = tensors["order"]
        bank._added = about["seen"]
        return bank


_placed: weakref.WeakSet[MemoryBank] = weakref.WeakSet()  # banks whose rows are, or were, on an accelerator by default


def _budget(device: torch.device, used: int) -> float:
    """Bytes of an accelerator that rows may take by default, of which ``used`` are taken."""
    free = free_bytes(device)
    if free is None:
        return DEVICE_BYTES
    return max(FREE_SHARE * (free + used), min(DEVICE_BYTES, DEVICE_SHARE * (free + used)))


def _norms(rows: Tensor) -> Tensor:
    """Norms along the last dimension, in float64 on the host; squares are summed in float64 there, in float32 elsewhere."""
    if rows.device.type != "cpu":
        return torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).cpu().double()
    parts = rows.split(max(1, NORM_NUMBERS // max(1, rows.shape[1:].numel())))
    return torch.cat([torch.linalg.vector_norm(part.double(), dim=-1) for part in parts])
