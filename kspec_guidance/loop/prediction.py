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
KINDS: dict[str, set[str]] = {
    # variance preserving, alphas_cumprod[timestep]
    "timestep": {
        "DDPMScheduler", "DDIMScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler", "PNDMScheduler", "LCMScheduler",
        "TCDScheduler", "CogVideoXDDIMScheduler", "CogVideoXDPMScheduler", "UnCLIPScheduler", "RePaintScheduler",
    },
    # variance preserving, sigmas[step_index]; flow with use_flow_sigmas
    "vp": {
        "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler", "DEISMultistepScheduler", "UniPCMultistepScheduler",
        "SASolverScheduler",
    },
    # x = x0 + sigma noise
    "ve": {
        "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler",
        "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler",
    },
    # x = x0 + sigma noise, the output preconditioned as by Karras et al. 2022, arXiv 2206.00364, table 1
    "edm": {"EDMEulerScheduler", "EDMDPMSolverMultistepScheduler", "CosineDPMSolverMultistepScheduler"},
    # the same with the boundary condition at sigma_min, Song et al. 2023, arXiv 2303.01469, equation 5
    "consistency": {"CMStochasticIterativeScheduler"},
    # x = (1 - sigma) x0 + sigma noise, the output a velocity toward noise
    "flow": {
        "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler", "FlowMatchLCMScheduler",
        "LTXEulerAncestralRFScheduler", "HeliosScheduler", "FlowMapEulerDiscreteScheduler", "HeliosDMDScheduler",
    },
    # the same, with time and velocity running toward the data
    "dataward": {"MiniMaxH3Scheduler", "RFD4ProteinaScheduler"},
    # x = cos(t) x0 + sin(t) noise: TrigFlow, Lu and Song 2024, arXiv 2410.11081, and what IPNDM does
    "angle": {"SCMScheduler", "IPNDMScheduler"},
    # alpha-bar as a function of a time in 0..1
    "continuous": {"DDPMWuerstchenScheduler"},
    # x = x0 + sigma noise: the output is the score, or noise at a raised noise level
    "score": {"ScoreSdeVeScheduler"},
    "stochastic": {"KarrasVeScheduler"},
}  # fmt: skip
UNFIT = {  # what no hook can guide, with the reason
    **dict.fromkeys(
        (
            "AmusedScheduler",
            "VQDiffusionScheduler",
            "BlockRefinementScheduler",
            "DiscreteDDIMScheduler",
            "EntropyBoundScheduler",
        ),
        "it samples discrete tokens, which have no gradient",
    ),
    **dict.fromkeys(("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler"), "it runs from images to noise"),
    "PiflowScheduler": "its model returns a policy that is rolled out inside the step, not a prediction",
}


class UnsupportedSchedulerError(ValueError):
    """The scheduler's parametrisation is not known, so x0 cannot be formed."""


def supported_schedulers() -> list[str]:
    """Names of the scheduler classes that guidance works with."""
    return sorted(set().union(*KINDS.values()))


def family(scheduler: Any) -> str:
    """The key of :data:`KINDS` that the scheduler's class, or its nearest known ancestor, stands under.

    Raises:
        UnsupportedSchedulerError: naming the scheduler and those that are supported.
    """
    for cls in type(scheduler).__mro__:
        for kind, group in KINDS.items():
            if cls.__name__ in group:
                inverted = kind == "flow" and getattr(scheduler.config, "invert_sigmas", False)  # OmniGen
                return "dataward" if inverted else kind
        if cls.__name__ in UNFIT:
            raise UnsupportedSchedulerError(f"{type(scheduler).__name__} cannot be guided: {UNFIT[cls.__name__]}")
    raise UnsupportedSchedulerError(
        f"{type(scheduler).__name__} is not supported; use one of {', '.join(supported_schedulers())}, "
        "e.g. pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
    )


