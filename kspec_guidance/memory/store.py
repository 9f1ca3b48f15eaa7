"""RowStore: rows of one width, in chunks that never move."""

import bisect
import os
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.utils.devices import normal, normal_tensors, resolve_device, send

__all__ = ["RowStore"]

CHUNK_BYTES = 32 << 20  # size up to which chunks grow, and so the reserved but unused space
CHUNK_BYTES_GPU = 128 << 20  # that of a block there: a block does not cross chunks
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _allocate(handle: int, size: int) -> None:
    """Reserve disk space, so that a full disk raises an error here; a write through the mapping would raise a signal."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
    else:
        os.ftruncate(handle, size)


class RowStore:
    """Rows ``[capacity, width]``. Growing adds a chunk without copying.

    Args:
        width: length of a row.
        dtype: float32, float16 or bfloat16.
        device: device of the chunks.
        folder: store the chunks in memory-mapped files in this folder, for more rows than fit into RAM. The files are
            unlinked at once, so none remain after the process ends.
    """

    def __init__(
        self,
        width: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        folder: str | os.PathLike | None = None,
    ):
        self.width, self.dtype, self.device = width, dtype, resolve_device(device)
        self.folder = None if folder is None else Path(folder)
        self.chunks: list[Tensor] = []
        self.starts: list[int] = []
        self.capacity = 0
        self._buffers: dict[tuple[int, str], Tensor] = {}

    def buffer(self, name: str, n: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A reusable buffer ``[n, width]`` by name: allocating new pages costs more than filling them.

        Each thread has its own buffers, since several pipelines may read one memory.
        """
        key = threading.get_ident(), name
        buffer = self._buffers.get(key)
        if buffer is None or len(buffer) < n or buffer.dtype != dtype or buffer.device != device:
            with normal_tensors():
                buffer = self._buffers[key] = torch.empty(n, self.width, dtype=dtype, device=device)
        return buffer[:n]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_buffers": {}}  # buffers are not copied or pickled

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.chunks = [normal(chunk) for chunk in self.chunks]

    @property
    def scratch_bytes(self) -> int:
        """Bytes of all buffers."""
        return sum(buffer.numel() * buffer.element_size() for buffer in self._buffers.values())

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return self.width * self.dtype.itemsize

    @property
    def nbytes(self) -> int:
        """Bytes reserved, used or not."""
        return self.capacity * self.row_bytes

    def columns(self, start: int, stop: int) -> "RowStore":
        """A store of an interval of columns of all rows, which are not copied."""
        other = RowStore(stop - start, self.dtype, self.device)
        other.chunks = [chunk[:, start:stop] for chunk in self.chunks]
        other.starts, other.capacity = list(self.starts), self.capacity
        return other

    def on(self, device: torch.device) -> "RowStore":
        """A store of the same rows on another device."""
        other = RowStore(self.width, self.dtype, device)
        other.chunks = [chunk.to(device) for chunk in self.chunks]
        other.starts, other.capacity = list(self.starts), self.capacity
        return other

    def reserve(self, n: int, limit: int | None = None) -> None:
        """Allocate space for ``n`` rows. Chunks grow up to 32 MB, on a GPU 128; ``limit`` is the maximum number of rows."""
        missing = n - self.capacity
        if missing <= 0:
            return
        largest = CHUNK_BYTES if self.device.type == "cpu" else CHUNK_BYTES_GPU
        growth = min(max(16, self.capacity), max(1, largest // self.row_bytes))
        if limit is not None:
            growth = min(growth, limit - self.capacity)
        size = max(missing, growth)
        self.chunks.append(self._chunk(size))
        self.starts.append(self.capacity)
        self.capacity += size

    def _chunk(self, size: int) -> Tensor:
        if self.folder is None:
            with normal_tensors():
                return torch.empty(size, self.width, dtype=self.dtype, device=self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix="kspec-rows-", dir=self.folder)
        try:
            _allocate(handle, size * self.row_bytes)
            with normal_tensors():
                flat = torch.from_file(name, shared=True, size=size * self.width, dtype=self.dtype, device="cpu")
        finally:
            os.close(handle)
            os.unlink(name)
        return flat.view(size, self.width)

    def write(self, start: int, rows: Tensor) -> None:
        """Write rows at index ``start``."""
        done = 0
        for chunk, inside, stop in self._spans(start, start + len(rows)):
            chunk[inside:stop] = rows[done : done + stop - inside]
            done += stop - inside

    def view(self, start: int, stop: int) -> list[Tensor]:
        """The rows of an interval, as views, in order."""
        return [chunk[a:b] for chunk, a, b in self._spans(start, stop)]

    def _spans(self, start: int, stop: int) -> Iterator[tuple[Tensor, int, int]]:
        number = bisect.bisect_right(self.starts, start) - 1
        while start < stop:
            chunk, offset = self.chunks[number], self.starts[number]
            end = min(stop, offset + len(chunk))
            yield chunk, start - offset, end - offset
            start, number = end, number + 1

    def gather(self, indices: Tensor, out: Tensor | None = None) -> Tensor:
        """The rows ``[k, width]`` at sorted ``indices`` (on the CPU); a view if they are contiguous in one chunk."""
        if not len(indices):
            return torch.empty(0, self.width, dtype=self.dtype, device=self.device)
        first, last = int(indices[0]), int(indices[-1])
        number = bisect.bisect_right(self.starts, first) - 1
        chunk, offset = self.chunks[number], self.starts[number]
        if last < offset + len(chunk):
            if last - first + 1 == len(indices):
                return chunk[first - offset : last - offset + 1]
            local = send(indices - offset, chunk.device)
            return torch.index_select(chunk, 0, local, **({} if out is None else {"out": out[: len(indices)]}))
        rows = out[: len(indices)] if out is not None else chunk.new_empty(len(indices), self.width)
        ends = torch.tensor([*self.starts[number + 1 :], self.capacity], device="cpu")
        edges = torch.searchsorted(indices, ends).tolist()
        parts = [slice(a, b) for a, b in zip([0, *edges], edges, strict=False)]
        local = send(torch.cat([indices[part] - self.starts[number + k] for k, part in enumerate(parts)]), rows.device)
        for k, part in enumerate(parts):
            if part.stop > part.start:
                torch.index_select(self.chunks[number + k], 0, local[part], out=rows[part])
        return rows
