"""WebDataset shards and Parquet files with images, packed from finished batches."""

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.errors import SynthesisError, explained
from kspec_guidance.synthesis.records import Record, Store
from kspec_guidance.utils.atomic_io import replacing

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

    def path(self, epoch: int, rank: int, number: int | str) -> Path:
        ending = "tar" if self.kind == "webdataset" else "parquet"
        name = number if isinstance(number, str) else f"{number:06d}"
        return self.store.out / f"shard-{epoch:02d}-{rank:04d}-{name}.{ending}"

    def add(self, record: Record) -> None:
        """The rows of a finished batch; full shards are written."""
        self.waiting += record.rows
        while len(self.waiting) >= self.size:
            rows, self.waiting = self.waiting[: self.size], self.waiting[self.size :]
            self._pack(rows, self.path(record.epoch, record.rank, self.done))
            self.done += 1

    def finish(self, epoch: int, rank: int) -> None:
        """What is left becomes a smaller shard."""
        if self.waiting:
            self._pack(self.waiting, self.path(epoch, rank, self.done))
            self.waiting, self.done = [], self.done + 1

    def finish_earlier(self) -> None:
        """Images of epochs that ended before their last shard was full, in a shard ``rest`` of each process."""
        for epoch in self.store.epochs():
            if epoch == self.store.epoch:
                continue
            size = self.store.settings(epoch).get("format", [None, self.size])[1]
            for rank in self.store.ranks(epoch):
                rows = [row for r in self.store.records([epoch]) if r.rank == rank for row in r.rows]
                done = 0
                while self.path(epoch, rank, done).exists():
                    done += 1
                if len(rows) > done * size:
                    self._pack(rows[done * size :], self.path(epoch, rank, "rest"))
                self._drop(rows)

    def _pack(self, rows: list[Row], path: Path) -> None:
        if not path.exists():
            write = _tar if self.kind == "webdataset" else _parquet
            with explained(self.store.out), replacing(path, durable=True) as fresh:
                write(fresh, rows, lambda row: (self.store.images / row["file_name"]).read_bytes())
        self._drop(rows)

    def _drop(self, rows: list[Row]) -> None:
        for row in rows:
            (self.store.images / row["file_name"]).unlink(missing_ok=True)