@dataclass(frozen=True)
class Prediction:
    """x0 and what is needed to change it: ``x = alpha x0 + sigma noise`` and ``d m / d x0 = 1 / slope``."""

    x0: Any
    sample: Any
    alpha: float | Tensor
    sigma: float | Tensor
    slope: float | Tensor

    def moved(self, model_output: Any, move: Any) -> Any:
        """The model output whose x0 is ``x0 + move``; further channels (a learned variance) stay."""
        if isinstance(model_output, list | tuple):
            return type(model_output)(self.moved(m, d) for m, d in zip(model_output, move, strict=True))
        if isinstance(self.slope, Tensor):  # tokens without noise, as of an image to go on from, stay where they are
            shift = torch.where(self.slope.abs() > 1e-6, move / self.slope, 0).to(model_output.dtype)
        elif abs(self.slope) > 1e-6:
            shift = (move / self.slope).to(model_output.dtype)
        else:
            return model_output
        channels = move.shape[1]
        if model_output.shape[1] == channels:
            return model_output + shift
        return torch.cat([model_output[:, :channels] + shift, model_output[:, channels:]], dim=1)

    @property
    def score(self) -> Any:
        """A direction parallel to the score at the sample: ``alpha x0 - x = -sigma noise``."""
        if isinstance(self.x0, list):
            return [self.alpha * x0 - x for x0, x in zip(self.x0, self.sample, strict=True)]
        return self.alpha * self.x0 - self.sample

    @property
    def noise_to_signal(self) -> float:
        """``sigma / alpha``: the noise level as the Euler family counts it; infinite for pure noise."""
        alpha, sigma = (float(v.mean()) if isinstance(v, Tensor) else v for v in (self.alpha, self.sigma))
        return sigma / alpha if alpha > 0 else float("inf")


def _step_index(scheduler: Any, timestep: Tensor | float) -> int:
    """The scheduler's own position; set up as its ``step`` would, if this is the first step."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def _at(values: Tensor, index: int) -> float:
    return float(values[index].double())


def _sigma(scheduler: Any, timestep: Tensor | float) -> float:
    """``sigmas`` at the scheduler's position."""
    index, sigmas = _step_index(scheduler, timestep), scheduler.sigmas
    if getattr(scheduler, "mid_point_sigma", None) is not None:  # DPMSolverSDE's second stage
        return float(scheduler.mid_point_sigma)
    if getattr(scheduler, "sigmas_interpol", None) is not None and not scheduler.state_in_first_order:
        sigmas = scheduler.sigmas_interpol  # KDPM2 evaluates its second stage between two noise levels
        index -= any(cls.__name__ == "KDPM2AncestralDiscreteScheduler" for cls in type(scheduler).__mro__)
    return _at(sigmas, index)


def _flow_sigma(scheduler: Any, timestep: Tensor | float, extra: dict[str, Any]) -> float | Tensor:
    if extra.get("per_token_timesteps") is not None:  # image conditions: every token [n, l] has its own noise level
        return extra["per_token_timesteps"].float()[..., None] / scheduler.config.num_train_timesteps
    if extra.get("dmd_sigmas") is not None:  # Helios, distilled
        times = extra["dmd_timesteps"].double()
        return _at(extra["dmd_sigmas"], int((times - float(timestep)).abs().argmin()))
    if type(scheduler).__name__ == "FlowMapEulerDiscreteScheduler":  # its step looks times up, wherever it stands
        index = scheduler.index_for_timestep(timestep)
        if index is None:
            return float(torch.as_tensor(timestep).flatten()[0]) / scheduler.config.num_train_timesteps
        return _at(scheduler.sigmas, int(torch.as_tensor(index).flatten()[0]))
    return _sigma(scheduler, timestep)


