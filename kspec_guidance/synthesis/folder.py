"""The folder of a run, when it is opened: claimed, compared with the settings, and cleaned."""

import hashlib
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from kspec_guidance.memory.io import MemoryFileError, content_digest, read_tensors, write_tensors
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.errors import CheckpointError, RunFailedError, SynthesisError, disk_errors
from kspec_guidance.synthesis.history import History, history_of
from kspec_guidance.synthesis.records import Record
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import UnitLog, load_images
from kspec_guidance.utils.atomic_io import replace_all

__all__ = ["collect", "open_folder", "prompt_numbers", "stored_settings"]


def open_folder(
    store: Store,
    processes: Processes,
    settings: dict[str, Any],
    force: bool,
    types: dict[str, type | None],
    drop: Collection[str],
) -> None:
    """Claim and prepare the folder in process 0; all processes raise if that fails."""
    failure: SynthesisError | None = None
    if processes.rank == 0:
        try:
            store.lock()
            unpack_earlier(store, force)
            rows = store.begin(settings, force, types, drop)
            store.clean({row["file_name"] for row in rows})
            for epoch in store.epochs():
                if epoch != store.epoch:
                    Storage(store.folder(epoch)).delete("images")  # which are unpacked
            if store.images == store.out:
                store.write_metadata(rows)
        except SynthesisError as error:
            store.unlock()
            failure = error
    if processes.world_size > 1:
        message = processes.broadcast_text("" if failure is None else str(failure))
        if message and failure is None:
            raise RunFailedError(f"process 0 could not begin: {message}")
        store.epoch = processes.gather_integers(store.epoch)[0][0]
    if failure is not None:
        raise failure


def prompt_numbers(store: Store) -> dict[str, int]:
    """The numbers of prompts in earlier epochs."""
    numbers: dict[str, int] = {}
    for record in store.earlier_records():
        for row in record.rows:
            numbers.setdefault(row["prompt"], row["prompt_number"])
    return numbers


def unpack_earlier(store: Store, force: bool = False) -> None:
    """Write the images of finished batches that workers have left on the storage of a run in this folder.

    Args:
        store: of the folder.
        force: leave out what is damaged.
    """
    for epoch in store.epochs():
        storage = Storage(store.folder(epoch))
        if not storage.names("images"):
            continue
        for rank in store.ranks(epoch):
            for path in store.paths(epoch, rank):
                try:
                    unpack_images(store, storage, store.read(path, epoch, rank, {}, tensors=False))
                except CheckpointError:
                    if not force:
                        raise


def unpack_images(store: Store, storage: Storage, record: Record) -> bool:
    """Write the images of a record into the folder, unless they are there; False if they are nowhere.

    Raises:
        CheckpointError: if they are damaged.
    """
    lost = store.lost_images()
    rows = [row for row in record.rows if row["file_name"] not in lost]
    if all((store.images / row["file_name"]).exists() for row in rows):
        return True
    found = load_images(storage, record)
    if found is None:
        return False
    for row in rows:
        if hashlib.sha256(found.get(row["file_name"], b"")).hexdigest() != row["sha256"]:
            raise CheckpointError(
                f"the image {row['file_name']} in {storage.place} is not the one that its record names; restore it from a "
                "copy, or give force=True (--force), which makes another one"
            )
    with disk_errors(store.out):
        replace_all({store.images / row["file_name"]: found[row["file_name"]] for row in rows})
    return True


def collect(store: Store, log: UnitLog, owners: list[int]) -> History:
    """Write the images of all units into a folder, then copy their records, unless it has the same.

    Args:
        store: of the folder.
        log: of the units, all of which are finished.
        owners: unit of each prompt.

    Returns:
        What happened in the units.

    Raises:
        CheckpointError: for records or images that are damaged, or were changed.
    """
    in_place = log.storage.folder == store.folder(store.epoch)

    def collected(unit: int) -> Iterator[tuple[Record, str]]:
        for record, digest in log.records(unit):
            if not unpack_images(store, log.storage, record) and store.images == store.out:
                raise CheckpointError(
                    f"images of batch {record.batch_index} of unit {unit} are missing from {log.storage.place}, for "
                    f"instance {record.rows[0]['file_name']}; restore them from a copy"
                )
            path = store.folder(store.epoch, unit) / f"{record.batch_index:06d}.safetensors"
            if not (in_place or _holds(path, record)):
                with disk_errors(store.out):
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_tensors(path, "batch", record.tensors, record.description(), durable=True)
            yield record, digest

    return history_of(owners, collected)


def _holds(path: Path, record: Record) -> bool:
    """Whether a file holds this record."""
    try:
        found = content_digest(*read_tensors(path, "batch"))
    except (MemoryFileError, OSError):
        return False
    return found == content_digest(record.tensors, record.description())


def stored_settings(storage: Storage) -> dict[str, Any] | None:
    """The settings of the run on a storage; None if there is none.

    Raises:
        CheckpointError: if they are damaged.
    """
    data = storage.read("settings.json")
    try:
        return None if data is None else dict(json.loads(data))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{storage.place}/settings.json is damaged; restore it from a copy") from error
