"""estimate: how long a run of any number of processes would take, with how much memory and disk, from one batch."""

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.memory import CentroidMemory, choose_memory
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.generator import GeneratedBatch, Generator
from kspec_guidance.synthesis.marks import Marks
from kspec_guidance.synthesis.prompts import read_prompts
from kspec_guidance.synthesis.quotas import Attribute, split_quotas
from kspec_guidance.synthesis.schedule import Job, Sample, make_jobs, next_batch
from kspec_guidance.synthesis.settings import check_candidates, check_counts, check_memory
from kspec_guidance.synthesis.sharding import shard, shard_groups
from kspec_guidance.synthesis.store import Store
from kspec_guidance.utils.arguments import renamed_arguments
from kspec_guidance.utils.messages import readable_size, readable_time

__all__ = ["Estimate", "Share", "estimate"]

WARM_UP_SECONDS = 1.5  # a first batch that takes no longer is a warm-up, and a second one is timed
TRIAL_SECONDS = 3.0  # of a batch, beyond which fewer steps are timed
FEATURE_SECONDS = 4.0  # for features of prompts, from which the run assigns them to processes
LISTED_PROCESSES = 8  # in the text
ROW_BYTES, RECORD_BYTES = 600, 2000  # on the disk: metadata of an image, and a record without its tensors


