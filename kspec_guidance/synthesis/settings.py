"""Settings: what makes two runs the same, and where the settings of two runs differ."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.loop.components import denoiser_of, find_scheduler
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.prompts import Prompt
from kspec_guidance.synthesis.schedule import Target
from kspec_guidance.utils.arguments import is_integer
from kspec_guidance.utils.hashing import (
    fingerprint,
    has_adapters,
    hash_json,
    hash_tensors,
    sampled_fingerprint,
    state_fingerprint,
)

__all__ = [
    "FEATURE_KEYS",
    "SAMPLE_KEYS",
    "Settings",
    "as_json",
    "check_candidates",
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
WEIGHT_VALUES = 64  # of each weight, that are read
TITLES = {  # of settings whose names do not say it
    "processes": "number of processes",
    "exchange": "exchange (none in one process)",
    "prompts.number": "number of prompts",
    "prompts.first": "first prompt",
    "prompts.digest": "digest of all prompts with their groups and numbers of images",
    "pipeline.denoiser": "digest of the pipeline's weights",
    "pipeline.weights": "digest of the pipeline's weights, with what was merged into them (fuse_lora)",
    "pipeline.scheduler.digest": "digest of the scheduler's configuration",
    "memory[0]": "memory",
    "memory[1]": "memory_by",
    "memory[2]": "entries of the guide's memory",
    "format[1]": "shard_size",
    "marks": "marks (--sign, --no-sign, --no-marks)",
}

UNKNOWN_IN_SOME = ("pipeline.weights",)  # absent in runs of earlier versions, and where weights cannot be read


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
        grouped: whether any prompt has a group.
        candidates: made for each image, of which one is kept.
    """

    batch_size: int
    seed: int
    memory: str
    memory_by: str
    exchange: int
    target: Target | None
    digest: str
    expected_images: int
    grouped: bool = False
    candidates: int = 1


def check_counts(minimum: int | None = 1, **counts: Any) -> None:
    """Check that arguments, given by name, are integers (also of numpy) of at least ``minimum``, if that is given.

    Raises:
        SynthesisError: naming the first one that is not.
    """
    for name, value in counts.items():
        if not is_integer(value, minimum):
            least = "" if minimum is None else f" of at least {minimum}"
            raise SynthesisError(f"{name} must be an integer{least}, got {value!r}")


def check_candidates(candidates: Any, batch_size: int) -> None:
    """Check the number of candidates of each image.

    Raises:
        SynthesisError: for another value than an integer of at least 1, or more than a batch holds.
    """
    check_counts(candidates=candidates)
    if candidates > batch_size:
        raise SynthesisError(
            f"the {candidates} candidates of an image are made in one batch, and batch_size is {batch_size}; raise it, or "
            "have fewer candidates"
        )


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
    lines = []
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted({*old, *new}, key=str):
            lines += differences(old.get(key), new.get(key), f"{name}.{key}" if name else str(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for k, (before, now) in enumerate(zip(old, new, strict=True)):
            lines += differences(before, now, f"{name}[{k}]")
    elif old != new and not (None in (old, new) and name in UNKNOWN_IN_SOME):
        lines.append(f"{TITLES.get(name, name)}: {_shortened(old)} before, now {_shortened(new)}")
    return lines


def _shortened(value: Any) -> str:
    text = "none" if value is None else value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def as_json(value: Any) -> Any:
    """The value as JSON returns it; of what JSON lacks, a text that is the same in each run: a digest, or a name."""
    if isinstance(value, Mapping):
        return {str(k): as_json(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(v) for v in value]
    if isinstance(value, Tensor | np.ndarray | Image.Image) and getattr(value, "ndim", 1) != 0:
        data = value if isinstance(value, Tensor) else torch.from_numpy(np.array(value))
        return f"{type(value).__name__} {list(data.shape)} {hash_tensors({'': data}, digits=DIGITS)}"
    if hasattr(value, "item"):
        value = value.item()
    if value is None or isinstance(value, str | bool | int) or (isinstance(value, float) and math.isfinite(value)):
        return value
    if isinstance(value, float | complex | torch.dtype | torch.device | Path):
        return str(value)
    return getattr(value, "__qualname__", type(value).__qualname__)


def describe_prompts(prompts: Sequence[Prompt], quotas: Mapping[str, int]) -> dict[str, Any]:
    """The number of prompts, the first one, a digest of all, and the quotas."""
    return {
        "number": len(prompts),
        "first": prompts[0].text,
        "digest": hash_json([[p.text, p.group, p.images, p.times] for p in prompts], DIGITS),
        "quotas": dict(quotas),
    }


def describe_pipeline(pipe: Any) -> dict[str, Any]:
    """Its class, a fingerprint of the denoiser, the dtype, and the scheduler with a digest of its configuration.

    With a digest of some values of each weight of the denoiser, in its precision, which also tells a merged LoRA; and with
    digests of the components that have adapters, such as LoRAs: the fingerprint does not tell those of one shape apart.
    """
    denoiser = denoiser_of(pipe)
    try:
        scheduler = find_scheduler(pipe)
        config = {k: v for k, v in dict(scheduler.config).items() if not str(k).startswith("_")}
        scheduler_settings = {"class": type(scheduler).__name__, "digest": hash_json(config, DIGITS)}
    except (AttributeError, ValueError):
        scheduler_settings = {"class": "none", "digest": ""}
    adapted = {name: part for name, part in getattr(pipe, "components", {}).items() if has_adapters(part)}
    # absent without adapters, as in runs of earlier versions
    adapters = {"adapters": {name: state_fingerprint(part) for name, part in adapted.items()}} if adapted else {}
    weights = None if denoiser is None or has_adapters(denoiser) else sampled_fingerprint(denoiser, WEIGHT_VALUES)
    return {
        "class": type(pipe).__name__,
        "denoiser": _denoiser(pipe),
        **({} if weights is None else {"weights": weights[:DIGITS]}),
        "dtype": str(getattr(pipe, "dtype", None)),
        "scheduler": scheduler_settings,
        **adapters,
    }


def _denoiser(pipe: Any) -> str:
    denoiser = denoiser_of(pipe)
    return "none" if denoiser is None else fingerprint(denoiser)


def describe_samples(
    pipe: Any, guide: KernelGuidance, call: Mapping[str, Any], embedder: ImageEmbedder | None
) -> dict[str, Any]:
    """What decides whether the tensors of two records can be compared; see ``SAMPLE_KEYS`` and ``FEATURE_KEYS``."""
    try:
        space: Any = guide.terms[0].space.describe()
    except TypeError:  # a user's own space
        space = guide.terms[0].space.name
    return {
        "pipeline": [type(pipe).__name__, _denoiser(pipe)],
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
