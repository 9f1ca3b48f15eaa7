"""Assignment: which process, or which unit, makes the images of which prompts."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from kspec_guidance.memory.io import MemoryFileError, encode_tensors, read_tensors, write_tensors
from kspec_guidance.synthesis.arms import BY_PROMPT, SELECTORS
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.errors import CheckpointError, SynthesisError, disk_errors
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.history import History
from kspec_guidance.synthesis.run import Run
from kspec_guidance.synthesis.schedule import Job
from kspec_guidance.synthesis.sharding import bundles, groups_of, shard, shard_groups
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store

__all__ = ["Units", "share_out", "units_of"]

PROMPTS = "prompts.safetensors"  # features and owners of the prompts of an epoch
LARGE_UNITS = 64  # units that a run has at least, if one group has all of its images and prompts enough


def share_out(
    store: Store,
    processes: Processes,
    generator: Generator,
    jobs: list[Job],
    batch_size: int,
    by_group: bool,
    by_prompt: bool,
) -> tuple[list[int], list[Tensor] | None, dict[str, Tensor] | None]:
    """The process of each prompt, what is exchanged, and contexts; features are kept in a file for resumed runs.

    Args:
        store: of the run.
        processes: of the run.
        generator: of the prompt features.
        jobs: of all processes.
        batch_size: prompts at once.
        by_group: whether all prompts of a group are in one process, so that nothing is exchanged.
        by_prompt: whether arms are chosen by prompt.

    Returns:
        The process of each job; the prompt features of each process, None if nothing is exchanged; and the features of
        each prompt, None if arms are not chosen by them.

    Raises:
        SynthesisError: if arms are chosen by prompt, and the pipeline gives no features of prompts.
    """
    world_size, goals = processes.world_size, [job.goal for job in jobs]
    exchanged = world_size > 1 and not by_group
    owners = [0] * len(jobs)
    if world_size > 1 and by_group:
        owners = shard_groups([job.prompt.group for job in jobs], goals, world_size)
    if not (exchanged or by_prompt):
        return owners, None, None
    path = store.folder(store.epoch) / PROMPTS
    if not processes.gather_integers(int(path.exists()))[0][0]:
        part = generator.prompt_features([job.prompt.text for job in jobs[processes.rank :: world_size]], batch_size)
        parts = processes.gather(torch.zeros(0, 1) if part is None else part)
        known = sum(map(len, parts)) == len(jobs)
        features = torch.zeros(len(jobs), parts[0].shape[1] if known else 1)
        if known:
            for rank, rows in enumerate(parts):
                features[rank::world_size] = rows
        owners = shard(features, goals, world_size) if exchanged else owners
        if processes.rank == 0:
            tensors = {"features": features, "owners": torch.tensor(owners)}
            with disk_errors(store.out):
                write_tensors(path, "prompts", tensors, {"known": known}, durable=True)
        processes.wait_for_all()
    owners, parts, contexts = _read(path, generator, jobs, world_size, by_prompt)
    return owners, parts if exchanged else None, contexts


def _read(
    path: Path, generator: Generator, jobs: list[Job], number: int | None, by_prompt: bool
) -> tuple[list[int], list[Tensor], dict[str, Tensor] | None]:
    """The owner of each prompt, the features of the prompts of each of ``number`` owners, and those of each prompt.

    Raises:
        CheckpointError: if the file is damaged, or of other prompts.
    """
    try:
        tensors, about = read_tensors(path, "prompts")
        owner, features, known, contexts = tensors["owners"], tensors["features"], about["known"], None
        if owner.shape != (len(jobs),) or owner.dtype != torch.int64 or len(features) != len(jobs) or features.ndim != 2:
            raise ValueError(f"owners {list(owner.shape)} and features {list(features.shape)} of {len(jobs)} prompts")
        if set(owner.tolist()) - set(range(len(jobs) if number is None else number)):
            raise ValueError("owners out of range")
        if not isinstance(known, bool):
            raise ValueError(f"known is {known!r} in place of true or false")
    except (MemoryFileError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is damaged ({type(error).__name__}: {error}); restore it from a copy. It says who makes the images of "
            "which prompts"
        ) from error
    if by_prompt:
        if not known:
            raise SynthesisError(
                f"{type(generator.pipe).__name__} gives no embeddings of prompts, by which this selector chooses; use "
                f"{', '.join(select for select in SELECTORS if select not in BY_PROMPT)} or a mixture method"
            )
        contexts = {job.prompt.text: row for job, row in zip(jobs, features, strict=True)}
    if not known:
        features = features[:, :0]
    numbers = range(int(owner.max()) + 1 if number is None else number)
    return owner.tolist(), [features[owner == k] for k in numbers], contexts


@dataclass(frozen=True)
class Units:
    """The units of a run with leases.

    Attributes:
        owners: unit of each prompt.
        prompt_features: of the prompts of each unit ``[n, p]``; None if nothing is exchanged.
        contexts: features of each prompt, if arms are chosen by them.
    """

    owners: list[int]
    prompt_features: list[Tensor] | None
    contexts: dict[str, Tensor] | None

    @property
    def number(self) -> int:
        """How many there are."""
        return max(self.owners, default=-1) + 1


def units_of(run: Run, jobs: list[Job], storage: Storage, history: History | None = None) -> Units:
    """The units of a run, which the first worker that comes makes and writes, and all others read.

    Similar prompts are one unit, unless they have more than 1/64 of all images, and more than what is made between two
    exchanges. With a memory of each group, a unit is a group.

    Args:
        run: of the units.
        jobs: of all prompts.
        storage: of the run.
        history: whose units these are.

    Raises:
        SynthesisError: if arms are chosen by prompt, and the pipeline gives no features of prompts.
        CheckpointError: if the storage has other units than the history.
    """
    a, by_group = run.arguments, run.arguments["memory_by"] == "group"
    if PROMPTS not in storage.names():  # a large file, which is read once
        goals, found = [job.goal for job in jobs], None
        if not by_group or run.by_prompt:
            found = run.generator.prompt_features([job.prompt.text for job in jobs], a["batch_size"])
        features = torch.zeros(len(jobs), 1) if found is None else found
        owners = [0] * len(jobs)
        if history is not None:
            pieces = [unit.prompts for unit in history.units]
        elif by_group:
            groups = [job.prompt.group for job in jobs]
            pieces = [[k for k, group in enumerate(groups) if group == name] for name in dict.fromkeys(groups)]
        else:
            largest = max(a["batch_size"] * a["exchange"], sum(goals) / LARGE_UNITS)
            pieces = bundles(groups_of(features), goals, largest)
        for unit, piece in enumerate(pieces):
            for k in piece:
                owners[k] = unit
        tensors = {"features": features, "owners": torch.tensor(owners)}
        storage.create(PROMPTS, encode_tensors("prompts", tensors, {"known": found is not None}))
    with storage.local(PROMPTS) as path:
        owners, parts, contexts = _read(path, run.generator, jobs, None, run.by_prompt)
    if history is not None and owners != history.owners:
        raise CheckpointError(
            f"{storage.place} has other units of prompts than the set that is made again; choose an empty folder"
        )
    return Units(owners, None if by_group or len(parts) == 1 else parts, contexts)
