"""WebDataset shards and Parquet files with images, packed from finished batches."""

import io
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.columns import COLUMNS
from kspec_guidance.synthesis.errors import SynthesisError, disk_errors
from kspec_guidance.synthesis.records import Record, json_row
from kspec_guidance.synthesis.store import Store
from kspec_guidance.utils.atomic_io import replacing

__all__ = ["FORMATS", "Packer", "column_features"]

FORMATS = ("imagefolder", "webdataset", "parquet")
SAMPLES_READ = 5  # of the first shard, from which load_dataset("webdataset") infers the types of columns
DTYPES: dict[type | None, str] = {bool: "bool", int: "int64", float: "float64", str: "string", None: "null"}
Row = dict[str, Any]


def _with_values_first(rows: list[Row]) -> list[Row]:
    """The rows, with those moved to the front that hold the first value of a column which the first five rows lack."""
    first: list[Row] = []
    for name in rows[0]:
        found = next((k for k, row in enumerate(rows) if row.get(name) is not None), 0)
        if found >= SAMPLES_READ and not any(row.get(name) is not None for row in first):
            first.append(rows[found])
    chosen = {row["file_name"] for row in first}
    return first + [row for row in rows if row["file_name"] not in chosen]


def _write_tar(path: Path, rows: list[Row], read: Callable[[Row], bytes], types: Mapping[str, type | None]) -> None:
    import webdataset

    with path.open("wb") as file, webdataset.TarWriter(file, mtime=0, user="", group="") as tar:
        for row in _with_values_first(rows):
            key = row["file_name"].rpartition("/")[2].removesuffix(".png")
            tar.write({"__key__": key, "png": read(row), "txt": row["prompt"], "json": json_row(row).encode()})


def column_features(types: Mapping[str, type | None]) -> Any:
    """The features of ``datasets`` for columns of these types, and the column ``image``."""
    import datasets

    return datasets.Features(
        {**{name: datasets.Value(DTYPES[kind]) for name, kind in types.items()}, "image": datasets.Image()}
    )


def _write_parquet(path: Path, rows: list[Row], read: Callable[[Row], bytes], types: Mapping[str, type | None]) -> None:
    import datasets

    features = column_features({**types, **COLUMNS})
    table: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in features if name != "image"}
    table["image"] = [{"bytes": read(row), "path": row["file_name"].rpartition("/")[2]} for row in rows]
    data = io.BytesIO()
    datasets.Dataset.from_dict(table, features).to_parquet(data)
    path.write_bytes(data.getvalue())


class Packer:
    """Packs the images of one process into shards of ``size``, in the order in which they were finished.

    Images are kept beside the records until a shard is full; a shard appears whole, and only then are they deleted. Which
    images are in which shard depends on the records only.

    Args:
        store: of the run.
        kind: ``webdataset`` or ``parquet``.
        size: images in a shard.
        types: of the users' own columns; see :func:`~kspec_guidance.synthesis.columns.column_types`.

    Raises:
        SynthesisError: if the library that writes this format is not installed.
    """

    def __init__(self, store: Store, kind: str, size: int, types: Mapping[str, type | None]):
        self.store, self.kind, self.size, self.types = store, kind, size, types
        self.pending: list[Row] = []
        self.shards = 0
        try:
            __import__("webdataset" if kind == "webdataset" else "datasets")
        except ImportError as error:
            raise SynthesisError(f"format {kind!r} needs: pip install 'kspec-guidance[data]'") from error

    def path(self, epoch: int, rank: int, number: int | str) -> Path:
        """The file of one shard."""
        suffix = "tar" if self.kind == "webdataset" else "parquet"
        name = number if isinstance(number, str) else f"{number:06d}"
        return self.store.out / f"shard-{epoch:02d}-{rank:04d}-{name}.{suffix}"

    def add(self, record: Record) -> None:
        """Add the images of a finished batch, and write the shards that are full."""
        self.pending += record.rows
        while len(self.pending) >= self.size:
            rows, self.pending = self.pending[: self.size], self.pending[self.size :]
            self._pack(rows, self.path(record.epoch, record.rank, self.shards))
            self.shards += 1

    def finish(self, epoch: int, rank: int) -> None:
        """Write the remaining images as a smaller shard."""
        if self.pending:
            self._pack(self.pending, self.path(epoch, rank, self.shards))
            self.pending, self.shards = [], self.shards + 1

    def finish_earlier(self) -> None:
        """Write images of epochs that ended before their last shard was full, as one shard ``rest`` of each process."""
        for epoch in self.store.epochs():
            if epoch == self.store.epoch:
                continue
            size = self.store.settings(epoch).get("format", [None, None])[1] or self.size
            leases = self.store.settings(epoch).get("processes") == "leases"  # whose units are packed as one process
            for rank in [0] if leases else self.store.ranks(epoch):
                rows = [row for r in self.store.records([epoch]) if leases or r.rank == rank for row in r.rows]
                shards = 0
                while self.path(epoch, rank, shards).exists():
                    shards += 1
                if len(rows) > shards * size:
                    self._pack(rows[shards * size :], self.path(epoch, rank, "rest"))
                self._delete_images(rows)

    def _pack(self, rows: list[Row], path: Path) -> None:
        if not path.exists():
            write = _write_tar if self.kind == "webdataset" else _write_parquet
            with disk_errors(self.store.out), replacing(path, durable=True) as fresh:
                write(fresh, rows, lambda row: (self.store.images / row["file_name"]).read_bytes(), self.types)
        self._delete_images(rows)

    def _delete_images(self, rows: list[Row]) -> None:
        for row in rows:
            (self.store.images / row["file_name"]).unlink(missing_ok=True)
