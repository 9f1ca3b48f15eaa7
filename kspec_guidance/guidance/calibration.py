"""Calibrations of ``variety``: what a pipeline's images do at 50, measured by short runs and kept in one JSON file."""

import functools
import json
import math
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from kspec_guidance.loop.components import call_parameters, denoiser_of
from kspec_guidance.loop.observer import network_fingerprint
from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.hashing import same_network
from kspec_guidance.utils.messages import warn_user

__all__ = ["Calibration", "calibration_file", "call_settings", "find_calibration", "guidance_scale_of", "store_calibration"]

STEPS_RATIO, SCALE_RATIO = 1.5, 1.25  # how far steps and guidance scale of a call may be from those of a calibration


@dataclass(frozen=True)
class Calibration:
    """The strength at which variety 50 makes a pipeline's images of one prompt 30% less alike.

    Attributes:
        network: fingerprint of the denoiser.
        steps: number of denoising steps, as requested.
        timesteps: number of timesteps of the scheduler; some step twice for each requested step.
        guidance_scale: classifier-free guidance scale; None if the pipeline does not tell it.
        factor: factor of the scale of every variety.
        alike: mean squared kernel of two plain images of one prompt, in 0..1 (Gaussian kernel of bandwidth 0.5).
        alike_guided: the same of images guided at variety 50 with this factor.
        images: number of images of the measurement.
    """

    network: str
    steps: int
    timesteps: int
    guidance_scale: float | None
    factor: float
    alike: float
    alike_guided: float
    images: int


def calibration_file() -> Path:
    """The file of this user's calibrations, in ``$KSPEC_GUIDANCE_HOME`` or the user's cache."""
    home = os.environ.get("KSPEC_GUIDANCE_HOME")
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return (Path(home) if home else Path(cache) / "kspec_guidance") / "calibration.json"


def _read() -> list[Calibration]:
    """All calibrations of the file; none if it cannot be read, with a warning."""
    path = calibration_file()
    try:
        return list(_parsed(path, path.stat().st_mtime_ns))
    except OSError:
        return []
    except (ValueError, TypeError, KeyError) as error:
        warn_user(f"the calibrations in {path} are damaged ({error}) and not used; delete the file and calibrate again")
        return []


@functools.lru_cache(maxsize=4)
def _parsed(path: Path, modified: int) -> tuple[Calibration, ...]:
    names = [f.name for f in fields(Calibration)]
    found = [Calibration(**{name: entry[name] for name in names}) for entry in json.loads(path.read_text("utf-8"))]
    if not all(isinstance(c.factor, int | float) and 0 < c.factor < math.inf for c in found):
        raise ValueError("a factor is not a positive number")
    return tuple(found)


def guidance_scale_of(pipe: Any) -> float | None:
    """Classifier-free guidance scale of the pipeline's present call; None if it does not tell."""
    found = getattr(pipe, "_guidance_scale", None)
    return float(found) if isinstance(found, int | float) else None


def call_settings(pipe: Any, call: dict[str, Any]) -> tuple[int | None, float | None]:
    """Number of steps and guidance scale of a call with these arguments; None where they are unknown.

    Given ``timesteps`` or ``sigmas`` decide the number of steps, whatever ``num_inference_steps`` is.
    """
    parameters = call_parameters(type(pipe))

    def value(name: str) -> Any:
        found = call[name] if name in call else getattr(parameters.get(name), "default", None)
        return found if isinstance(found, int | float) else None

    steps, scale = value("num_inference_steps"), value("guidance_scale")
    for name in ("timesteps", "sigmas"):
        if call.get(name) is not None:
            steps = len(call[name])
    return None if steps is None else int(steps), None if scale is None else float(scale)


def find_calibration(pipe: Any, steps: int, guidance_scale: float | None, requested: bool = False) -> Calibration | None:
    """The calibration of this pipeline with the most similar settings; None if there is none for similar ones.

    Args:
        pipe: the pipeline.
        steps: number of timesteps, which may differ by a factor of 1.5.
        guidance_scale: classifier-free guidance scale, which may differ by a factor of 1.25; None if unknown.
        requested: whether ``steps`` is the number of steps that a call asks for, instead of that of timesteps.
    """

    def distance(c: Calibration) -> float:
        return _distance(steps / (c.steps if requested else c.timesteps), c.guidance_scale, guidance_scale)

    candidates = [c for c in _read() if distance(c) < math.inf]
    network = denoiser_of(pipe) if candidates else None
    if network is None:
        return None
    own = network_fingerprint(network)
    return min((c for c in candidates if same_network(own, c.network)), key=distance, default=None)


def _distance(steps_ratio: float, calibrated_scale: float | None, guidance_scale: float | None) -> float:
    """How far settings are from those of a calibration; infinite if it does not apply."""
    by_steps, by_scale = abs(math.log(steps_ratio)), 0.0
    if calibrated_scale is not None:  # else the pipeline does not tell its scale
        if guidance_scale is None:
            return math.inf
        pair = max(calibrated_scale, 1.0), max(guidance_scale, 1.0)  # at 1 and below there is no guidance
        by_scale = abs(math.log(pair[0] / pair[1]))
    return by_steps + by_scale if by_steps <= math.log(STEPS_RATIO) and by_scale <= math.log(SCALE_RATIO) else math.inf


def store_calibration(found: Calibration) -> Path:
    """Add a calibration to the file, in place of one of the same network and settings; returns the path of the file."""
    path = calibration_file()
    same = (found.steps, found.guidance_scale)
    kept = [c for c in _read() if (c.steps, c.guidance_scale) != same or not same_network(c.network, found.network)]
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as fresh:
        fresh.write_text(json.dumps([asdict(c) for c in [*kept, found]], indent=1) + "\n", encoding="utf-8")
    return path
