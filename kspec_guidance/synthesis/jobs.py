"""Jobs: each prompt with the images that are still wanted of it, and how batches are filled from them."""

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor

from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.prompts import Prompt

PATIENCE = 4  # images made for each one wanted, before a prompt whose images are rejected is given up

__all__ = ["Job", "Sample", "image_seed", "make_jobs", "next_batch"]


@dataclass(eq=False)
class Job:
    """One prompt. ``attempts`` counts images made, ``kept`` those in the set; over at ``goal`` or when ``stopped``."""

    number: int
    prompt: Prompt
    goal: int
    kept: int = 0
    attempts: int = 0
    patience: int = 0
    stopped: str = ""
    features: list[Tensor] = field(default_factory=list)

    @property
    def over(self) -> bool:
        return bool(self.stopped) or self.kept >= self.goal


@dataclass(frozen=True)
class Sample:
    """One image to be made."""

    job: Job
    attempt: int
    seed: int

    @property
    def file_name(self) -> str:
        return f"{self.job.number // 1000:04d}/{self.job.number:06d}-{self.attempt:04d}.png"


def image_seed(seed: int, prompt: str, attempt: int) -> int:
    """The seed of an image: it depends on nothing but these three, so not on the order of prompts or of processes.

    >>> image_seed(0, "heart", 0) == image_seed(0, "heart", 0) != image_seed(0, "heart", 1)
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{attempt}/{prompt}".encode()).digest()[:6], "big")


def goals(prompts: Sequence[Prompt], images: int, quotas: Mapping[str, int]) -> list[int]:
    """Images of each prompt: its own number, an equal part of its group's quota, or ``images``.

    Raises:
        SynthesisError: for a quota of a group that no prompt has.
    """
    members: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if prompt.group is not None:
            members.setdefault(prompt.group, []).append(i)
    unknown = sorted(set(quotas) - set(members))
    if unknown:
        known = ", ".join(sorted(members)[:10]) or "none; prompts need a column 'group'"
        raise SynthesisError(f"no prompt has group {', '.join(unknown)}; groups are {known}")
    found = [p.images if p.images is not None else images * p.times for p in prompts]
    for group, total in quotas.items():
        for k, i in enumerate(members[group]):
            found[i] = total // len(members[group]) + (k < total % len(members[group]))
    return found


def make_jobs(
    prompts: Sequence[Prompt], images: int, quotas: Mapping[str, int], numbers: Mapping[str, int] | None = None
) -> list[Job]:
    """A job for each prompt; prompts of an earlier epoch keep the numbers that their files bear."""
    numbers = numbers or {}
    free = max(numbers.values(), default=-1) + 1
    jobs = []
    for prompt, goal in zip(prompts, goals(prompts, images, quotas), strict=True):
        number = numbers.get(prompt.text)
        if number is None:
            number, free = free, free + 1
        jobs.append(Job(number, prompt, goal, patience=PATIENCE * goal + 8))
    return jobs


def next_batch(jobs: Iterable[Job], size: int, seed: int, together: Callable[[Job], object]) -> list[Sample]:
    """Up to ``size`` samples, of the first jobs that are not over and whose ``together`` is the same."""
    batch: list[Sample] = []
    for job in jobs:
        if job.over:
            continue
        if batch and together(batch[0].job) != together(job):
            continue
        n = min(size - len(batch), job.goal - job.kept)
        for k in range(job.attempts, job.attempts + n):
            batch.append(Sample(job, k, image_seed(seed, job.prompt.text, k)))
        if len(batch) == size:
            break
    return batch
