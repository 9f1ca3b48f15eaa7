"""Store: the folder of a run. One record for each batch lists what is finished; all else is derived from the records.

A batch is committed in this order: its images, each written to a temporary file and renamed into place, then its record, a
safetensors file with a checksum that holds the rows of the metadata and the tensors that the memory adds. If a run ends
between the two, images without a record are deleted and made again, from the same seeds and with the same memory.

    out/metadata.jsonl                          one line for each image, for datasets.load_dataset("imagefolder")
    out/0000/000012-0003.png                    prompt 12, attempt 3
    out/.kspec/epoch-000/settings.json          settings of the run; other settings begin a new epoch
    out/.kspec/epoch-000/rank-0001/000042.safetensors
"""

import json
import re
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock

from kspec_guidance.memory.io import MemoryFileError, read_about, read_tensors, write_tensors
from kspec_guidance.synthesis.columns import TYPES, column_types
from kspec_guidance.synthesis.errors import CheckpointError, FolderError, SettingsChangedError, disk_errors
from kspec_guidance.synthesis.records import IMAGE, LISTED, LOST, Record, json_row, record_of
from kspec_guidance.synthesis.settings import differences
from kspec_guidance.utils.atomic_io import replace_all, replacing
from kspec_guidance.utils.messages import warn_user

__all__ = ["Store", "lock_folder"]

TEMPORARY = re.compile(r"\..+\.\d+\.tmp")
DATA_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".tar", ".parquet")


def lock_folder(out: Path, state: Path) -> filelock.BaseFileLock:
    """Claim the folder ``out`` by a lock in its folder ``state``; the system releases it when the process ends in any way.

    Raises:
        FolderError: if another run holds it.
    """
    state.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(state / "lock", timeout=0)
    try:
        lock.acquire()
    except filelock.Timeout as error:
        raise FolderError(f"another run is writing to {out}; wait for it, or choose another folder") from error
    return lock


