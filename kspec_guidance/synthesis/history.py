"""units.jsonl: what each unit of a run with leases has read of others, which makes the same set again.

One line for each unit: its prompts, by their places in the list of the run; the number of its batches; how many summaries
of which other units were read before which batch; and the digest of its records. Summaries themselves are made again.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from kspec_guidance.synthesis.errors import CheckpointError
from kspec_guidance.synthesis.records import Record
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import UnitHistory, UnitLog, read_counts

__all__ = ["UNITS", "History", "history_of", "read_history"]

UNITS = "units.jsonl"


@dataclass(frozen=True)
class History:
    """What happened in all units, by number."""

    units: list[UnitHistory]

    @property
    def owners(self) -> list[int]:
        """The unit of each prompt."""
        found = {k: unit for unit, history in enumerate(self.units) for k in history.prompts}
        return [found[k] for k in range(len(found))]

    @property
    def any_read(self) -> bool:
        """Whether any unit has read of another one, so that images depend on when workers came."""
        return any(unit.read for unit in self.units)

    def text(self) -> str:
        """The file."""
        return "".join(json.dumps(asdict(unit)) + "\n" for unit in self.units)

    @property
    def sha256(self) -> str:
        """Of the file."""
        return hashlib.sha256(self.text().encode()).hexdigest()

    def first_impossible(self, exchange: int) -> tuple[int, int] | None:
        """The unit and batch that have read what no order of all batches can have made before; None if all is possible.

        Args:
            exchange: batches of one summary.
        """
        made = [0] * len(self.units)

        def published(unit: int) -> int:
            whole, rest = divmod(made[unit], exchange)
            return whole + (rest > 0 and made[unit] == self.units[unit].batches)

        heard = [dict[int, int]() for _ in self.units]
        left = {unit for unit, history in enumerate(self.units) if history.batches}
        while left:
            before = sum(made)
            for unit in sorted(left):
                history = self.units[unit]
                while made[unit] < history.batches:
                    wanted = history.read.get(made[unit], {})
                    total = {other: heard[unit].get(other, 0) + number for other, number in wanted.items()}
                    if any(published(other) < number for other, number in total.items()):
                        break
                    heard[unit] |= total
                    made[unit] += 1
                else:
                    left.discard(unit)
            if sum(made) == before:
                unit = min(left)
                return unit, made[unit]
        return None


def history_of(owners: list[int], records: Callable[[int], Iterator[tuple[Record, str]]]) -> History:
    """What happened in a finished run.

    Args:
        owners: unit of each prompt.
        records: of a unit, in order, each with the digest of all up to it.
    """
    prompts: list[list[int]] = [[] for _ in range(max(owners, default=-1) + 1)]
    for k, owner in enumerate(owners):
        prompts[owner].append(k)
    units = []
    for unit, own in enumerate(prompts):
        number, digest, read = 0, "", dict[int, dict[int, int]]()
        for record, digest in records(unit):  # noqa: B007, the last one counts
            found = read_counts(record)
            if found:
                read[number] = found
            number += 1
        units.append(UnitHistory(own, number, read, digest))
    return History(units)


def read_history(folder: Path, sha256: str, number: int, exchange: int) -> History:
    """Read ``units.jsonl``, and compare it with the records of the set, if they are there.

    Args:
        folder: of the set.
        sha256: of the file, as reproduce.yaml has it.
        number: of prompts.
        exchange: batches of one summary.

    Raises:
        CheckpointError: if the file or the records are missing, damaged or were changed.
    """
    path = folder / UNITS
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path}, which says what the workers of the set have read of each other ({error.strerror}); keep "
            "it beside reproduce.yaml"
        ) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise CheckpointError(f"{path} is not the file that reproduce.yaml names; restore it from a copy")
    try:
        history = History([_unit(json.loads(line)) for line in data.decode().splitlines()])
        prompts, impossible = len(history.owners), history.first_impossible(exchange)
        if prompts != number:
            raise ValueError(f"{prompts} prompts in place of {number}")
        if impossible is not None:
            raise ValueError(f"batch {impossible[1]} of unit {impossible[0]} has read what was not there before it")
    except (ValueError, TypeError, KeyError, AttributeError, IndexError) as error:
        raise CheckpointError(f"{path} is damaged ({type(error).__name__}: {error}); restore it from a copy") from error
    store = Store(folder)
    for epoch in store.epochs()[-1:]:
        log = UnitLog(Storage(store.folder(epoch)), epoch)
        found = history_of(history.owners, log.records)
        for unit, (now, then) in enumerate(zip(found.units, history.units, strict=True)):
            if now != then:
                raise CheckpointError(
                    f"the {now.batches} records in {store.folder(epoch, unit)} are not the {then.batches} that {path} "
                    "names: the last one was changed, or some were lost or added; restore them from a copy"
                )
    return history


def _unit(about: dict[str, Any]) -> UnitHistory:
    read = {int(k): {int(unit): int(n) for unit, n in found.items()} for k, found in about["read"].items()}
    return UnitHistory([int(k) for k in about["prompts"]], int(about["batches"]), read, str(about["digest"]))
