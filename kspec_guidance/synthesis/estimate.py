"""What a run would do, how long, and with how much memory and disk: measured on one batch, with nothing written."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.memory import CentroidMemory, choose_memory
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.jobs import make_jobs, next_batch
from kspec_guidance.synthesis.processes import Processes
from kspec_guidance.synthesis.prompts import read_prompts
from kspec_guidance.synthesis.quotas import split_quotas
from kspec_guidance.synthesis.records import Store
from kspec_guidance.synthesis.worker import png

__all__ = ["Estimate", "estimate"]

MEASURED = 5.0  # seconds under which a first batch is warming up, and a second one is timed


@dataclass(frozen=True)
class Estimate:
    """Numbers of a run that has not been made; bytes and seconds."""

    prompts: int
    images: int
    finished: int
    batches: int
    processes: int
    seconds: float
    batch_seconds: float
    memory: str
    memory_bytes: int
    disk_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        short = f", more than the {_size(self.free_bytes)} that are free" if self.disk_bytes > self.free_bytes else ""
        there = f", {self.finished} of them finished" if self.finished else ""
        each = f"{self.processes} processes" if self.processes > 1 else "one process"
        return (
            f"{self.images} images of {self.prompts} prompts{there}, {self.batches} batches on {each}\n"
            f"about {timedelta(seconds=round(self.seconds))} at {self.batch_seconds:.2f} s a batch, as one batch took now\n"
            f"memory of each process: up to {_size(self.memory_bytes)} ({self.memory})\n"
            f"disk: about {_size(self.disk_bytes)}{short}\n"
            "nothing was written"
        )


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


def estimate(
    prompts: Any,
    out: str | Path,
    pipe: Any,
    guide: KernelGuidance,
    images: int = 8,
    batch: int = 8,
    *,
    call: Mapping[str, Any] | None = None,
    quotas: Mapping[str, Any] | None = None,
    memory: str = "auto",
    processes: int | None = None,
) -> Estimate:
    """Arguments as of :func:`synthesize`; ``processes`` is the number that will be started, this run's own by default."""
    found, (counts, _) = read_prompts(prompts), split_quotas(quotas)
    jobs = make_jobs(found, images, counts)
    total = sum(job.goal for job in jobs)
    store = Store(Path(out))
    finished = sum(len(record.rows) for record in store.records()) if store.state.exists() else 0
    world = processes or Processes().world
    samples = next_batch(jobs, batch, 0, lambda job: None)
    if not samples:
        return Estimate(len(found), total, finished, 0, world, 0.0, 0.0, "none", 0, 0, store.free)
    remember = guide.remember
    generator = Generator(pipe, guide, dict(call or {}))
    try:
        with guide.attach(pipe):
            for _ in range(2):
                began = time.perf_counter()
                made = generator.make(samples)
                seconds = time.perf_counter() - began
                if seconds > MEASURED:
                    break
    finally:
        guide.remember = remember
    row = made.x[0].numel() * 4
    text = 0 if made.t is None else made.t.shape[1] * 4
    picture = sum(len(png(image)) for image in made.images) / len(made.images)
    bank: Any = choose_memory(total, tuple(made.x.shape[1:])) if memory == "auto" else None
    kind, size = "exact rows", total * row
    if memory == "centroids" or isinstance(bank, CentroidMemory):
        bank = bank or CentroidMemory()
        kind, size = f"{bank.capacity} weighted means", min(bank.capacity, total) * (row + text)
    elif bank is not None and bank.dtype == torch.float16:
        kind, size = "exact rows in float16", total * row // 2
    left = max(0, total - finished)
    batches = -(-left // batch)
    disk = int(left * (picture + row + 600) + batches * (text + 2000))
    rounds = -(-batches // world)
    return Estimate(
        len(found), total, finished, batches, world, rounds * seconds, seconds, kind, int(size), disk, store.free
    )
