"""Schedule: which images are still to be made of each prompt, and when a prompt is finished."""

import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.statistics import jackknife
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.prompts import Prompt

__all__ = ["Job", "Sample", "Target", "goals", "image_seed", "make_jobs", "next_batch", "prompt_score"]

NO_TRY_PAYS = "no further try pays"  # reason why a selector with costs gives a prompt up
ATTEMPTS_PER_IMAGE = 4  # attempts for each wanted image, after which a prompt whose images are rejected is given up
SCORES: dict[str, Callable[..., Tensor]] = {"vendi": F.vendi_score, "rke": F.rke_score}
BANDWIDTH = 0.5  # of features of norm 1, so that scores of all prompts are comparable
MIN_TARGET_IMAGES = 8  # images of a prompt from which the jackknife gives an interval


# -- when a prompt is finished -----------------------------------------------------------------------------------------


def prompt_score(x: Tensor, score: str = "vendi", bandwidth: float = BANDWIDTH) -> float:
    """Score the images of one prompt by their features ``[n, d]``, scaled here to norm 1."""
    return float(SCORES[score](l2_normalize(on_host(x)), GaussianKernel(bandwidth)))


@dataclass(frozen=True)
class Target:
    """Stop a prompt once its score has reached a value, or once further images hardly increase it.

    Args:
        score: ``vendi`` or ``rke``, of the features of one prompt's images at norm 1, Gaussian kernel.
        value: for the lower end of the 95% jackknife interval.
        bandwidth: of the kernel.
        gain: stop as well if the last batch added less than this for each image; one image adds 1 at most.

    Raises:
        SynthesisError: for an unknown score or a value out of range.
    """

    score: str
    value: float
    bandwidth: float = BANDWIDTH
    gain: float = 0.02

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise SynthesisError(f"a target is for one of {', '.join(SCORES)}, got {self.score!r}")
        if not (math.isfinite(self.value) and self.value >= 1):
            raise SynthesisError(f"a target is a number of different images, at least 1, got {self.value!r}")
        if not (self.bandwidth > 0 and self.gain >= 0):
            raise SynthesisError(f"bandwidth must be positive and gain at least 0, got {self.bandwidth!r}, {self.gain!r}")

    @classmethod
    def parse(cls, text: "str | Target | None") -> "Target | None":
        """Read ``vendi>=12`` or ``rke >= 4.5``; a Target and None are returned as they are.

        Raises:
            SynthesisError: for any other text.

        >>> Target.parse("vendi>=12")
        Target(score='vendi', value=12.0, bandwidth=0.5, gain=0.02)
        """
        if text is None or isinstance(text, Target):
            return text
        match = re.fullmatch(r"\s*([a-z]+)\s*>=\s*([0-9.]+)\s*", str(text).lower())
        if match is None:
            raise SynthesisError(f"cannot read the target {text!r}; expected for instance vendi>=12 or rke>=4.5")
        try:
            return cls(match[1], float(match[2]))
        except ValueError as error:
            raise SynthesisError(f"cannot read the number in the target {text!r}") from error

    def reached(self, x: Tensor, added: int) -> str | None:
        """The reason to stop, or None.

        Args:
            x: features of the prompt's images so far ``[n, d]``, in order.
            added: how many of them the last batch added.
        """
        if len(x) < MIN_TARGET_IMAGES:
            return None
        rows, kernel = l2_normalize(on_host(x)), GaussianKernel(self.bandwidth)
        score = SCORES[self.score]
        interval = jackknife(lambda z: score(z, kernel), rows, groups=min(20, len(rows)))
        if interval.low >= self.value:
            return "target reached"
        if 4 <= added < len(rows):
            previous = float(score(rows[: len(rows) - added], kernel))
            if (interval.value - previous) / added < self.gain:
                return "more images add little"
        return None


# -- what is still to be made ------------------------------------------------------------------------------------------


