"""Settings: what makes two runs the same, and where the settings of two runs differ."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.loop.components import denoiser_of, find_scheduler
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.prompts import Prompt
from kspec_guidance.synthesis.schedule import Target
from kspec_guidance.utils.hashing import fingerprint, hash_json, hash_tensors

__all__ = [
    "FEATURE_KEYS",
    "SAMPLE_KEYS",
    "Settings",
    "as_json",
    "check_counts",
    "check_memory",
    "describe_guide",
    "describe_pipeline",
    "describe_prompts",
    "describe_samples",
    "differences",
]

MEMORY_KINDS = ("auto", "exact", "centroids", "guide")
SAMPLE_KEYS = ("pipeline", "space", "size")  # of describe_samples, that agree if two runs' samples can be compared
FEATURE_KEYS = ("embedder", *SAMPLE_KEYS)  # and likewise the features that scores are computed from
DIGITS = 12  # of a digest


@dataclass(frozen=True)
class Settings:
    """What a worker needs to know besides its jobs.

    Attributes:
        batch_size: images in a batch.
        seed: of the run.
        memory: ``auto``, ``exact``, ``centroids`` or ``guide``.
        memory_by: ``all`` or ``group``.
        exchange: batches between two exchanges.
        target: when a prompt is finished before its goal.
        digest: of all settings of the run.
        expected_images: of the whole run.
    """

    batch_size: int
    seed: int
    memory: str
    memory_by: str
    exchange: int
    target: Target | None
    digest: str
    expected_images: int


def check_counts(minimum: int = 1, **counts: Any) -> None:
    """Check that arguments, given by name, are integers of at least ``minimum``.

    Raises:
        SynthesisError: naming the first one that is not.
    """
    for name, value in counts.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < minimum:
            raise SynthesisError(f"{name} must be an integer of at least {minimum}, got {value!r}")


def check_memory(kind: Any, by: Any) -> None:
    """Check the arguments ``memory`` and ``memory_by``.

    Raises:
        SynthesisError: for unknown values.
    """
    if kind not in MEMORY_KINDS:
        raise SynthesisError(f"memory must be one of {', '.join(MEMORY_KINDS)}, got {kind!r}")
    if by not in ("all", "group"):
        raise SynthesisError(f"memory_by must be 'all' or 'group', got {by!r}")


def differences(old: Any, new: Any, name: str = "") -> list[str]:
    """Where two nested settings differ, one line each.

    >>> differences({"seed": 0, "call": {"steps": 20}}, {"seed": 0, "call": {"steps": 30}, "batch_size": 8})
    ['batch_size: none before, now 8', 'call.steps: 20 before, now 30']
    """
    if isinstance(old, dict) and isinstance(new, dict):
        lines = []
        for key in sorted({*old, *new}, key=str):
            lines += differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
        return lines
    return [] if old == new else [f"{name}: {_shortened(old)} before, now {_shortened(new)}"]


def _shortened(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_json(value: Any) -> Any:
    """The value as JSON returns it; text takes the place of what JSON lacks."""
    return json.loads(json.dumps(value, default=str))


def describe_prompts(prompts: Sequence[Prompt], quotas: Mapping[str, int]) -> dict[str, Any]:
    """The number of prompts, the first one, a digest of all, and the quotas."""
    return {
        "number": len(prompts),
        "first": prompts[0].text,
        "digest": hash_json([[p.text, p.group, p.images, p.times] for p in prompts], DIGITS),
        "quotas": dict(quotas),
    }


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """Its class, a fingerprint of the denoiser, the dtype, and the scheduler with a digest of its configuration."""
    denoiser = denoiser_of(pipe)
    try:
        scheduler = find_scheduler(pipe)
        config = {k: v for k, v in dict(scheduler.config).items() if not str(k).startswith("_")}
        scheduler_settings = {"class": type(scheduler).__name__, "digest": hash_json(config, DIGITS)}
    except (AttributeError, ValueError):
        scheduler_settings = {"class": "none", "digest": ""}
    return {
        "class": type(pipe).__name__,
        "denoiser": "none" if denoiser is None else fingerprint(denoiser),
        "dtype": str(getattr(pipe, "dtype", None)),
        "scheduler": scheduler_settings,
    }


def describe_samples(
    pipe: Any, guide: KernelGuidance, call: Mapping[str, Any], embedder: ImageEmbedder | None
) -> dict[str, Any]:
    """What decides whether the tensors of two records can be compared; see ``SAMPLE_KEYS`` and ``FEATURE_KEYS``."""
    try:
        space: Any = guide.terms[0].space.describe()
    except TypeError:  # a user's own space
        space = guide.terms[0].space.name
    return {
        "pipeline": [type(pipe).__name__, describe_pipeline(pipe)["denoiser"]],
        "space": as_json(space),
        "size": [call.get("height"), call.get("width")],
        "embedder": None if embedder is None else [embedder.name, embedder.fingerprint],
    }


def describe_guide(guide: KernelGuidance) -> dict[str, Any]:
    """The settings of a guide, with digests of its tensors."""
    try:
        config, tensors = guide.to_config()
    except TypeError:  # a user's own kernel or objective, without settings to compare
        return {"guide": type(guide).__name__, "terms": [type(term.objective).__name__ for term in guide.terms]}
    return {**config, "tensors": {name: hash_tensors({name: t}, digits=DIGITS) for name, t in tensors.items()}}