@dataclass(frozen=True)
class Share:
    """What one process would do.

    Attributes:
        prompts: assigned to it.
        images: left to make.
        batches: left to make.
        seconds: until it has made them.
    """

    prompts: int
    images: int
    batches: int
    seconds: float


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        prompts: distinct prompts.
        images: in the whole set.
        finished: of these, those that the folder already holds.
        batches: left to make.
        processes: that share them.
        seconds: until the last process has finished, if each has a device as fast as this one.
        batch_seconds: of one batch.
        timed_steps: number of steps of the batch that was timed, if all of them would have taken too long; else None.
        shares: of each process.
        assigned: whether the shares come from the prompts' own features, as in a run; else from even loads, since the
            features of so many prompts would take too long here.
        memory: kind of the memory.
        memory_bytes: of each process, at most.
        disk_bytes: for images and records that are left to make.
        free_bytes: on the disk.
        baseline_images: that are made first, without guidance, where the guide has a baseline that is not in the cache.
        baseline_seconds: that they take.
    """

    prompts: int
    images: int
    finished: int
    batches: int
    processes: int
    seconds: float
    batch_seconds: float
    timed_steps: int | None
    shares: list[Share]
    assigned: bool
    memory: str
    memory_bytes: int
    disk_bytes: int
    free_bytes: int
    baseline_images: int = 0
    baseline_seconds: float = 0.0

    def with_baseline(self, images: int, batch_size: int) -> "Estimate":
        """The same with a baseline of so many images, in batches that take as long as those of the run."""
        seconds = -(-images // batch_size) * self.batch_seconds
        return replace(self, baseline_images=images, baseline_seconds=seconds)

    def __str__(self) -> str:
        excess = (
            f", more than the {readable_size(self.free_bytes)} that are free" if self.disk_bytes > self.free_bytes else ""
        )
        finished = f", {self.finished} of them finished" if self.finished else ""
        several = self.processes > 1
        timed = "one batch" if self.timed_steps is None else f"{self.timed_steps} of its steps"
        lines = [
            f"{self.images} images of {self.prompts} prompts{finished}, {self.batches} batches on "
            + (f"{self.processes} processes" if several else "one process"),
            *(self._share_lines() if several else []),
            f"about {readable_time(self.seconds)} at {self.batch_seconds:.2f} s a batch, as {timed} took now"
            + (", if each process has a device as fast as this one" if several else ""),
            *([self._baseline_line()] if self.baseline_images else []),
            f"memory of each process: up to {readable_size(self.memory_bytes)} ({self.memory})",
            f"disk: about {readable_size(self.disk_bytes)}{excess}",
            "nothing was written",
        ]
        return "\n".join(lines)

    def _baseline_line(self) -> str:
        return (
            f"before that a baseline of {_count(self.baseline_images, 'image')}, once for this model and settings: about "
            f"{readable_time(self.baseline_seconds)}"
        )

    def _share_lines(self) -> list[str]:
        about = "" if self.assigned else " (even loads; a run keeps similar prompts together)"
        if self.processes <= LISTED_PROCESSES:
            return [
                f"process {rank}: {_count(s.prompts, 'prompt')}, {_count(s.images, 'image')}, "
                f"about {readable_time(s.seconds)}{about}"
                for rank, s in enumerate(self.shares)
            ]
        ranges = []
        for name in ("prompts", "images"):
            numbers = [getattr(s, name) for s in self.shares]
            ranges.append(f"{min(numbers)} to {max(numbers)} {name}")
        return [f"each process: {', '.join(ranges)}{about}"]


def _count(n: int, name: str) -> str:
    return f"{n} {name}" if n == 1 else f"{n} {name}s"


@renamed_arguments(images="images_per_prompt", batch="batch_size")
@torch.inference_mode(False)  # as in synthesize
@torch.no_grad()
def estimate(
    prompts: Any,
    out: str | Path,
    pipe: Any,
    guide: KernelGuidance,
    images_per_prompt: int = 8,
    batch_size: int = 8,
    *,
    call: Mapping[str, Any] | None = None,
    quotas: Mapping[str, int | Attribute] | None = None,
    memory: str = "auto",
    memory_by: str = "all",
    processes: int | None = None,
    candidates: int = 1,
    start_candidates: int = 1,
) -> Estimate:
    """Estimate a run of :func:`synthesize` from one or two batches, or a few steps of a slow one; nothing is written.

    The prompts of each process are those that a run of so many processes would assign to it, if their features are
    computed within seconds.

    Args:
        prompts: a list, a file or a dataset, see :func:`read_prompts`.
        out: the folder of the run; finished images in it are counted.
        pipe: a text-to-image pipeline.
        guide: of the run.
        images_per_prompt: number of images of each prompt.
        batch_size: images made at once.
        call: arguments of every pipeline call.
        quotas: as in :func:`synthesize`; attributes are not used.
        memory: kind of the memory, as in :func:`synthesize`.
        memory_by: ``all`` or ``group``, as there.
        processes: number of processes of the run; those of this program by default.
        candidates: images made for each one that is kept.
        start_candidates: noises of each image, of which one is chosen by its first prediction.

    Raises:
        SynthesisError: for prompts, quotas or arguments of the call that cannot work.
    """
    check_counts(0, images_per_prompt=images_per_prompt)
    check_counts(batch_size=batch_size, processes=1 if processes is None else processes, start_candidates=start_candidates)
    check_candidates(candidates, batch_size)
    check_memory(memory, memory_by)
    prompt_list, (counts, _) = read_prompts(prompts), split_quotas(quotas)
    jobs = make_jobs(prompt_list, images_per_prompt, counts)
    total = sum(job.goal for job in jobs)
    store = Store(Path(out))
    kept = Counter(row["prompt"] for record in store.records() for row in record.rows) if store.state.exists() else {}
    for job in jobs:
        job.kept = min(kept.get(job.prompt.text, 0), job.goal)
    finished = sum(kept.values())
    world_size = processes or Processes().world_size
    samples = next_batch(jobs, batch_size, 0, lambda job: None, candidates)
    if not samples:
        shares = [Share(0, 0, 0, 0.0)] * world_size
        return Estimate(
            len(prompt_list), total, finished, 0, world_size, 0.0, 0.0, None, shares, False, "none", 0, 0, store.free_bytes
        )
    remember, targets = guide.remember, [term.target for term in guide.terms]
    generator = Generator(pipe, guide, dict(call or {}), start_candidates)
    try:
        for term in guide.terms:
            term.target = None
        generator.check_mixed(jobs, batch_size, screened=False)
        with guide.attach(pipe):
            texts = [sample.job.prompt.text for sample in samples]
            generator.one_step(texts)  # a warm-up
            start = time.perf_counter()
            generator.one_step(texts)
            step_seconds = time.perf_counter() - start
            batch, batch_seconds, steps = _timed_batch(generator, samples, step_seconds)
        owners, assigned = _owners(generator, jobs, batch_size, memory_by, world_size, step_seconds)
    finally:
        guide.remember = remember
        for term, target in zip(guide.terms, targets, strict=True):
            term.target = target
    sample_bytes = batch.x[0].numel() * 4
    prompt_bytes = 0 if batch.prompt_features is None else batch.prompt_features.shape[1] * 4
    image_bytes = sum(len(Marks().encode(image, {})) for image in batch.images) / len(batch.images)
    bank: Any = choose_memory(total, tuple(batch.x.shape[1:])) if memory == "auto" else None
    kind, memory_bytes = "exact rows", total * sample_bytes
    if memory == "centroids" or isinstance(bank, CentroidMemory):
        bank = bank or CentroidMemory()
        kind = f"{bank.capacity} weighted means"
        memory_bytes = min(bank.capacity, total) * (sample_bytes + prompt_bytes)
    elif bank is not None and bank.dtype == torch.float16:
        kind, memory_bytes = "exact rows in float16", total * sample_bytes // 2
    shares = []
    for rank in range(world_size):
        own = [job for job, owner in zip(jobs, owners, strict=True) if owner == rank]
        images = sum(job.goal - job.kept for job in own)
        share_batches = -(-images // (batch_size // candidates))
        shares.append(Share(len(own), images, share_batches, share_batches * batch_seconds))
    left, batches = sum(share.images for share in shares), sum(share.batches for share in shares)
    disk_bytes = left * (image_bytes + sample_bytes + ROW_BYTES) + batches * (prompt_bytes + RECORD_BYTES)
    return Estimate(
        prompts=len(prompt_list),
        images=total,
        finished=finished,
        batches=batches,
        processes=world_size,
        seconds=max(share.seconds for share in shares),
        batch_seconds=batch_seconds,
        timed_steps=steps,
        shares=shares,
        assigned=assigned,
        memory=kind,
        memory_bytes=int(memory_bytes),
        disk_bytes=int(disk_bytes),
        free_bytes=store.free_bytes,
    )


def _timed_batch(
    generator: Generator, samples: list[Sample], step_seconds: float
) -> tuple[GeneratedBatch, float, int | None]:
    """A batch, how long it takes, and the number of steps that were timed if not all of them were."""
    steps: Any = generator.call.get("num_inference_steps")
    k = max(2, int(TRIAL_SECONDS / 2 / step_seconds))
    fixed = not isinstance(steps, int) or {"timesteps", "sigmas"} & set(generator.call)
    if not fixed and k < steps and steps * step_seconds > TRIAL_SECONDS:
        settings = generator.call | {"num_inference_steps": k}
        trial = Generator(generator.pipe, generator.guide, settings, generator.start_candidates)
        batch, seconds = _timed(trial, samples)
        before = step_seconds * (trial.start_candidates if trial.start_candidates > 1 else 0)  # the choice of noises
        return batch, seconds + (steps - k) * max(0.0, seconds - before - step_seconds) / (k - 1), k
    batch, seconds = _timed(generator, samples)
    if seconds <= WARM_UP_SECONDS:
        batch, seconds = _timed(generator, samples)
    return batch, seconds, None


def _timed(generator: Generator, samples: list[Sample]) -> tuple[GeneratedBatch, float]:
    start = time.perf_counter()
    batch = generator.make(samples)
    return batch, time.perf_counter() - start


def _owners(
    generator: Generator, jobs: Sequence[Job], batch_size: int, memory_by: str, world_size: int, step_seconds: float
) -> tuple[list[int], bool]:
    """The process of each prompt, and whether it is that of a run; else loads are even."""
    sizes, texts = [job.goal for job in jobs], [job.prompt.text for job in jobs]
    if world_size == 1:
        return [0] * len(jobs), True
    if memory_by == "group":
        return shard_groups([job.prompt.group for job in jobs], sizes, world_size), True
    features, affordable = None, -(-len(texts) // batch_size) * step_seconds <= FEATURE_SECONDS
    if affordable:
        features = generator.prompt_features(texts, batch_size)
    return shard(torch.zeros(len(texts), 1) if features is None else features, sizes, world_size), affordable
