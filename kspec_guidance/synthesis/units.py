"""Units: groups of similar prompts, each with one memory and one log of records on shared storage.

    settings.json                              of the run
    prompts.safetensors                        features of the prompts, and the unit of each
    rank-0007/000042.safetensors               record 42 of unit 7, as :mod:`~kspec_guidance.synthesis.records` has it
    images/000007-000042-000002.safetensors    its images, written before it by the second owner of the unit
    summaries/000007-000005.safetensors        what the records of some batches tell the units with similar prompts

A record is created as a whole, on condition that there is none of its number. It decides: what a worker has not committed
has not happened, whoever owns the unit. A worker that was taken for dead and wakes up can commit one thing at most, the
record that would be next; if that exists, it stops, and if not, it becomes the next one, and the new owner goes on from it.
Each record has the token of its owner, and a digest of all records before it, and of the summaries that were read.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.memory.io import MemoryFileError, content_digest, encode_tensors, read_tensors
from kspec_guidance.synthesis.errors import CheckpointError, SynthesisError
from kspec_guidance.synthesis.leases import Lease, LeaseLostError, done_name
from kspec_guidance.synthesis.records import Record, record_of
from kspec_guidance.synthesis.schedule import Sample
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.worker import Progress, Worker
from kspec_guidance.utils.hashing import hash_json

__all__ = ["Unit", "UnitHistory", "UnitLog", "UnitStore", "WaitingError", "load_images", "read_counts"]

BEGINNING = ""  # digest of no records
ADVICE = (
    "restore it from a copy, or delete it and the records of this unit that follow it: their images are then made again"
)


class WaitingError(SynthesisError):
    """The next batch follows a summary that another unit has not published yet.

    Attributes:
        unit: that publishes it.
        number: of the summary.
    """

    def __init__(self, waiting: int, unit: int, number: int):
        super().__init__(f"unit {waiting} waits for unit {unit}")
        self.unit, self.number = unit, number


@dataclass(frozen=True)
class UnitHistory:
    """What happened in one unit, which a run that makes it again follows.

    Attributes:
        prompts: places of its prompts in the list of the run.
        batches: number of its records.
        read: how many summaries of each other unit were read before a batch, by the number of the batch.
        digest: of its records, see :meth:`UnitLog.records`.
    """

    prompts: list[int]
    batches: int
    read: dict[int, dict[int, int]]
    digest: str


def read_counts(record: Record) -> dict[int, int]:
    """How many summaries of each other unit were read before a batch."""
    return {int(unit): len(digests) for unit, digests in (record.lease or {}).get("read", {}).items()}


@dataclass(frozen=True)
class Summary:
    """What some batches of a unit tell others.

    Attributes:
        message: see :func:`~kspec_guidance.synthesis.distributed.encode_message`; None if it tells nothing.
        shape: of one sample; None without any.
        prompt_dim: width of the prompt features.
        digest: of all this.
    """

    message: Tensor | None
    shape: tuple[int, ...] | None
    prompt_dim: int | None
    digest: str


class UnitLog:
    """The records of all units on shared storage, to be read and created.

    Args:
        storage: of the run.
        epoch: that its records are of.
    """

    def __init__(self, storage: Storage, epoch: int = 0):
        self.storage, self.epoch = storage, epoch

    @contextmanager
    def _file(self, name: str) -> Iterator[Path]:
        """A file on this machine; errors name the file of the storage, and say what to do."""
        with self.storage.local(name) as path:
            try:
                yield path
            except (MemoryFileError, CheckpointError) as error:
                text = str(error).replace(str(path), f"{self.storage.place}/{name}")
                text = text.replace("restore it from a copy", ADVICE)
                raise CheckpointError(text) from error

    def read(self, unit: int, number: int) -> Record | None:
        """A record; None if there is none.

        Raises:
            CheckpointError: if it is damaged.
        """
        name = _record_name(unit, number)
        try:
            with self._file(name) as path:
                if not path.is_file():
                    return None
                tensors, about = read_tensors(path, "batch")
                record = record_of(about, tensors, self.epoch, unit, path)
                if record.lease is None:
                    raise CheckpointError(f"{path} is no record of a run with leases; restore it from a copy")
                return record
        except FileNotFoundError:
            return None

    def records(self, unit: int) -> Iterator[tuple[Record, str]]:
        """All records of a unit in order, each with the digest of all up to it.

        Raises:
            CheckpointError: for a record that was made after others than those before it, and at the end of a finished
                unit, if it had other records.
        """
        number, digest, token = 0, BEGINNING, 0
        while (record := self.read(unit, number)) is not None:
            lease: Any = record.lease
            if lease["state"] != digest or lease["token"] < token:
                raise CheckpointError(
                    f"{self.storage.place}/{_record_name(unit, number)} does not follow the records before it, which were "
                    f"changed or lost after it was written; {ADVICE}"
                )
            token, digest = lease["token"], next_digest(digest, record)
            yield record, digest
            number += 1
        end = self.storage.read(done_name(unit))
        if end and end.decode(errors="replace") != digest:  # empty in runs of earlier versions
            raise CheckpointError(
                f"the {number} records in {self.storage.place}/rank-{unit:04d} are not those with which the unit was "
                f"finished: the last one was changed, or some were lost or added. Restore them from a copy; or delete "
                f"{done_name(unit)} and what was changed, and the images are made again"
            )

    def create(self, record: Record) -> bool:
        """Commit a record, unless there is one of its number; whether it was committed here."""
        data = encode_tensors("batch", record.tensors, record.description())
        return self.storage.create(_record_name(record.rank, record.batch_index), data)

    def is_finished(self, unit: int) -> bool:
        """Whether all records of a unit are there."""
        return self.storage.exists(done_name(unit))

    # -- summaries -----------------------------------------------------------------------------------------------------

    def publish(
        self, unit: int, number: int, message: Tensor | None, shape: tuple[int, ...] | None, prompt_dim: int | None
    ) -> None:
        """Write a summary, unless an earlier owner did, whose records it follows from as well."""
        tensors = {} if message is None else {"message": message}
        about = {"shape": None if shape is None else list(shape), "prompt_dim": prompt_dim}
        self.storage.create(_summary_name(unit, number), encode_tensors("summary", tensors, about))

    def has_summary(self, unit: int, number: int) -> bool:
        """Whether a summary was published, or will not be, since its unit is finished."""
        return self.storage.exists(_summary_name(unit, number)) or self.is_finished(unit)

    def summary(self, unit: int, number: int) -> Summary | None:
        """A summary; None if it was not published yet.

        Raises:
            CheckpointError: if it is damaged.
        """
        try:
            with self._file(_summary_name(unit, number)) as path:
                if not path.is_file():
                    return None
                tensors, about = read_tensors(path, "summary")
                shape, width = about.get("shape"), about.get("prompt_dim")
                if not (_are_sizes(shape or []) and _are_sizes([width or 0])):
                    raise CheckpointError(f"{path} is no summary of a unit; restore it from a copy")
        except FileNotFoundError:
            return None
        digest = content_digest(tensors, about)
        return Summary(tensors.get("message"), None if shape is None else tuple(shape), width, digest)


def _are_sizes(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def _record_name(unit: int, number: int) -> str:
    return f"rank-{unit:04d}/{number:06d}.safetensors"


def _summary_name(unit: int, number: int) -> str:
    return f"summaries/{unit:06d}-{number:06d}.safetensors"


def next_digest(digest: str, record: Record) -> str:
    """The digest of the records up to one, from that of the records before it."""
    return hash_json([digest, content_digest(record.tensors, record.description())])


def load_images(storage: Storage, record: Record) -> dict[str, bytes] | None:
    """The images of a record by file name; None if they are not on the storage any more.

    Raises:
        CheckpointError: if they are damaged.
    """
    name = None if record.lease is None else record.lease["images"]
    if name is None:
        return {}
    try:
        with storage.local(name) as path:
            tensors, _ = read_tensors(path, "images")
    except FileNotFoundError:
        return None
    except MemoryFileError as error:
        raise CheckpointError(f"the images {storage.place}/{name} are damaged: {error}; {ADVICE}") from error
    return {name: t.numpy().tobytes() for name, t in tensors.items()}


class UnitStore(Store):
    """What a :class:`Worker` commits to while it owns a unit.

    Args:
        out: folder of the run, with records of earlier epochs, if there are any.
        log: of all units.
        lease: of the unit.
        settings: of the run.

    Attributes:
        digest: of the records so far.
        reads: digests of the summaries that were read since the last record, by unit.
        replayed: images of the records that were there before.
    """

    def __init__(self, out: Path, log: UnitLog, lease: Lease, settings: dict[str, Any]):
        super().__init__(out)
        self.log, self.lease, self.run_settings, self.epoch = log, lease, settings, log.epoch
        self.digest, self.reads, self.replayed = BEGINNING, dict[str, list[str]](), 0

    def settings(self, epoch: int) -> dict[str, Any]:
        return self.run_settings if epoch == self.epoch else super().settings(epoch)

    def append_metadata(self, rows: list[dict[str, Any]]) -> None:
        """Nothing: the metadata are written with the set."""

    def commit(self, record: Record, images: dict[str, bytes]) -> None:
        """Write the images of a batch as one file, then create its record.

        Raises:
            LeaseLostError: if another owner has committed this batch, or owns the unit.
            RunFailedError: if the storage is full or cannot be written to; the batch then does not count.
        """
        name, unit = None, self.lease.unit
        if images:
            name = f"images/{unit:06d}-{record.batch_index:06d}-{self.lease.token:06d}.safetensors"
            tensors = {k: torch.frombuffer(bytearray(data), dtype=torch.uint8) for k, data in images.items()}
            self.log.storage.write(name, encode_tensors("images", tensors, {}))
        about = {"worker": self.lease.worker, "token": self.lease.token, "state": self.digest}
        about |= {"read": self.reads, "images": name}
        record = replace(record, lease=about)
        self.lease.check()
        if not self.log.create(record):
            raise LeaseLostError(f"batch {record.batch_index} of unit {unit} was committed by another worker")
        self.digest, self.reads = next_digest(self.digest, record), {}
        self.lease.images += len(record.rows)

    def replay(self) -> Iterator[Record]:
        """The records of the unit, in order; what is committed afterwards follows them."""
        for record, digest in self.log.records(self.lease.unit):
            self.digest = digest
            self.lease.images += len(record.rows)
            self.replayed += len(record.rows)
            yield record


class Unit:
    """One unit in the hands of its owner.

    Args:
        worker: of its jobs, with a :class:`UnitStore`.
        store: the same.
        history: to follow; None to read what is there.
    """

    def __init__(self, worker: Worker, store: UnitStore, history: UnitHistory | None = None):
        self.worker, self.store, self.log, self.history = worker, store, store.log, history
        self.unit, self.every = store.lease.unit, worker.settings.exchange
        self.heard = dict.fromkeys(worker.memories.neighbours(), 0)  # summaries that were read of each unit
        self.published = 0

    def resume(self) -> None:
        """Restore the state from the records, with the summaries that were read then.

        Raises:
            CheckpointError: for records or summaries that were changed or lost.
        """
        worker = self.worker
        worker.learn_earlier()
        for record in self.store.replay():
            if self.history is not None and read_counts(record) != self.history.read.get(record.batch_index, {}):
                raise CheckpointError(
                    f"record {record.batch_index} of unit {self.unit} in {self.log.storage.place} has read other summaries "
                    "than the set that is made again; choose an empty folder"
                )
            for unit, digests in (record.lease or {}).get("read", {}).items():
                for digest in digests:
                    self._hear(int(unit), digest)
            self._check_images(record, worker.next_batch())
            if worker.arms is not None:  # as when the batch was made
                worker.arms.choose()
            with self._fitting(_record_name(self.unit, record.batch_index)):
                worker.apply(record)
            self._publish()

    def _check_images(self, record: Record, batch: list[Sample]) -> None:
        """Check that a record is of this unit's prompts and seeds, and without arms of the batch that was next."""
        worker, made = self.worker, [*record.rows, *record.rejected]
        known = all(row["prompt"] in worker.job_of for row in made)
        for row in record.rows if known else ():
            sample = worker.job_of[row["prompt"]].sample(row["attempt"], worker.settings.seed)
            known = known and (row["file_name"], row.get("seed")) == (sample.file_name, sample.seed)
        if known and worker.arms is None:  # whose choices may depend on how a machine rounds
            wanted = sorted((sample.job.prompt.text, sample.attempt) for sample in batch)
            known = sorted((row["prompt"], row["attempt"]) for row in made) == wanted
        if not known:
            raise CheckpointError(
                f"{self.log.storage.place}/{_record_name(self.unit, record.batch_index)} has other images than follow the "
                f"records before it: it was changed, or the units in prompts.safetensors were; {ADVICE}"
            )

    @contextmanager
    def _fitting(self, name: str) -> Iterator[None]:
        """Name the file whose tensors do not fit those of the run."""
        try:
            yield
        except (SynthesisError, torch.cuda.OutOfMemoryError):
            raise
        except (ValueError, RuntimeError, IndexError, TypeError, KeyError) as error:
            what = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise CheckpointError(f"{self.log.storage.place}/{name} does not fit the run ({what}); {ADVICE}") from error

    def run(self) -> int:
        """Make all remaining batches; returns the number of images.

        Raises:
            WaitingError: if a history is followed in which a batch has read what is not there yet.
        """
        worker, before = self.worker, self.worker.made
        self._listen()
        with worker.guide.attach(worker.generator.pipe) if worker.arms is None else worker.arms.models.loaded():
            while batch := worker.next_batch():
                worker.step(batch)
                self._publish()
                if worker.progress_callback is not None:
                    made = worker.made - before
                    worker.progress_callback(Progress(made, 0, sum(worker.rejected.values()), 0.0, 0.0, worker.diversity))
                if worker.batch_index % self.every == 0 or self.history is not None:
                    self._listen()
        self._publish(last=True)
        return worker.made - before

    def _listen(self) -> None:
        """Read what other units have published since the last time, or as much of it as was read in the history."""
        if self.history is None:
            wanted: dict[int, float] = dict.fromkeys(self.heard, float("inf"))
        else:
            wanted = dict(self.history.read.get(self.worker.batch_index, {}))
        for unit, left in wanted.items():
            complete = self.history is None or self.log.is_finished(unit)  # asked before the summaries are
            while left > 0 and (summary := self._hear(unit)) is not None:
                self.store.reads.setdefault(str(unit), []).append(summary.digest)
                left -= 1
            if left > 0 and not complete:
                raise WaitingError(self.unit, unit, self.heard.get(unit, 0))

    def _hear(self, unit: int, digest: str | None = None) -> Summary | None:
        """Add the next summary of a unit, which must have this digest; None if there is none."""
        memories, number = self.worker.memories, self.heard.get(unit, 0)
        found = self.log.summary(unit, number)
        if digest is not None and (found is None or found.digest != digest):
            raise CheckpointError(
                f"summary {number} of unit {unit} in {self.log.storage.place}, which unit {self.unit} has read, is "
                f"{'missing' if found is None else 'another one now'}; restore it from a copy"
            )
        if found is None:
            return None
        self.heard[unit] = number + 1
        if found.message is not None:
            if memories.shape is None:
                memories.shape, memories.prompt_dim = found.shape, found.prompt_dim
            with self._fitting(_summary_name(unit, number)):
                memories.absorb(found.message.to(self.worker.generator.device))
        if self.worker.arms is not None:
            for k in range(number * self.every, (number + 1) * self.every):
                record = self.log.read(unit, k)
                if record is None:
                    break
                self.worker.arms.learn(record)
        return found

    def _publish(self, last: bool = False) -> None:
        """Write the summary of the last batches, when there are enough, or at the end."""
        memories, batches = self.worker.memories, self.worker.batch_index
        due = batches > self.published * self.every if last else batches == (self.published + 1) * self.every
        if memories.prompt_features is None or not due:
            return
        message = memories.message(self.unit, memories.unsent)
        memories.unsent.clear()
        self.log.publish(self.unit, self.published, message, memories.shape, memories.prompt_dim)
        self.published += 1