def levels(
    scheduler: Any, timestep: Tensor | float, kind: str, extra: dict[str, Any] | None = None
) -> tuple[float | Tensor, float | Tensor]:
    """``alpha`` and ``sigma`` of the sample that the model saw at this step; tensors where tokens differ in noise level.

    ``extra`` holds the further arguments of ``scheduler.step``.
    """
    first = float(torch.as_tensor(timestep).flatten()[0])
    if kind == "timestep":
        last = len(scheduler.alphas_cumprod) - 1
        abar = _at(scheduler.alphas_cumprod, min(max(int(first), 0), last))
        return abar**0.5, (1 - abar) ** 0.5
    if kind == "continuous":
        abar = float(scheduler._alpha_cumprod(torch.tensor([first], dtype=torch.float64), "cpu"))
        return abar**0.5, (1 - abar) ** 0.5
    if kind == "angle":
        if hasattr(scheduler, "alphas"):
            index = _step_index(scheduler, timestep)
            return _at(scheduler.alphas, index), _at(scheduler.betas, index)
        angle = torch.tensor(first, dtype=torch.float64)
        return float(angle.cos()), float(angle.sin())
    if kind == "dataward":
        if getattr(scheduler.config, "invert_sigmas", False):
            first = _sigma(scheduler, timestep)
        return first, 1 - first
    if kind == "score":
        return 1.0, _at(scheduler.discrete_sigmas, int(first * (len(scheduler.timesteps) - 1)))
    if kind == "stochastic":
        return 1.0, first
    if kind == "flow":
        sigma = _flow_sigma(scheduler, timestep, extra or {})
        return 1 - sigma, sigma
    if kind == "vp":
        at = torch.tensor(_sigma(scheduler, timestep), dtype=torch.float64)
        alpha, sigma = (float(v) for v in scheduler._sigma_to_alpha_sigma_t(at))
        return alpha, sigma
    return 1.0, _sigma(scheduler, timestep)


def coefficients(prediction_type: str, kind: str, alpha: Any, sigma: Any, scheduler: Any = None) -> tuple[Any, Any]:
    """A and B of ``x0 = A x + B m``.

    Raises:
        UnsupportedSchedulerError: for a prediction type that is not known.
    """
    if kind == "edm":
        data = scheduler.config.sigma_data
        size = (sigma**2 + data**2) ** 0.5
        return data**2 / size**2, (-sigma if prediction_type == "v_prediction" else sigma) * data / size
    if kind == "consistency":
        data, above = scheduler.config.sigma_data, sigma - scheduler.config.sigma_min
        return data**2 / (above**2 + data**2), above * data / (sigma**2 + data**2) ** 0.5
    if kind == "angle":
        return alpha, -sigma
    if kind == "dataward":
        return 1.0, sigma
    if kind == "score":
        return 1.0, sigma**2
    if kind == "stochastic":
        return 1.0, sigma
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


def predict(
    scheduler: Any, model_output: Any, timestep: Tensor | float, sample: Any, extra: dict[str, Any] | None = None
) -> Prediction:
    """Form x0 (float32 or wider) of a scheduler step about to be taken.

    Args:
        scheduler: any of :func:`supported_schedulers`, its timesteps set.
        model_output: ``[n, c, ...]``, or ``[n, 2c, ...]`` with a learned variance in the second half.
        timestep: as given to ``scheduler.step``.
        sample: noisy ``[n, c, ...]``; or lists of both, for a state of several tensors at one noise level.
        extra: the further arguments of ``scheduler.step``, by name.
    """
    if isinstance(sample, list | tuple):
        parts = [predict(scheduler, m, timestep, x, extra) for m, x in zip(model_output, sample, strict=True)]
        one = parts[0]
        return Prediction([p.x0 for p in parts], [p.sample for p in parts], one.alpha, one.sigma, one.slope)
    kind = family(scheduler)
    alpha, sigma = levels(scheduler, timestep, kind, extra)
    if isinstance(sigma, Tensor) and sigma.ndim > sample.ndim:
        sigma = sigma.flatten(0, sigma.ndim - sample.ndim)
        alpha = 1 - sigma
    if extra and extra.get("pred_original_sample") is not None:  # the pipeline has formed x0 itself and hands it over
        a, b = 0.0, 1.0
    else:
        name = getattr(scheduler.config, "prediction_type", "flow_prediction" if kind == "flow" else "epsilon")
        a, b = coefficients(name, kind, alpha, sigma, scheduler)
    x = sample if sample.dtype == torch.float64 else sample.float()
    m = model_output.to(x.dtype)
    if m.shape != x.shape:
        m = m[:, : x.shape[1]]
    return Prediction(a * x + b * m, x, alpha, sigma, b)