class Store:
    """The folder of a run, as this module describes it.

    Args:
        out: the folder; created if it does not exist.
        images: the folder of the images: ``out``, or one beside the records from which they are packed into shards.

    Attributes:
        epoch: the one that batches are committed to.
    """

    def __init__(self, out: Path, images: Path | None = None):
        self.out, self.state = out, out / ".kspec"
        self.images = out if images is None else images
        self.epoch = 0
        self._lock: filelock.BaseFileLock | None = None

    # -- opening -------------------------------------------------------------------------------------------------------

    def lock(self) -> None:
        """Claim the folder for this run; the system releases it when the process ends in any way.

        Raises:
            FolderError: if another run holds it, or if it holds other data.
            RunFailedError: if it cannot be written to.
        """
        with disk_errors(self.out):
            if not self.state.exists():
                self._refuse_foreign_files()
            self._lock = lock_folder(self.out, self.state)

    def _refuse_foreign_files(self) -> None:
        """Refuse a new folder with files that ``load_dataset`` would take for a part of the set."""
        for pattern in ("*", "*/*"):
            for path in self.out.glob(pattern):
                if path.suffix.lower() in DATA_SUFFIXES or path.stem == "metadata":
                    raise FolderError(
                        f"{self.out} holds a {path.relative_to(self.out)} that no run of this program wrote; choose an "
                        "empty folder, so that the set consists of its own files"
                    )

    def unlock(self) -> None:
        """Release the folder."""
        if self._lock is not None:
            self._lock.release()

    def folder(self, epoch: int, rank: int | None = None) -> Path:
        """The folder of an epoch, or of one process in it."""
        path = self.state / f"epoch-{epoch:03d}"
        return path if rank is None else path / f"rank-{rank:04d}"

    def epochs(self) -> list[int]:
        """All epochs, in order."""
        return sorted(int(p.parent.name[6:]) for p in self.state.glob("epoch-*/settings.json"))

    def begin(
        self,
        settings: dict[str, Any],
        force: bool,
        types: Mapping[str, type | None] | None = None,
        drop: Collection[str] = (),
    ) -> list[dict[str, Any]]:
        """Continue the last epoch if its settings are the same, or begin a new one. One process does this.

        Other settings need no ``force`` as long as there are no images.

        Args:
            settings: of the run.
            force: begin a new epoch if settings changed, and leave out what is damaged or lost.
            types: of the users' own columns; see :func:`column_types`.
            drop: file names of finished images to leave out, of which others are made.

        Returns:
            The rows of all finished images, in the order of prompts and attempts.

        Raises:
            SettingsChangedError: if the settings changed, without ``force``.
            CheckpointError: if records, images or settings are damaged or lost, without ``force``.
            FolderError: if the set has another format, or the users' own columns have other types.
        """
        epochs = self.epochs()
        self.epoch = epochs[-1] if epochs else 0
        rows, damaged = self._read_rows(force)
        missing = [
            row["file_name"] for row in rows if self.images == self.out and not (self.out / row["file_name"]).exists()
        ]
        if missing and not force:
            raise CheckpointError(
                f"{len(missing)} finished images are missing from {self.out}, for instance {missing[0]}; restore them, or "
                "give force=True (--force), which makes as many new ones"
            )
        old = self.settings(self.epoch) if epochs else {}
        if epochs and not old and not force:
            raise CheckpointError(
                f"{self.folder(self.epoch) / 'settings.json'} is damaged; restore it from a copy, or give force=True "
                "(--force), which keeps the finished images and continues with the settings given now"
            )
        if rows and old and old["format"][0] != settings["format"][0]:
            raise FolderError(
                f"{self.out} holds a set in format {old['format'][0]!r}; choose another folder for format "
                f"{settings['format'][0]!r}"
            )
        self._check_columns(rows, types or {}, settings["format"][0])
        changed = differences(old, settings)
        if rows and changed and not force:
            raise SettingsChangedError(self.out, changed, len(rows))
        gone = dict.fromkeys(sorted(missing), LOST) | dict.fromkeys(sorted(self._to_drop(rows, drop)), LISTED)
        if not epochs or changed or damaged or gone:
            self._new_epoch(self.epoch + 1 if epochs else 0, settings, gone)
        return sorted((row for row in rows if row["file_name"] not in gone), key=lambda row: row["file_name"])

    def _to_drop(self, rows: list[dict[str, Any]], drop: Collection[str]) -> set[str]:
        """The finished images among those to drop; names that were dropped before are not there any more."""
        finished = {row["file_name"] for row in rows}
        unknown = sorted(set(drop) - finished - self.lost_images().keys())
        if unknown:
            raise FolderError(
                f"{len(unknown)} of {len(drop)} names to drop are no images of {self.out}, for instance {unknown[0]!r}; "
                "give names as in the column file_name"
            )
        found = finished & set(drop)
        if found and self.images != self.out:
            raise FolderError(
                f"images cannot be dropped from the shards of {self.out}; make the set with format 'imagefolder', or pass "
                "the list to evaluate --drop"
            )
        return found

    def _check_columns(self, rows: list[dict[str, Any]], types: Mapping[str, type | None], kind: str) -> None:
        """Refuse own columns that cannot be read together with those of the finished images."""
        old = column_types(rows)
        changed = []
        for name in old.keys() & types.keys():
            before, now = old[name], types[name]
            if before is not None and now is not None and before != now:
                changed.append(f"{name}: {TYPES[before]} before, now {TYPES[now]}")
        if rows and kind == "parquet":  # whose files must have the same columns
            changed += [f"{name}: none before" for name in types.keys() - old.keys()]
            changed += [f"{name}: none now" for name in old.keys() - types.keys()]
        early = bool(rows) and not all("model" in row for row in rows)
        if early and kind == "parquet":
            raise FolderError(
                f"{self.out} was begun by an earlier version of this program, whose tables have no columns of model and "
                "licence, and load_dataset could not read them with those that have; finish it with that version, or "
                "choose another folder"
            )
        if early and kind == "webdataset":
            warn_user(
                f"{self.out} was begun by an earlier version of this program, whose shards have no columns of model and "
                "licence; load_dataset takes the columns from the first shard, so it needs features= to read those of the "
                "others"
            )
        if changed:
            raise FolderError(
                f"{self.out} holds images with other columns of prompts ({'; '.join(sorted(changed))}), with which "
                "load_dataset could not read the set; give the columns as before, or choose another folder"
            )

    def _new_epoch(self, number: int, settings: dict[str, Any], gone: dict[str, str]) -> None:
        self.epoch = number
        with disk_errors(self.out):
            self.folder(number).mkdir(parents=True, exist_ok=True)
        if gone:
            self._write_json(self.folder(number) / "gone.json", gone)
        self._write_json(self.folder(number) / "settings.json", settings)

    def _read_rows(self, force: bool) -> tuple[list[dict[str, Any]], bool]:
        """All rows, with all records checked, and whether some are damaged; ``force`` renames those and leaves them out."""
        rows, damaged, lost = [], False, self.lost_images()
        for epoch, rank, path in list(self._all_paths()):
            try:
                rows += self.read(path, epoch, rank, lost).rows
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
        """The settings of an epoch; empty if they cannot be read."""
        try:
            return json.loads((self.folder(epoch) / "settings.json").read_text())
        except (OSError, ValueError):
            return {}

    def clean(self, keep: set[str]) -> None:
        """Delete what a killed run left: images that are not in ``keep``, and temporary files."""
        with disk_errors(self.out):
            for folder in (self.images, *self.images.glob("[0-9]*")):
                for path in folder.iterdir() if folder.is_dir() else ():
                    own = folder != self.images and IMAGE.fullmatch(path.name)
                    unlisted = own and f"{folder.name}/{path.name}" not in keep
                    if path.is_file() and (unlisted or TEMPORARY.fullmatch(path.name)):
                        path.unlink()
            for path in self.state.rglob(".*.tmp"):
                path.unlink()

    # -- reading -------------------------------------------------------------------------------------------------------

    def paths(self, epoch: int, rank: int) -> list[Path]:
        """Records of one process, in order; in the current epoch, up to the first that is missing."""
        found: list[Path] = []
        for path in sorted(self.folder(epoch, rank).glob("*.safetensors")):
            if epoch == self.epoch and int(path.stem) != len(found):
                break
            found.append(path)
        return found

    def ranks(self, epoch: int) -> list[int]:
        """The processes of an epoch."""
        return sorted(int(p.name[5:]) for p in self.folder(epoch).glob("rank-*"))

    def _all_paths(self) -> Iterator[tuple[int, int, Path]]:
        for epoch in self.epochs():
            for rank in self.ranks(epoch):
                for path in self.paths(epoch, rank):
                    yield epoch, rank, path

    def records(self, epochs: list[int] | None = None, tensors: bool = False) -> Iterator[Record]:
        """Records by epoch, rank and number.

        Args:
            epochs: those to read; all by default.
            tensors: read the tensors as well, and verify the checksum.
        """
        lost = self.lost_images()
        for epoch, rank, path in self._all_paths():
            if epochs is None or epoch in epochs:
                yield self.read(path, epoch, rank, lost, tensors)

    def earlier_records(self, tensors: bool = False) -> Iterator[Record]:
        """Records of the epochs before this one."""
        return self.records([epoch for epoch in self.epochs() if epoch < self.epoch], tensors)

    def process_records(self, rank: int, first: int = 0, last: int | None = None) -> Iterator[Record]:
        """Records ``first:last`` of one process in this epoch, with tensors."""
        lost = self.lost_images()
        for path in self.paths(self.epoch, rank)[first:last]:
            yield self.read(path, self.epoch, rank, lost)

    def read(self, path: Path, epoch: int, rank: int, lost: Mapping[str, str], tensors: bool = True) -> Record:
        """Read one record; images in ``lost`` count as rejected.

        Raises:
            CheckpointError: if it is damaged. Without ``tensors`` the checksum is not verified.
        """
        try:
            data, about = read_tensors(path, "batch") if tensors else ({}, read_about(path, "batch"))
        except MemoryFileError as error:
            raise CheckpointError(str(error)) from error
        record = record_of(about, data, epoch, rank, path)
        return record.without(lost) if any(row["file_name"] in lost for row in record.rows) else record

    def lost_images(self) -> dict[str, str]:
        """Images that were left out after they were finished, by file name: lost, or on a list of names to drop.

        Earlier versions wrote names without reasons.
        """
        found: dict[str, str] = {}
        for path in self.state.glob("epoch-*/gone.json"):
            gone = json.loads(path.read_text())
            found |= gone if isinstance(gone, dict) else dict.fromkeys(gone, LOST)
        return found

    def rows(self) -> list[dict[str, Any]]:
        """All rows in the order of prompts and attempts."""
        rows = [row for record in self.records() for row in record.rows]
        return sorted(rows, key=lambda row: row["file_name"])

    # -- writing -------------------------------------------------------------------------------------------------------

    def commit(self, record: Record, images: dict[str, bytes]) -> None:
        """Write the images of a batch, by file name, then its record.

        Raises:
            RunFailedError: if the disk is full or cannot be written to; the batch then does not count.
        """
        with disk_errors(self.out):
            replace_all({self.images / name: data for name, data in images.items()})
            folder = self.folder(record.epoch, record.rank)
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / f"{record.batch_index:06d}.safetensors"
            write_tensors(path, "batch", record.tensors, record.description(), durable=True)

    def append_metadata(self, rows: list[dict[str, Any]]) -> None:
        """Append the rows of a batch to the metadata in one write; they are sorted at the end of the run."""
        with disk_errors(self.out), open(self.out / "metadata.jsonl", "ab", buffering=0) as file:
            file.write("".join(json_row(row) + "\n" for row in rows).encode())

    def write_metadata(self, rows: list[dict[str, Any]]) -> None:
        """Replace ``metadata.jsonl``."""
        with disk_errors(self.out), replacing(self.out / "metadata.jsonl", durable=True) as fresh, fresh.open("w") as file:
            file.writelines(json_row(row) + "\n" for row in rows)

    def write_times(self) -> None:
        """Replace ``times.jsonl``, when each image was finished; not in the metadata, which is the same in each run."""
        times = {row["file_name"]: record.time for record in self.records() for row in record.rows}
        with disk_errors(self.out), replacing(self.out / "times.jsonl") as fresh, fresh.open("w") as file:
            file.writelines(json_row({"file_name": name, "time": times[name]}) + "\n" for name in sorted(times))

    def write_summary(self, summary: dict[str, Any]) -> None:
        """Replace ``summary.json``."""
        self._write_json(self.out / "summary.json", summary)

    def _write_json(self, path: Path, value: Any) -> None:
        with disk_errors(self.out), replacing(path, durable=True) as fresh:
            fresh.write_text(json.dumps(value, indent=1) + "\n")

    @property
    def free_bytes(self) -> int:
        """Bytes left on the disk."""
        path = self.out
        while not path.exists():
            path = path.parent
        return shutil.disk_usage(path).free
