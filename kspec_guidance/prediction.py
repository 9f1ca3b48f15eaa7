"""The clean prediction x0 behind a model output, for every supported scheduler.

Each relation is linear, ``x0 = A x + B m`` for noisy sample ``x`` and model output ``m``, so a moved x0 goes back into the
model output as ``m + move / B``. Which A and B is the scheduler's parametrisation alone; noisy samples are
``x = alpha x0 + sigma noise``.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Prediction", "UnsupportedSchedulerError", "predict", "supported_schedulers"]

# How each scheduler class writes its noisy samples. Matched by name along the class hierarchy, so subclasses count.
BY_TIMESTEP = {  # variance preserving, alphas_cumprod[timestep]
    "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LCMScheduler",
    "TCDScheduler",
}  # fmt: skip
BY_SIGMA_VP = {  # variance preserving, sigmas[step_index]; flow with use_flow_sigmas
    "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
    "SASolverScheduler",
}  # fmt: skip
BY_SIGMA_VE = {  # x = x0 + sigma noise
    "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
    "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
}  # fmt: skip
FLOW = {"FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"}  # x = (1 - sigma) x0 + sigma noise


class UnsupportedSchedulerError(ValueError):
    """The scheduler's parametrisation is not known, so x0 cannot be formed."""


def supported_schedulers() -> list[str]:
    """Names of the scheduler classes that guidance works with."""
    return sorted(BY_TIMESTEP | BY_SIGMA_VP | BY_SIGMA_VE | FLOW)


def family(scheduler: Any) -> str:
    """``timestep``, ``vp``, ``ve`` or ``flow``.

    Raises:
        UnsupportedSchedulerError: naming the scheduler and those that are supported.
    """
    names = {cls.__name__ for cls in type(scheduler).__mro__}
    for kind, group in (("timestep", BY_TIMESTEP), ("vp", BY_SIGMA_VP), ("ve", BY_SIGMA_VE), ("flow", FLOW)):
        if names & group:
            return kind
    raise UnsupportedSchedulerError(
        f"{type(scheduler).__name__} is not supported; use one of {', '.join(supported_schedulers())}, "
        "e.g. pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
    )


@dataclass(frozen=True)
class Prediction:
    """x0 and what is needed to change it: ``x = alpha x0 + sigma noise`` and ``d m / d x0 = 1 / slope``."""

    x0: Tensor
    sample: Tensor
    alpha: float
    sigma: float
    slope: float

    def moved(self, model_output: Tensor, move: Tensor) -> Tensor:
        """The model output whose x0 is ``x0 + move``; further channels (a learned variance) stay."""
        shift = (move / self.slope).to(model_output.dtype)
        channels = move.shape[1]
        if model_output.shape[1] == channels:
            return model_output + shift
        return torch.cat([model_output[:, :channels] + shift, model_output[:, channels:]], dim=1)

    @property
    def score(self) -> Tensor:
        """A direction parallel to the score at the sample: ``alpha x0 - x = -sigma noise``."""
        return self.alpha * self.x0 - self.sample

    @property
    def noise_to_signal(self) -> float:
        """``sigma / alpha``: the noise level as the Euler family counts it; infinite for pure noise."""
        return self.sigma / self.alpha if self.alpha > 0 else float("inf")


def _step_index(scheduler: Any, timestep: Tensor | float) -> int:
    """The scheduler's own position; set up as its ``step`` would, if this is the first step."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def levels(scheduler: Any, timestep: Tensor | float, kind: str) -> tuple[float, float]:
    """``alpha`` and ``sigma`` of the sample that the model saw at this step."""
    if kind == "timestep":
        last = len(scheduler.alphas_cumprod) - 1
        abar = float(scheduler.alphas_cumprod[min(max(int(timestep), 0), last)].double())
        return abar**0.5, (1 - abar) ** 0.5
    index = _step_index(scheduler, timestep)
    sigmas = scheduler.sigmas
    if getattr(scheduler, "sigmas_interpol", None) is not None and not scheduler.state_in_first_order:
        sigmas = scheduler.sigmas_interpol  # KDPM2 evaluates its second stage between two noise levels
        index -= any(cls.__name__ == "KDPM2AncestralDiscreteScheduler" for cls in type(scheduler).__mro__)
    sigma = float(sigmas[index].double())
    if kind == "vp":
        alpha, sigma = (float(v) for v in scheduler._sigma_to_alpha_sigma_t(torch.tensor(sigma, dtype=torch.float64)))
        return alpha, sigma
    if kind == "flow":
        return 1 - sigma, sigma
    return 1.0, sigma


def coefficients(prediction_type: str, kind: str, alpha: float, sigma: float) -> tuple[float, float]:
    """A and B of ``x0 = A x + B m``.

    Raises:
        UnsupportedSchedulerError: for a prediction type that is not known.
    """
    if prediction_type in ("sample", "original_sample"):
        return 0.0, 1.0
    if kind == "flow" or prediction_type == "flow_prediction":
        return 1.0, -sigma
    if prediction_type == "epsilon":
        return 1 / alpha, -sigma / alpha
    if prediction_type == "v_prediction":
        if kind == "ve":
            scale = sigma * sigma + 1
            return 1 / scale, -sigma / scale**0.5
        return alpha, -sigma
    raise UnsupportedSchedulerError(
        f"prediction_type {prediction_type!r} is not supported; known are epsilon, v_prediction, sample, flow_prediction"
    )


def predict(scheduler: Any, model_output: Tensor, timestep: Tensor | float, sample: Tensor) -> Prediction:
    """Form x0 (float32 or wider) of a scheduler step about to be taken.

    Args:
        scheduler: any of :func:`supported_schedulers`, its timesteps set.
        model_output: ``[n, c, ...]``, or ``[n, 2c, ...]`` with a learned variance in the second half.
        timestep: as given to ``scheduler.step``.
        sample: noisy ``[n, c, ...]``.
    """
    kind = family(scheduler)
    alpha, sigma = levels(scheduler, timestep, kind)
    prediction_type = getattr(scheduler.config, "prediction_type", "flow_prediction" if kind == "flow" else "epsilon")
    a, b = coefficients(prediction_type, kind, alpha, sigma)
    x = sample if sample.dtype == torch.float64 else sample.float()
    m = model_output.to(x.dtype)
    if m.shape != x.shape:
        m = m[:, : x.shape[1]]
    return Prediction(a * x + b * m, x, alpha, sigma, b)
