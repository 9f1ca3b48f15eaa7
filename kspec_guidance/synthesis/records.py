"""Store: the folder of a run. One record a batch says what is finished; everything else can be made again from records.

A batch is committed in this order: its images, each written beside its place and renamed into it, then its record, a
safetensors file with a checksum that holds the rows of the metadata and what the memory is to learn. Where a run ends
between the two, images without a record are deleted and made again, from the same seeds and the same memory.

    out/metadata.jsonl                          one line an image, for datasets.load_dataset("imagefolder")
    out/0000/000012-0003.png                    prompt 12, attempt 3
    out/.kspec/epoch-000/settings.json          what the run was made with
    out/.kspec/epoch-000/rank-0001/000042.safetensors
"""

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import filelock
from torch import Tensor

from kspec_guidance.memory.io import MemoryFileError, read_about, read_tensors, write_tensors
from kspec_guidance.synthesis.errors import CheckpointError, SettingsChangedError, SynthesisError, explained
from kspec_guidance.utils.atomic_io import replace_all, replacing

__all__ = ["Record", "Store", "differences"]

IMAGE = re.compile(r"\d{6,}-\d{4,}\.png")
LEFT_OVER = re.compile(r"\..+\.\d+\.tmp")


@dataclass
class Record:
    """One finished batch."""

    epoch: int
    rank: int
    unit: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def without(self, gone: set[str]) -> "Record":
        """The record, with some images counted as rejected."""
        keep = [k for k, row in enumerate(self.rows) if row["file_name"] not in gone]
        lost = [
            {"prompt": row["prompt"], "attempt": row["attempt"], "reason": "lost"}
            for row in self.rows
            if row["file_name"] in gone
        ]
        tensors = {name: t[keep] if len(t) == len(self.rows) else t for name, t in self.tensors.items()}
        return Record(self.epoch, self.rank, self.unit, [self.rows[k] for k in keep], self.rejected + lost, tensors)


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two nested settings differ, one line each.

    >>> differences({"seed": 0, "call": {"steps": 20}}, {"seed": 0, "call": {"steps": 30}, "batch": 8})
    ['batch: none before, now 8', 'call.steps: 20 before, now 30']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        found = []
        for key in sorted({*old, *new}, key=str):
            found += differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return found
    if old == new:
        return []
    said = ["none" if v is None else json.dumps(v) if not isinstance(v, str) else v for v in (old, new)]
    return [f"{name}: {_short(said[0])} before, now {_short(said[1])}"]


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."


