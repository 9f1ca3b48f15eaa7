"""WebDataset shards and Parquet files with images, packed from finished batches."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kspec_guidance.files import replacing
from kspec_guidance.synthesis.errors import SynthesisError, explained
from kspec_guidance.synthesis.store import Record, Store

__all__ = ["FORMATS", "Packer"]

FORMATS = ("imagefolder", "webdataset", "parquet")
Row = dict[str, Any]


def _tar(path: Path, rows: list[Row], read: Callable[[Row], bytes]) -> None:
    import webdataset

    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0, user="", group="") as tar:
        for row in rows:
            key = row["file_name"].rpartition("/")[2].removesuffix(".png")
            tar.write({"__key__": key, "png": read(row), "txt": row["prompt"], "json": json.dumps(row).encode()})


def _parquet(path: Path, rows: list[Row], read: Callable[[Row], bytes]) -> None:
    import datasets

    names = list(dict.fromkeys(name for row in rows for name in row))
    table: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in names}
    table["image"] = [{"bytes": read(row), "path": row["file_name"].rpartition("/")[2]} for row in rows]
    data = io.BytesIO()
    datasets.Dataset.from_dict(table).cast_column("image", datasets.Image()).to_parquet(data)
    path.write_bytes(data.getvalue())


class Packer:
    """Packs the images of one process, so many to a shard, in the order in which they were finished.

    Images wait beside the records until a shard is full; a shard appears whole, and only then are they deleted. Which
    images are in which shard depends on the records alone.
    """

    def __init__(self, store: Store, kind: str, size: int):
        self.store, self.kind, self.size = store, kind, size
        self.waiting: list[Row] = []
        self.done = 0
        try:
            __import__("webdataset" if kind == "webdataset" else "datasets")
        except ImportError as error:
            raise SynthesisError(f"format {kind!r} needs: pip install 'kspec-guidance[data]'") from error

    def path(self, epoch: int, rank: int, number: int) -> Path:
        ending = "tar" if self.kind == "webdataset" else "parquet"
        return self.store.out / f"shard-{epoch:02d}-{rank:04d}-{number:06d}.{ending}"

    def add(self, record: Record) -> None:
        """The rows of a finished batch; full shards are written."""
        self.waiting += record.rows
        while len(self.waiting) >= self.size:
            self._pack(record.epoch, record.rank, self.size)

    def finish(self, epoch: int, rank: int) -> None:
        """What is left becomes a smaller shard."""
        if self.waiting:
            self._pack(epoch, rank, len(self.waiting))

    def _pack(self, epoch: int, rank: int, n: int) -> None:
        rows, path = self.waiting[:n], self.path(epoch, rank, self.done)
        if not path.exists():
            write = _tar if self.kind == "webdataset" else _parquet
            with explained(self.store.out), replacing(path, durable=True) as fresh:
                write(fresh, rows, lambda row: (self.store.images / row["file_name"]).read_bytes())
        for row in rows:
            (self.store.images / row["file_name"]).unlink(missing_ok=True)
        self.waiting, self.done = self.waiting[n:], self.done + 1