@dataclass(eq=False)
class Job:
    """One prompt and the state of its images.

    Attributes:
        number: of the prompt, in its file names.
        prompt: what the pipeline is given.
        goal: images wanted.
        kept: images in the set.
        attempts: images made, rejected ones included.
        max_attempts: attempts after which the prompt is given up.
        stop_reason: why it ended before its goal; empty until then.
        failures: images dropped since the last one that was kept.
        features: of its images, one ``[k, d]`` for each batch; empty once it is finished.
    """

    number: int
    prompt: Prompt
    goal: int
    kept: int = 0
    attempts: int = 0
    max_attempts: int = 0
    stop_reason: str = ""
    failures: int = 0
    features: list[Tensor] = field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether it has reached its goal or was stopped."""
        return bool(self.stop_reason) or self.kept >= self.goal

    def sample(self, attempt: int, seed: int) -> "Sample":
        """One of its images in a run of this seed."""
        return Sample(self, attempt, image_seed(seed, self.prompt.text, attempt))

    def update(self, kept: int, dropped: int, features: Tensor, target: Target | None) -> tuple[float, int] | None:
        """Count the images of a batch, ``kept`` ones with their features ``[kept, d]``, and stop if the target says so.

        Returns:
            The Vendi score and the number of scored images if this finished the prompt.
        """
        self.kept += kept
        self.failures = 0 if kept else self.failures + dropped
        if kept and features.shape[1]:
            self.features.append(features)
            if target is not None and not self.finished:
                self.stop_reason = target.reached(torch.cat(self.features), kept) or ""
        if not self.finished and self.attempts >= self.max_attempts:
            self.stop_reason = "too many rejected"
        if not (self.finished and self.features):
            return None
        all_features, self.features = torch.cat(self.features), []
        if not self.stop_reason:
            self.stop_reason = "all images made"
            if target is not None:
                self.stop_reason = target.reached(all_features, 0) or "most images made"
        return prompt_score(all_features), len(all_features)


@dataclass(frozen=True)
class Sample:
    """One image to be made: the attempt ``attempt`` of ``job``, from ``seed``."""

    job: Job
    attempt: int
    seed: int

    @property
    def file_name(self) -> str:
        """Where the image goes, relative to the folder of the run."""
        return f"{self.job.number // 1000:04d}/{self.job.number:06d}-{self.attempt:04d}.png"


def image_seed(seed: int, prompt: str, attempt: int) -> int:
    """The seed of an image. It depends on these three only, so not on the order of prompts or the number of processes.

    >>> image_seed(0, "heart", 0) == image_seed(0, "heart", 0) != image_seed(0, "heart", 1)
    True
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{attempt}/{prompt}".encode()).digest()[:6], "big")


def goals(prompts: Sequence[Prompt], images_per_prompt: int, quotas: Mapping[str, int]) -> list[int]:
    """Images of each prompt: its own number, an equal part of its group's quota, or ``images_per_prompt``.

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
    numbers = [p.images if p.images is not None else images_per_prompt * p.times for p in prompts]
    for group, total in quotas.items():
        for k, i in enumerate(members[group]):
            numbers[i] = total // len(members[group]) + (k < total % len(members[group]))
    return numbers


def make_jobs(
    prompts: Sequence[Prompt],
    images_per_prompt: int,
    quotas: Mapping[str, int],
    numbers: Mapping[str, int] | None = None,
    candidates: int = 1,
) -> list[Job]:
    """A job for each prompt, with the ``numbers`` that prompts of earlier epochs have in their file names.

    Each image may take ``candidates`` times as many attempts.

    Raises:
        SynthesisError: for a quota of a group that no prompt has.
    """
    numbers = numbers or {}
    free = max(numbers.values(), default=-1) + 1
    jobs = []
    for prompt, goal in zip(prompts, goals(prompts, images_per_prompt, quotas), strict=True):
        number = numbers.get(prompt.text)
        if number is None:
            number, free = free, free + 1
        jobs.append(Job(number, prompt, goal, max_attempts=candidates * (ATTEMPTS_PER_IMAGE * goal + 8)))
    return jobs


def next_batch(
    jobs: Iterable[Job], batch_size: int, seed: int, key: Callable[[Job], object], candidates: int = 1
) -> list[Sample]:
    """Up to ``batch_size`` samples of the first unfinished jobs with the same ``key``, ``candidates`` for each image."""
    batch: list[Sample] = []
    for job in jobs:
        if job.finished:
            continue
        if batch and key(batch[0].job) != key(job):
            continue
        n = candidates * min((batch_size - len(batch)) // candidates, job.goal - job.kept)
        for k in range(job.attempts, job.attempts + n):
            batch.append(job.sample(k, seed))
        if batch_size - len(batch) < candidates:
            break
    return batch