class Store:
    """See the module's first lines.

    Args:
        out: the folder; made if it is not there.
        images: the folder that images go to; ``out`` itself, or one beside the records from which they are packed.
    """

    def __init__(self, out: Path, images: Path | None = None):
        self.out, self.state = out, out / ".kspec"
        self.images = out if images is None else images
        self.epoch = 0
        self._lock: filelock.BaseFileLock | None = None

    # -- opening ---------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Claim the folder for this run; the system lets it go when the process ends, however it ends.

        Raises:
            SynthesisError: if another run has it, or it cannot be written to, or holds something else.
        """
        with explained(self.out):
            if (self.out / "metadata.jsonl").exists() and not self.state.exists():
                raise SynthesisError(
                    f"{self.out} holds a metadata.jsonl that no run of this program wrote; choose an empty folder"
                )
            self.state.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(self.state / "lock", timeout=0)
            try:
                self._lock.acquire()
            except filelock.Timeout as error:
                raise SynthesisError(
                    f"another run is writing to {self.out}; wait for it, or choose another folder"
                ) from error

    def unlock(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def folder(self, epoch: int, rank: int | None = None) -> Path:
        path = self.state / f"epoch-{epoch:03d}"
        return path if rank is None else path / f"rank-{rank:04d}"

    def epochs(self) -> list[int]:
        return sorted(int(p.parent.name[6:]) for p in self.state.glob("epoch-*/settings.json"))

    def begin(self, settings: dict[str, Any], force: bool) -> list[dict[str, Any]]:
        """Go on with the last epoch if its settings are these, or begin a new one. Done by one process.

        Returns:
            The rows of all finished images, in the order of prompts and attempts.

        Raises:
            SettingsChangedError, CheckpointError: without ``force``, see there.
        """
        epochs = self.epochs()
        self.epoch = epochs[-1] if epochs else 0
        rows, damaged = self._read_all(force)
        missing = [
            row["file_name"] for row in rows if self.images == self.out and not (self.out / row["file_name"]).exists()
        ]
        if missing and not force:
            raise CheckpointError(
                f"{len(missing)} finished images are gone from {self.out}, {missing[0]} for one; put them back, or give "
                "force=True (--force), which makes as many anew"
            )
        old = self.settings(self.epoch) if epochs else {}
        if epochs and not old and not force:
            raise CheckpointError(
                f"{self.folder(self.epoch) / 'settings.json'} is damaged; restore it from a copy, or give force=True "
                "(--force), which keeps the finished images and goes on with the settings given now"
            )
        if old and old["format"][0] != settings["format"][0]:
            raise SynthesisError(
                f"{self.out} holds a set in format {old['format'][0]!r}; choose another folder for another"
            )
        changed = differences(old, settings)
        if epochs and changed and not force:
            raise SettingsChangedError(self.out, changed, len(rows))
        if not epochs or changed or damaged or missing:
            self._new_epoch(self.epoch + 1 if epochs else 0, settings, missing)
        return sorted((row for row in rows if row["file_name"] not in set(missing)), key=lambda row: row["file_name"])

    def _new_epoch(self, number: int, settings: dict[str, Any], missing: list[str]) -> None:
        self.epoch = number
        with explained(self.out):
            self.folder(number).mkdir(parents=True, exist_ok=True)
        if missing:
            self._write_json(self.folder(number) / "gone.json", missing)
        self._write_json(self.folder(number) / "settings.json", settings)

    def _read_all(self, force: bool) -> tuple[list[dict[str, Any]], bool]:
        """All rows, every record checked, and whether some cannot be read; with force these are set aside."""
        rows, damaged, gone = [], False, self.gone()
        for epoch, rank, path in list(self._every()):
            try:
                rows += self.read(path, epoch, rank, gone).rows
            except CheckpointError as error:
                if not force:
                    raise CheckpointError(
                        f"{error}. Other finished images are safe. Or give force=True (--force), which leaves this batch "
                        "out and makes its images again"
                    ) from error
                path.rename(path.with_suffix(".damaged"))
                damaged = True
        return rows, damaged

    def settings(self, epoch: int) -> dict[str, Any]:
        """What an epoch was made with; empty if that cannot be read."""
        try:
            return json.loads((self.folder(epoch) / "settings.json").read_text())
        except (OSError, ValueError):
            return {}

    def clean(self, keep: set[str]) -> None:
        """Delete what a killed run left: images without a record, and unfinished files."""
        with explained(self.out):
            for folder in (self.images, *self.images.glob("[0-9]*")):
                for path in folder.iterdir() if folder.is_dir() else ():
                    whole = IMAGE.fullmatch(path.name) and f"{path.parent.name}/{path.name}" not in keep
                    if path.is_file() and (whole or LEFT_OVER.fullmatch(path.name)):
                        path.unlink()
            for path in self.state.rglob(".*.tmp"):
                path.unlink()

    # -- reading ---------------------------------------------------------------------------------------------------

    def paths(self, epoch: int, rank: int) -> list[Path]:
        """Records of one process, in order, up to the first that is missing."""
        found: list[Path] = []
        for path in sorted(self.folder(epoch, rank).glob("*.safetensors")):
            if epoch == self.epoch and int(path.stem) != len(found):
                break
            found.append(path)
        return found

    def ranks(self, epoch: int) -> list[int]:
        return sorted(int(p.name[5:]) for p in self.folder(epoch).glob("rank-*"))

    def _every(self) -> Iterator[tuple[int, int, Path]]:
        for epoch in self.epochs():
            for rank in self.ranks(epoch):
                for path in self.paths(epoch, rank):
                    yield epoch, rank, path

    def records(self, epochs: list[int] | None = None, tensors: bool = False) -> Iterator[Record]:
        """All records, or those of some epochs, by epoch, rank and number; with ``tensors`` they are read whole, and
        checked."""
        gone = self.gone()
        for epoch, rank, path in self._every():
            if epochs is None or epoch in epochs:
                yield self.read(path, epoch, rank, gone, tensors)

    def of_process(self, rank: int, first: int = 0, last: int | None = None) -> Iterator[Record]:
        """Records of one process in this epoch, or some of them, whole."""
        gone = self.gone()
        for path in self.paths(self.epoch, rank)[first:last]:
            yield self.read(path, self.epoch, rank, gone)

    def read(self, path: Path, epoch: int, rank: int, gone: set[str], whole: bool = True) -> Record:
        try:
            tensors, about = read_tensors(path, "batch") if whole else ({}, read_about(path, "batch"))
        except MemoryFileError as error:
            raise CheckpointError(str(error)) from error
        record = Record(epoch, rank, int(path.stem), about["rows"], about["rejected"], tensors)
        return record.without(gone) if any(row["file_name"] in gone for row in record.rows) else record

    def gone(self) -> set[str]:
        """Images that were lost after they were finished, and given up by ``force``."""
        return {name for path in self.state.glob("epoch-*/gone.json") for name in json.loads(path.read_text())}

    # -- writing ---------------------------------------------------------------------------------------------------

    def commit(self, record: Record, images: dict[str, bytes]) -> None:
        """Write images, then the record that says they are there.

        Raises:
            SynthesisError: if the disk is full or cannot be written to; the batch then does not count.
        """
        with explained(self.out):
            replace_all({self.images / name: data for name, data in images.items()})
            folder = self.folder(record.epoch, record.rank)
            folder.mkdir(parents=True, exist_ok=True)
            about = {"rows": record.rows, "rejected": record.rejected}
            write_tensors(folder / f"{record.unit:06d}.safetensors", "batch", record.tensors, about, durable=True)

    def append(self, rows: list[dict[str, Any]]) -> None:
        """Metadata of a batch, at the end of the file, in one write; :meth:`finish` sorts it."""
        with explained(self.out), open(self.out / "metadata.jsonl", "ab", buffering=0) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def finish(self) -> list[dict[str, Any]]:
        """All rows in the order of prompts and attempts."""
        rows = [row for record in self.records() for row in record.rows]
        return sorted(rows, key=lambda row: row["file_name"])

    def write_metadata(self, rows: list[dict[str, Any]]) -> None:
        with explained(self.out), replacing(self.out / "metadata.jsonl", durable=True) as fresh, fresh.open("w") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)

    def write_summary(self, value: dict[str, Any]) -> None:
        self._write_json(self.out / "summary.json", value)

    def _write_json(self, path: Path, value: Any) -> None:
        with explained(self.out), replacing(path, durable=True) as fresh:
            fresh.write_text(json.dumps(value, indent=1) + "\n")

    @property
    def free(self) -> int:
        """Bytes left on the disk."""
        place = self.out
        while not place.exists():
            place = place.parent
        return shutil.disk_usage(place).free
