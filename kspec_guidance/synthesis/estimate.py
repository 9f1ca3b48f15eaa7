"""estimate: how long a run would take, with how much memory and disk, measured on one batch."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.memory import CentroidMemory, choose_memory
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.prompts import read_prompts
from kspec_guidance.synthesis.quotas import Attribute, split_quotas
from kspec_guidance.synthesis.records import Store
from kspec_guidance.synthesis.schedule import make_jobs, next_batch
from kspec_guidance.synthesis.worker import encode_png
from kspec_guidance.utils.arguments import renamed_arguments

__all__ = ["Estimate", "estimate"]

WARM_UP_SECONDS = 5.0  # a first batch that takes no longer is a warm-up, and a second one is timed
ROW_BYTES, RECORD_BYTES = 600, 2000  # on the disk: metadata of an image, and a record without its tensors


@dataclass(frozen=True)
class Estimate:
    """What a run would take.

    Attributes:
        prompts: distinct prompts.
        images: in the whole set.
        finished: of these, those that the folder already holds.
        batches: left to make.
        processes: that share them.
        seconds: until the end.
        batch_seconds: of one batch.
        memory: kind of the memory.
        memory_bytes: of each process, at most.
        disk_bytes: for images and records that are left to make.
        free_bytes: on the disk.
    """

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
        excess = f", more than the {_size(self.free_bytes)} that are free" if self.disk_bytes > self.free_bytes else ""
        finished = f", {self.finished} of them finished" if self.finished else ""
        processes = f"{self.processes} processes" if self.processes > 1 else "one process"
        return (
            f"{self.images} images of {self.prompts} prompts{finished}, {self.batches} batches on {processes}\n"
            f"about {timedelta(seconds=round(self.seconds))} at {self.batch_seconds:.2f} s a batch, as one batch took now\n"
            f"memory of each process: up to {_size(self.memory_bytes)} ({self.memory})\n"
            f"disk: about {_size(self.disk_bytes)}{excess}\n"
            "nothing was written"
        )


def _size(n: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if n < 1000:
            return f"{n:.3g} {unit}"
        n /= 1000
    return f"{n:.3g} TB"


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
    processes: int | None = None,
) -> Estimate:
    """Estimate a run of :func:`synthesize` from one or two batches; nothing is written.

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
        processes: number of processes of the run; those of this program by default.

    Raises:
        SynthesisError: for prompts, quotas or arguments of the call that cannot work.
    """
    prompt_list, (counts, _) = read_prompts(prompts), split_quotas(quotas)
    jobs = make_jobs(prompt_list, images_per_prompt, counts)
    total = sum(job.goal for job in jobs)
    store = Store(Path(out))
    finished = sum(len(record.rows) for record in store.records()) if store.state.exists() else 0
    world_size = processes or Processes().world_size
    samples = next_batch(jobs, batch_size, 0, lambda job: None)
    if not samples:
        return Estimate(len(prompt_list), total, finished, 0, world_size, 0.0, 0.0, "none", 0, 0, store.free_bytes)
    remember = guide.remember
    generator = Generator(pipe, guide, dict(call or {}))
    try:
        generator.check_mixed(jobs, batch_size, screened=False)
        with guide.attach(pipe):
            for _ in range(2):
                start = time.perf_counter()
                batch = generator.make(samples)
                batch_seconds = time.perf_counter() - start
                if batch_seconds > WARM_UP_SECONDS:
                    break
    finally:
        guide.remember = remember
    sample_bytes = batch.x[0].numel() * 4
    prompt_bytes = 0 if batch.prompt_features is None else batch.prompt_features.shape[1] * 4
    image_bytes = sum(len(encode_png(image)) for image in batch.images) / len(batch.images)
    bank: Any = choose_memory(total, tuple(batch.x.shape[1:])) if memory == "auto" else None
    kind, memory_bytes = "exact rows", total * sample_bytes
    if memory == "centroids" or isinstance(bank, CentroidMemory):
        bank = bank or CentroidMemory()
        kind = f"{bank.capacity} weighted means"
        memory_bytes = min(bank.capacity, total) * (sample_bytes + prompt_bytes)
    elif bank is not None and bank.dtype == torch.float16:
        kind, memory_bytes = "exact rows in float16", total * sample_bytes // 2
    left = max(0, total - finished)
    batches = -(-left // batch_size)
    disk_bytes = left * (image_bytes + sample_bytes + ROW_BYTES) + batches * (prompt_bytes + RECORD_BYTES)
    return Estimate(
        prompts=len(prompt_list),
        images=total,
        finished=finished,
        batches=batches,
        processes=world_size,
        seconds=-(-batches // world_size) * batch_seconds,
        batch_seconds=batch_seconds,
        memory=kind,
        memory_bytes=int(memory_bytes),
        disk_bytes=int(disk_bytes),
        free_bytes=store.free_bytes,
    )
