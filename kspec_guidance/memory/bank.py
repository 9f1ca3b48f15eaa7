"""The exact memory: every finished sample is one row."""

import hashlib
import os
import random
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel
from kspec_guidance.memory.base import Described
from kspec_guidance.memory.io import read_tensors, write_tensors
from kspec_guidance.memory.selection import PromptWeights, Selection, prune
from kspec_guidance.memory.store import DTYPES, RowStore

__all__ = ["MemoryBank"]

FORGETTING = ("window", "reservoir")


class MemoryBank(Described):
    """Every finished sample as one row, with its prompt's features: the exact memory.

    Rows lie in chunks that never move, so adding one costs the same however many there are, and beside them there are only
    a norm and three whole numbers for each row and the features of each *distinct* prompt. What a guided step reads is
    :meth:`select`: the rows whose prompts matter.

    Args:
        space: the name of the space its entries live in; set by the first guide that uses it.
        prompt_encoder: fingerprint of what made the prompt features; likewise.
        dtype: of the rows as they are kept: float32, float16 or bfloat16. Sums are taken in float32 at least.
        device: where rows are kept; that of the first add by default. Rows elsewhere travel block by block when used.
        pinned: keep them in page-locked host memory, for a GPU that reads them from there.
        folder: keep them in unnamed files of this folder, mapped into memory: more rows than RAM.
        limit: most rows to keep; None for all.
        forget: which to drop when ``limit`` is reached: ``window`` the oldest, ``reservoir`` any, so that those kept
            are a uniform sample of all that were added.
        half_life: after so many further samples a row counts half; None for no decay.
        seed: of the reservoir.

    Raises:
        ValueError: for settings outside these.

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
        pinned: bool = False,
        folder: str | os.PathLike | None = None,
        limit: int | None = None,
        forget: str = "window",
        half_life: float | None = None,
        seed: int = 0,
    ):
        super().__init__(space, prompt_encoder)
        if dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {dtype!r}")
        if limit is not None and (not isinstance(limit, int) or limit < 1):
            raise ValueError(f"limit must be a whole number of rows, at least 1, or None for all; got {limit!r}")
        if forget not in FORGETTING:
            raise ValueError(f"forget must be one of {', '.join(FORGETTING)}, got {forget!r}")
        if half_life is not None and not half_life > 0:
            raise ValueError(f"half_life must be a positive number of samples, got {half_life!r}")
        if (pinned or folder is not None) and device is not None and torch.device(device).type != "cpu":
            raise ValueError(f"pinned and mapped rows live on the host, not on {device}; leave device out")
        if pinned and folder is not None:
            raise ValueError("rows are kept either in page-locked memory or in a folder; give one of pinned and folder")
        if pinned and not torch.cuda.is_available():
            raise ValueError("pinned=True needs a CUDA device, and there is none; leave it out")
        self.dtype, self.device, self.pinned, self.folder = dtype, device, pinned, folder
        self.limit, self.forget, self.half_life, self.seed = limit, forget, half_life, seed
        self.clear()

    def clear(self) -> None:
        """Forget all entries; the bank may then be used for anything."""
        self._store: RowStore | None = None
        self._norms, self._order = torch.empty(0, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
        self._ids = torch.empty(0, dtype=torch.int32)  # number of each row's prompt
        self._distinct = torch.empty(0, 0)
        self._known: dict[bytes, int] = {}
        self._count = self._prompts = self._seen = self._version = 0
        self._selected: dict[Any, tuple[int, Tensor | None, Selection]] = {}
        self.shape = self.prompt_dim = None

    def _settings(self) -> dict[str, Any]:
        names = ("dtype", "device", "pinned", "folder", "limit", "forget", "half_life", "seed")
        return {name: getattr(self, name) for name in names}

    @property
    def plain(self) -> bool:
        """Whether it was made without settings."""
        return self._settings() == MemoryBank()._settings()

    def empty_copy(self) -> "MemoryBank":
        """A bank of the same settings that holds nothing."""
        return type(self)(self.space, self.prompt_encoder, **self._settings())

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"MemoryBank({len(self)} entries, shape={self.shape}, prompt_dim={self.prompt_dim}, space={self.space!r})"

    @property
    def seen(self) -> int:
        """Samples that were ever added, kept or not."""
        return self._seen

    @property
    def nbytes(self) -> int:
        """Bytes of the rows, with what is reserved for further ones."""
        return 0 if self._store is None else self._store.nbytes

    @property
    def nbytes_beside(self) -> int:
        """Bytes of everything else: norms, prompts, places, and the rows of the image at hand where they were copied."""
        kept = (self._norms, self._ids, self._order, self._distinct)
        scratch = 0 if self._store is None else self._store.scratch_bytes
        return sum(t.numel() * t.element_size() for t in kept) + 150 * len(self._known) + scratch

    @property
    def x(self) -> Tensor:
        """Entries ``[n, d]``, flattened, float32; a view where there is only one chunk of float32."""
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

    def unit(self) -> Tensor:
        """Entries scaled to norm 1 ``[n, d]``; a copy."""
        return CosineKernel.unit(self.x)[0]

    def newest(self, most: int) -> tuple[Tensor, Tensor | None]:
        """The entries added last ``[k, d]``, oldest of them first, and their prompts."""
        if self._store is None:
            return self.x, None
        places = self._order[: self._count].argsort()[-most:]
        rows, order = places.sort()
        back = order.argsort()
        prompts = None if self.prompt_dim is None else self._distinct[self._ids[places].long()]
        return self._store.gather(rows).float()[back], prompts

    # -- adding ----------------------------------------------------------------------------------------------------

    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Append samples ``[n, ...]`` and their prompt features ``[n, p]``, kept at norm 1, as guides compare them.

        Raises:
            ValueError: for shapes or widths other than what the bank holds, or values that are not finite; the bank is
                then unchanged.
            OSError: if rows are kept in a folder whose disk is full; the bank is then unchanged.
        """
        self._append(*self._check(x, prompt_features))

    def _append(self, rows: Tensor, t: Tensor | None, shape: tuple[int, ...]) -> None:
        if self._store is None:
            where = "cpu" if self.pinned or self.folder is not None else self.device or rows.device
            self._store = RowStore(rows.shape[1], self.dtype, where, self.pinned, self.folder)
        store, room = self._store, self.limit or 2**62
        n = min(self._count + len(rows), room)
        store.reserve(n, self.limit)
        self.shape, self.prompt_dim = shape, None if t is None else t.shape[1]
        ids = None if t is None else self._number(t)
        self._grow(n)
        fresh = min(len(rows), n - self._count)
        if fresh:
            self._put(self._count, rows[:fresh], None if ids is None else ids[:fresh], self._seen)
        self._count += fresh
        for k in range(fresh, len(rows)):  # the bank is full: each further row takes the place of another, or none
            seen = self._seen + k
            place = seen % room
            if self.forget == "reservoir":
                place = random.Random(f"{self.seed}/{seen}").randrange(seen + 1)
            if place < room:
                self._put(place, rows[k : k + 1], None if ids is None else ids[k : k + 1], seen)
        self._seen += len(rows)
        self._version += 1
        store.changed()

    def _put(self, place: int, rows: Tensor, ids: Tensor | None, seen: int) -> None:
        assert self._store is not None
        self._store.write(place, rows)
        span = slice(place, place + len(rows))
        kept = rows.to(self.dtype)  # norms of the rows as they are kept
        self._norms[span] = torch.linalg.vector_norm(kept, dim=1, dtype=torch.float64).cpu()
        self._order[span] = torch.arange(seen, seen + len(rows))
        if ids is not None:
            self._ids[span] = ids

    def _grow(self, n: int) -> None:
        def larger(old: Tensor) -> Tensor:
            fresh = old.new_zeros(max(n, 2 * len(old), 16))
            fresh[: len(old)] = old
            return fresh

        if len(self._norms) < n:
            self._norms, self._order, self._ids = larger(self._norms), larger(self._order), larger(self._ids)

    def _number(self, t: Tensor) -> Tensor:
        """Numbers of the prompts among the distinct ones; new ones are added."""
        t = t.float().cpu()
        numbers = []
        for row in t:
            key = hashlib.blake2b(row.numpy(), digest_size=16).digest()
            number = self._known.get(key)
            if number is None:
                number = self._known[key] = self._prompts
                if self._distinct.shape[1] != t.shape[1]:
                    self._distinct = t.new_empty(0, t.shape[1])
                if len(self._distinct) <= number:
                    more = t.new_zeros(max(16, 2 * len(self._distinct)), t.shape[1])
                    more[:number] = self._distinct[:number]
                    self._distinct = more
                self._distinct[number] = row
                self._prompts += 1
            numbers.append(number)
        return torch.tensor(numbers, dtype=torch.int32)

    def prompts_at(self, places: Tensor) -> Tensor | None:
        """Prompt features ``[k, p]`` of the rows at ``places`` of the store; None where there are no prompts."""
        return None if self.prompt_dim is None else self._distinct[self._ids[places].long()]

    # -- what a guided step reads ----------------------------------------------------------------------------------

    def select(
        self, t: Tensor | None = None, weigh: PromptWeights | None = None, tolerance: float = 0.0, unit: bool = True
    ) -> Selection:
        """The rows that matter to samples of prompts ``t`` ``[n, p]``, with their weights; kept until something is added.

        Args:
            weigh: of prompts; None lets all rows count alike.
            tolerance: rows that are left out weigh together at most this part of all, see :func:`prune`.
            unit: whether rows are to be taken at norm 1.
        """
        if weigh is None or self.prompt_dim is None:
            t = None
        key = (weigh, tolerance, unit)
        found = self._selected.get(key)
        if found is not None and found[0] == self._version and _same(found[1], t):
            return found[2]
        selection = self._select(t, weigh, tolerance, unit)
        self._selected = {k: v for k, v in list(self._selected.items())[-3:] if v[0] == self._version}
        self._selected[key] = (self._version, t, selection)
        return selection

    def _select(self, t: Tensor | None, weigh: PromptWeights | None, tolerance: float, unit: bool) -> Selection:
        n, age = self._count, None
        if self.half_life is not None:
            age = torch.exp2((self._order[:n] + 1 - self._seen).double() / self.half_life)
        norms = self._norms[:n]
        if t is None or weigh is None:
            weights = None if age is None else age.float()[None]
            return Selection(self._store, None, weights, norms, unit)
        ids = self._ids[:n].long()
        weights = weigh(t, self._distinct[: self._prompts].to(t))
        counts = torch.bincount(ids, age, minlength=self._prompts)
        keep = prune(weights, counts, tolerance)
        if bool(keep.all()):
            places, ids_kept, norms_kept = None, ids, norms
        else:
            places = keep[ids].nonzero().squeeze(1)
            ids_kept, norms_kept = ids[places], norms[places]
        weights = weights[:, ids_kept.to(weights.device)]
        if age is not None:
            weights = weights * (age if places is None else age[places]).to(weights)
        return Selection(self._store, places, weights, norms_kept, unit)

    # -- together and on disk --------------------------------------------------------------------------------------

    def merge(self, other: "MemoryBank") -> "MemoryBank":
        """Append another bank's entries.

        Raises:
            ValueError: if the two hold different things.
        """
        self._match(other)
        if len(other) and other._store is not None:
            assert other.shape is not None
            t, shape, at = other.prompts, other.shape, 0
            for part in other._store.view(0, len(other)):
                part = part.clone() if other is self else part
                self._append(part.float(), None if t is None else t[at : at + len(part)], shape)
                at += len(part)
            self._adopt(other)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum; the file appears whole or not at all."""
        n, tensors = self._count, {}
        if self._store is not None:
            tensors = {f"x{k:05d}": part for k, part in enumerate(self._store.view(0, n))}
            tensors |= {"order": self._order[:n]}
        if self.prompt_dim is not None and n:
            tensors |= {"prompts": self._distinct[: self._prompts], "ids": self._ids[:n]}
        kept = {"limit": self.limit, "forget": self.forget, "half_life": self.half_life, "seed": self.seed}
        write_tensors(path, "rows", tensors, {**self._about(), **kept, "seen": self._seen})

    @classmethod
    def load(cls, path: str | os.PathLike, **settings: Any) -> "MemoryBank":
        """
        Args:
            settings: ``dtype``, ``device``, ``pinned``, ``folder`` of the new bank; what it forgets is in the file.

        Raises:
            FileNotFoundError: if there is no such file.
            MemoryFileError: if it is cut off, altered, or not a memory bank.
        """
        tensors, about = read_tensors(path, "rows")
        parts = [tensors[name] for name in sorted(tensors) if name.startswith("x")]
        if parts and "dtype" not in settings:
            settings["dtype"] = parts[0].dtype
        kept = {k: about[k] for k in ("limit", "forget", "half_life", "seed")}
        bank = cls(about["space"], about["prompt_encoder"], **kept | settings)
        if about["shape"] is None or not parts:
            return bank
        n, ids = sum(map(len, parts)), tensors.get("ids")
        bank._store = RowStore(parts[0].shape[1], bank.dtype, bank.device or "cpu", bank.pinned, bank.folder)
        bank._store.reserve(n, bank.limit)
        bank.shape = tuple(about["shape"])
        bank._grow(n)
        if ids is not None:
            bank.prompt_dim = tensors["prompts"].shape[1]
            bank._number(tensors["prompts"])
        for part in parts:
            at = bank._count
            bank._put(at, part, None if ids is None else ids[at : at + len(part)], 0)
            bank._count += len(part)
        bank._order[:n] = tensors["order"]
        bank._seen = about["seen"]
        return bank


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.shape == b.shape and a.device == b.device and bool(torch.equal(a, b))
