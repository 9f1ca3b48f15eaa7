"""Measure how strongly ``variety`` moves the images of a pipeline."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from kspec_guidance import functional as F
from kspec_guidance.guidance.calibration import Calibration, call_settings, guidance_scale_of, store_calibration
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel, l2_normalize
from kspec_guidance.loop.components import denoiser_of
from kspec_guidance.loop.observer import network_fingerprint
from kspec_guidance.synthesis.generator import check_call

__all__ = ["calibrate", "search_factor"]

FACTORS = (0.25, 4.0)  # range of the factor of a calibration
ALIKE = 0.7  # at variety 50, how alike images of a prompt are, relative to plain ones
MOST_RUNS = 4  # for each prompt: plain, and factors 1, 2 and 4, or 1, 1/2 and 1/4
LEAST_ALIKE = 1e-4  # mean squared kernel below which images of a prompt are unrelated already


def calibrate(
    pipe: Any,
    prompts: Sequence[str] = ("a dog", "a house", "a woman"),
    batch_size: int = 4,
    *,
    call: dict[str, Any] | None = None,
    seed: int = 0,
    store: bool = True,
    progress_callback: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure how strongly ``variety`` moves the images of a pipeline, and keep the result for later runs of this user.

    Finds the factor at which variety 50 lowers the mean squared kernel of two finished samples of one prompt by 30%, by at
    most four short runs for each prompt: plain sampling, then guided sampling of the same noise. Samples are not decoded.
    Guides with a ``variety`` then use the factor for calls of this pipeline with similar steps and guidance scales.

    Args:
        pipe: any text-to-image pipeline with classifier-free guidance or without.
        prompts: typical prompts.
        batch_size: images of each prompt, at least 2.
        call: further arguments of the pipeline's call, as in later runs: ``num_inference_steps``, ``guidance_scale``.
        seed: image ``k`` of a prompt uses ``seed + k``.
        store: whether to write the result to the user's calibration file.
        progress_callback: called with the number of finished runs and the largest number that may be needed.

    Raises:
        ValueError: for no prompts, fewer than two images, a pipeline without denoiser, an unknown number of steps, or
            images of one prompt that are unrelated without guidance.
        SynthesisError: if the pipeline takes no prompts, or not all of ``call``.
    """
    prompts, call = list(prompts), dict(call or {})
    network, (steps, _) = denoiser_of(pipe), call_settings(pipe, call)
    check_call(pipe, call)
    if not prompts or batch_size < 2:
        raise ValueError(f"calibrate needs prompts and at least two images of each, got {len(prompts)} and {batch_size}")
    if network is None or steps is None:
        missing = "denoiser" if network is None else "number of steps; give call={'num_inference_steps': ...}"
        raise ValueError(f"cannot calibrate {type(pipe).__name__}, which has no known {missing}")
    kernel, done, timesteps = GaussianKernel(IMAGE_BANDWIDTH), 0, steps

    def alike(factor: float) -> float:
        """Mean squared kernel of two samples of one prompt, at variety 50 with this factor; plain samples for 0."""
        nonlocal done, timesteps
        found = []
        for prompt in prompts:
            guide = SPARKE(variety=50 if factor else 0)
            guide.calibration = factor
            generators = [torch.Generator().manual_seed(seed + k) for k in range(batch_size)]
            arguments = {"num_images_per_prompt": batch_size, "generator": generators, "output_type": "latent", **call}
            with guide.attach(pipe):
                pipe(prompt, **arguments)
            timesteps = guide.report().total_steps
            rows = l2_normalize(guide.finished[0].features.flatten(1).double().cpu())
            found.append(1 / float(F.rke_score(rows, kernel, unbiased=True)))
            done += 1
            if progress_callback is not None:
                progress_callback(done, len(prompts) * MOST_RUNS)
        return sum(found) / len(found)

    factor, plain, guided = search_factor(alike)
    about = network_fingerprint(network), steps, timesteps, guidance_scale_of(pipe)
    result = Calibration(*about, factor, plain, guided, len(prompts) * batch_size)
    if store:
        store_calibration(result)
    return result


def search_factor(alike: Callable[[float], float]) -> tuple[float, float, float]:
    """The factor at which variety 50 lowers the mean squared kernel of two samples of one prompt by 30%.

    Args:
        alike: the mean squared kernel at variety 50 with a factor; that of plain samples for 0.

    Returns:
        The factor in 1/4..4, and the mean squared kernel of plain samples and of those at the nearest factor tried.

    Raises:
        ValueError: if plain samples of one prompt are unrelated.
    """
    plain = alike(0.0)
    if plain < LEAST_ALIKE:
        raise ValueError(
            f"plain images of one prompt are unrelated already (mean squared kernel {plain:.2g}), so there is no unit to "
            "calibrate with; variety works without a calibration"
        )
    factor, tried = 1.0, {1.0: alike(1.0)}
    step = 2.0 if tried[1.0] > ALIKE * plain else 0.5
    while (tried[factor] > ALIKE * plain) == (step > 1) and FACTORS[0] < factor < FACTORS[1]:
        factor *= step
        tried[factor] = alike(factor)
    factor = _crossing({f: math.log(max(a, LEAST_ALIKE) / plain) for f, a in tried.items()}, math.log(ALIKE))
    return factor, plain, tried[min(tried, key=lambda f: abs(math.log(f / factor)))]


def _crossing(levels: dict[float, float], goal: float) -> float:
    """The factor at which the level falls to the goal, between the last two of those tried; else the last one."""
    if len(levels) == 1:
        return next(iter(levels))
    (a, above), (b, below) = list(levels.items())[-2:]
    if (above - goal) * (below - goal) >= 0:
        return b
    share = (above - goal) / (above - below)
    return float(math.exp(math.log(a) + share * math.log(b / a)))
