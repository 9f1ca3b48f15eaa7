"""Leases: which worker owns which unit of a run, decided by files on shared storage.

    leases/000007-000002    the second owner of unit 7; created on condition that there is none
    beats/000007-000002     its heartbeat: a number that grows while it lives, or that it has released the unit
    done/000007             the unit is finished; the digest of its records

The number of the owner is the token. It grows by one with each owner, and creating the next file is what decides between
two workers. A lease counts as dead once its heartbeat has not changed for some time by the clock of the one who looks; no
machine compares its clock with that of another.

A worker that was taken for dead, and goes on, does no harm: each record of a unit has a number, and is created on condition
that there is none of it (see :mod:`~kspec_guidance.synthesis.units`).
"""

import json
import os
import platform
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress

from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.storage import Storage

__all__ = ["Lease", "LeaseLostError", "Leases", "done_name"]

NUMBER = re.compile(r"\d{6,}")
BEATS = 4  # heartbeats in the time after which a lease counts as dead


class LeaseLostError(SynthesisError):
    """Another worker owns the unit now; what was not committed is lost."""


class Lease:
    """The ownership of one unit.

    Args:
        storage: shared by all workers.
        unit: its number.
        token: number of the owner, from 1.
        worker: name of the owner.

    Attributes:
        images: of the unit so far, for those who watch.
    """

    def __init__(self, storage: Storage, unit: int, token: int, worker: str):
        self.storage, self.unit, self.token, self.worker = storage, unit, token, worker
        self.images = self._beats = 0
        self._lock = threading.Lock()
        self._released = False

    def beat(self) -> None:
        """Show that the owner lives."""
        with self._lock:
            if not self._released:
                self._beats += 1
                self._write({"beat": self._beats, "images": self.images})

    def _write(self, about: dict) -> None:
        self.storage.write(f"beats/{self.unit:06d}-{self.token:06d}", json.dumps(about).encode())

    def check(self) -> None:
        """Check that no other worker has taken the unit.

        Raises:
            LeaseLostError: if one has.
        """
        if self.storage.exists(_name(self.unit, self.token + 1)):
            raise LeaseLostError(f"unit {self.unit} was taken by another worker")

    def release(self, end: str | None = None) -> None:
        """Give the unit back; if it is finished, with the digest of its records."""
        if end is not None:
            self.storage.create(done_name(self.unit), end.encode())
        with self._lock:
            self._released = True
            self._write({"released": True, "images": self.images})

    @contextmanager
    def beating(self, seconds: float) -> Iterator[None]:
        """Beat in a thread, so often that others do not take the owner for dead.

        Args:
            seconds: after which a lease counts as dead.
        """
        stop = threading.Event()

        def run() -> None:
            while not stop.wait(seconds / BEATS):
                try:
                    self.beat()
                except Exception:  # the next commit says what is wrong with the storage
                    continue

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


class Leases:
    """The leases of a run, as one worker sees them.

    Args:
        storage: shared by all workers.
        units: their number.
        seconds: after which a lease whose heartbeat has not changed counts as dead.
        worker: name of this worker; a new one by default.
        clock: seconds that never run backwards, from any beginning.
    """

    def __init__(
        self,
        storage: Storage,
        units: int,
        seconds: float = 120.0,
        worker: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self.storage, self.units, self.seconds, self.clock = storage, units, seconds, clock
        self.worker = worker or f"{platform.node()}-{os.getpid()}-{uuid.uuid4().hex[:12]}"
        self._seen: dict[int, tuple[tuple[int, bytes | None], float]] = {}

    def done(self) -> set[int]:
        """The finished units."""
        return {unit for (unit,) in self._numbers("done", 1)}

    def tokens(self) -> dict[int, int]:
        """The token of the last owner of each unit that had one."""
        found: dict[int, int] = {}
        for unit, token in self._numbers("leases", 2):
            found[unit] = max(found.get(unit, 0), token)
        return found

    def _numbers(self, folder: str, parts: int) -> Iterator[tuple[int, ...]]:
        """The numbers that the names of files consist of, of this run's units; others wrote the rest, such as Thumbs.db."""
        for name in self.storage.names(folder):
            numbers = name.split("-")
            if (
                len(numbers) == parts
                and all(NUMBER.fullmatch(number) for number in numbers)
                and int(numbers[0]) < self.units
            ):
                yield tuple(map(int, numbers))

    def images(self) -> int:
        """Images so far, as the last owners of all units say."""
        total = 0
        for unit, token in self.tokens().items():
            beat = self.storage.read(f"beats/{unit:06d}-{token:06d}")
            with suppress(ValueError, TypeError, KeyError):  # no heartbeat yet, or a damaged one
                total += int(json.loads(beat or b"")["images"])
        return total

    def take(self, order: Sequence[int] | None = None) -> Lease | None:
        """Own a unit that nobody owns, or whose owner is dead or gave it back; None if there is none at the moment.

        Args:
            order: in which units are tried; by number by default.
        """
        tokens, done = self.tokens(), self.done()
        left = [unit for unit in (range(self.units) if order is None else order) if unit not in done]
        for unit in sorted(left, key=lambda unit: unit in tokens):  # those that had no owner first
            token = tokens.get(unit, 0)
            if token and not self._is_free(unit, token):
                continue
            about = {"worker": self.worker, "token": token + 1, "nonce": uuid.uuid4().hex}
            if self.storage.create(_name(unit, token + 1), json.dumps(about).encode()):
                self._seen.pop(unit, None)
                lease = Lease(self.storage, unit, token + 1, self.worker)
                lease.beat()
                return lease
        return None

    def _is_free(self, unit: int, token: int) -> bool:
        """Whether an owner has released the unit, or has shown no life for too long."""
        beat = self.storage.read(f"beats/{unit:06d}-{token:06d}")
        if beat is not None and b'"released"' in beat:
            return True
        now, state = self.clock(), (token, beat)
        seen = self._seen.get(unit)
        if seen is None or seen[0] != state:
            self._seen[unit] = state, now
            return False
        return now - seen[1] >= self.seconds


def done_name(unit: int) -> str:
    """The file that says that a unit is finished."""
    return f"done/{unit:06d}"


def _name(unit: int, token: int) -> str:
    return f"leases/{unit:06d}-{token:06d}"
