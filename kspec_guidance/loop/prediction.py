"""Conversion between model outputs and clean predictions x0, for all supported schedulers.

Noisy samples of a scheduler are ``x = alpha x0 + sigma noise``, and each prediction type is linear, ``x0 = A x + B m``
for noisy sample ``x`` and model output ``m``, so a move of x0 changes the model output to ``m + move / B``. A
:class:`Parametrisation` computes alpha, sigma, A and B; :data:`PARAMETRISATIONS` maps scheduler classes to them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kspec_guidance.utils.transfer import on_host

if TYPE_CHECKING:
    from kspec_guidance.loop.context import StepContext, StepHandler

__all__ = [
    "PARAMETRISATIONS",
    "Parametrisation",
    "Prediction",
    "UnsupportedSchedulerError",
    "apply_move",
    "keep_finite",
    "parametrisation_of",
    "predict",
    "realised_move",
    "share_of_move",
    "supported_schedulers",
    "time_of",
]

Level = float | Tensor  # a tensor if tokens have different noise levels
Arguments = Mapping[str, Any]  # the further arguments of ``scheduler.step``, by name


class UnsupportedSchedulerError(ValueError):
    """The scheduler's parametrisation is unknown, so x0 cannot be computed."""


@dataclass(frozen=True)
class Prediction:
    """x0 and the coefficients to change it: ``x = alpha x0 + sigma noise``, and ``slope`` is ``d x0 / d m``.

    ``noise`` is the model output where it predicts the noise; None elsewhere. ``share`` is that of a move of x0 which has
    the effect of the whole move in a scheduler with one stage a step, see :func:`share_of_move`.
    """

    x0: Any
    sample: Any
    alpha: Level
    sigma: Level
    slope: Level
    noise: Tensor | None = None
    share: float = 1.0

    def moved(self, model_output: Any, move: Any) -> Any:
        """The model output whose x0 is ``x0 + move``; further channels (a learned variance) are unchanged."""
        if isinstance(model_output, list | tuple):
            return type(model_output)(self.moved(m, d) for m, d in zip(model_output, move, strict=True))
        if isinstance(self.slope, Tensor):  # tokens without noise, such as those of a condition image, do not move
            shift = torch.where(self.slope.abs() > 1e-6, move / self.slope, 0).to(model_output.dtype)
        elif abs(self.slope) <= 1e-6:
            return model_output
        elif move.shape == model_output.shape and move.dtype == model_output.dtype:
            return torch.add(model_output, move, alpha=1 / self.slope)
        else:
            shift = (move / self.slope).to(model_output.dtype)
        channels = move.shape[1]
        if model_output.shape[1] == channels:
            return model_output + shift
        return torch.cat([model_output[:, :channels] + shift, model_output[:, channels:]], dim=1)

    @property
    def score(self) -> Any:
        """The direction of the score at the sample, up to its sign: ``x - alpha x0 = sigma noise``."""
        if isinstance(self.x0, list):
            return [x - self.alpha * x0 for x0, x in zip(self.x0, self.sample, strict=True)]
        return _combine(1.0, self.sample, -self.alpha, self.x0)

    @property
    def noise_direction(self) -> Any:
        """A direction parallel to the score: that of the predicted noise."""
        return self.score if self.noise is None else self.noise

    @property
    def noise_to_signal(self) -> Level:
        """``sigma / alpha``, the noise level in the convention of Euler schedulers; infinite for pure noise.

        The ratio of means, as a tensor of one element, if tokens have different levels.
        """
        alpha, sigma = self.alpha, self.sigma
        if isinstance(alpha, Tensor) and isinstance(sigma, Tensor):
            return torch.where(alpha.mean() > 0, sigma.mean() / alpha.mean(), float("inf"))
        return sigma / alpha if alpha > 0 else float("inf")


def keep_finite(moved: Any, original: Any, overflows: list[Tensor]) -> Any:
    """``moved``, or ``original`` where a move has overflowed float16 (near the end of a run, where slopes are small).

    Rows with an overflow are not moved. Whether there are any is appended to ``overflows``, on the device: nothing waits.
    Other dtypes have the range of float32, far above any move.
    """
    if isinstance(moved, list | tuple):
        return type(moved)(keep_finite(m, o, overflows) for m, o in zip(moved, original, strict=True))
    if moved.dtype != torch.float16:
        return moved
    finite = torch.isfinite(moved).flatten(1).all(1)
    overflows.append(~finite.all())
    return torch.where(finite.view(-1, *[1] * (moved.ndim - 1)), moved, original)


def realised_move(before: Any, after: Any, move: Any, slope: Level = 1.0) -> Any:
    """What rounding to half precision has left of a move; the move itself in other dtypes, which lose nothing of note.

    Args:
        before: samples or model outputs ``[n, ...]``, possibly with further channels.
        after: the same with the move.
        move: the intended move.
        slope: ``d x0 / d m`` if these are model outputs and the move is that of x0.
    """
    if isinstance(after, list | tuple):
        return type(move)(realised_move(b, a, m, slope) for b, a, m in zip(before, after, move, strict=True))
    if after is before:  # the noise level is 0, or the moves overflow
        return torch.zeros_like(move)
    if after.dtype.itemsize > 2:
        return move
    return (after.float() - before.float())[:, : move.shape[1]] * slope


def apply_move(
    original: Any, moved: Any, move: Any, handler: "StepHandler", context: "StepContext", slope: Tensor | float = 1.0
) -> Any:
    """``moved`` without what overflows; the handler is told what rounding has left of the move.

    Args:
        original: what was moved: a model output or samples.
        moved: the same, moved.
        move: the move of x0 or of the samples, in their layout.
        handler: takes note.
        context: of the step.
        slope: of x0 as a function of the model output.
    """
    moved = keep_finite(moved, original, context.overflows)
    realised = realised_move(original, moved, move, slope)
    if realised is not move:
        handler.realised(realised, context)
    return moved


def _combine(a: Level, x: Tensor, b: Level, y: Tensor) -> Tensor:
    """``a x + b y``."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return a * x + b * y
    return torch.add(x, y, alpha=b) if a == 1 else (a * x).add_(y, alpha=b)


# -- the noise level of a step -----------------------------------------------------------------------------------------


def time_of(scheduler: Any, timestep: Tensor | float) -> float:
    """The timestep of a step, or the first of several; an element of ``scheduler.timesteps`` is read with all others."""
    times = getattr(scheduler, "timesteps", None)
    if isinstance(timestep, Tensor) and timestep.device.type != "cpu" and isinstance(times, Tensor):
        index = int(timestep.storage_offset() - times.storage_offset())
        same = timestep.untyped_storage()._cdata == times.untyped_storage()._cdata and timestep.dtype == times.dtype
        if same and times.ndim == 1 and times.is_contiguous() and 0 <= index < len(times):
            return _at(times, index)
    return float(torch.as_tensor(timestep).flatten()[0])


def _at(values: Tensor, index: int) -> float:
    return float(on_host(values)[index])


def _step_index(scheduler: Any, timestep: Tensor | float) -> int:
    """The scheduler's step index, initialised as in its ``step`` if this is the first step."""
    if scheduler.step_index is None:
        scheduler._init_step_index(timestep)
    return int(scheduler.step_index)


def _sigma(scheduler: Any, timestep: Tensor | float) -> float:
    """``sigmas`` at the scheduler's step index."""
    index, sigmas = _step_index(scheduler, timestep), scheduler.sigmas
    if getattr(scheduler, "mid_point_sigma", None) is not None:  # DPMSolverSDE's second stage
        return float(scheduler.mid_point_sigma)
    if getattr(scheduler, "sigmas_interpol", None) is not None and not scheduler.state_in_first_order:
        sigmas = scheduler.sigmas_interpol  # KDPM2 evaluates its second stage between two noise levels
        index -= any(cls.__name__ == "KDPM2AncestralDiscreteScheduler" for cls in type(scheduler).__mro__)
    return _at(sigmas, index)


def share_of_move(scheduler: Any, sigma: Level) -> float:
    """The share of a move of x0 to apply at the second stage of a step of a scheduler.

    The second stage of Heun and KDPM2 takes the derivative ``(x - x0) / sigma`` at a lower noise level, for the step from
    the level of the first stage. A move there would count more by the ratio of the two levels: without bound in runs of few
    steps, whose levels are far apart.
    """
    if hasattr(scheduler, "mid_point_sigma"):  # DPMSolverSDE takes x0 itself
        return 1.0
    return min(float(sigma) / _at(scheduler.sigmas, int(scheduler.step_index) - 1), 1.0)


def _flow_sigma(scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> Level:
    if arguments.get("per_token_timesteps") is not None:  # with a condition image each token [n, l] has its own level
        return arguments["per_token_timesteps"].float()[..., None] / scheduler.config.num_train_timesteps
    if arguments.get("dmd_sigmas") is not None:  # Helios, distilled
        times = on_host(arguments["dmd_timesteps"]).double()
        return _at(arguments["dmd_sigmas"], int((times - time_of(scheduler, timestep)).abs().argmin()))
    if type(scheduler).__name__ == "FlowMapEulerDiscreteScheduler":  # its step looks up the time, not the step index
        index = scheduler.index_for_timestep(timestep)
        if index is None:
            return time_of(scheduler, timestep) / scheduler.config.num_train_timesteps
        return _at(scheduler.sigmas, int(torch.as_tensor(index).flatten()[0]))
    return _sigma(scheduler, timestep)


# -- parametrisations ----------------------------------------------------------------------------------------------------


class Parametrisation:
    """Base class: noise levels and prediction types of a family of schedulers.

    A subclass implements :meth:`levels`, and overrides :meth:`coefficients` if the prediction types below do not apply.
    """

    default_prediction_type = "epsilon"

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        """``alpha`` and ``sigma`` of the model's input at this step.

        Args:
            scheduler: the scheduler before its step.
            timestep: as passed to ``scheduler.step``.
            arguments: further arguments of ``scheduler.step``, by name.
        """
        raise NotImplementedError

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        """A and B of ``x0 = A x + B m``.

        Raises:
            UnsupportedSchedulerError: for an unknown prediction type.
        """
        if prediction_type in ("sample", "original_sample"):
            return 0.0, 1.0
        if prediction_type == "flow_prediction":
            return 1.0, -sigma
        if prediction_type == "epsilon":
            return 1 / alpha, -sigma / alpha
        if prediction_type == "v_prediction":
            return alpha, -sigma
        raise UnsupportedSchedulerError(
            f"prediction_type {prediction_type!r} is not supported; use epsilon, v_prediction, sample or flow_prediction"
        )


class VariancePreserving(Parametrisation):
    """``alpha^2 = alphas_cumprod[timestep]`` and ``sigma^2 = 1 - alpha^2``."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        last = len(scheduler.alphas_cumprod) - 1
        abar = _at(scheduler.alphas_cumprod, min(max(int(time_of(scheduler, timestep)), 0), last))
        return abar**0.5, (1 - abar) ** 0.5


class VariancePreservingSigma(Parametrisation):
    """``sigmas[step_index]``, converted to alpha and sigma by the scheduler; a flow with ``use_flow_sigmas``."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        level = torch.tensor(_sigma(scheduler, timestep), dtype=torch.float64, device="cpu")
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(level)
        return float(alpha), float(sigma)


class VariancePreservingTime(Parametrisation):
    """alpha-bar as a function of a time in 0..1."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        time = torch.tensor([time_of(scheduler, timestep)], dtype=torch.float64, device="cpu")
        abar = float(scheduler._alpha_cumprod(time, "cpu"))
        return abar**0.5, (1 - abar) ** 0.5


class VarianceExploding(Parametrisation):
    """``x = x0 + sigma noise``; a v-prediction is that of ``x / sqrt(sigma^2 + 1)``."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        return 1.0, _sigma(scheduler, timestep)

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        if prediction_type == "v_prediction":
            scale = sigma * sigma + 1
            return 1 / scale, -sigma / scale**0.5
        return super().coefficients(scheduler, prediction_type, alpha, sigma)


class EDM(VarianceExploding):
    """``x = x0 + sigma noise``, the output preconditioned (Karras et al. 2022, arXiv 2206.00364, table 1)."""

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        data = scheduler.config.sigma_data
        size = (sigma**2 + data**2) ** 0.5
        return data**2 / size**2, (-sigma if prediction_type == "v_prediction" else sigma) * data / size


class Consistency(VarianceExploding):
    """EDM with the boundary condition at sigma_min (Song et al. 2023, arXiv 2303.01469, equation 5)."""

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        data, above = scheduler.config.sigma_data, sigma - scheduler.config.sigma_min
        return data**2 / (above**2 + data**2), above * data / (sigma**2 + data**2) ** 0.5


class Flow(Parametrisation):
    """``x = (1 - sigma) x0 + sigma noise``, the output a velocity toward noise."""

    default_prediction_type = "flow_prediction"

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        sigma = _flow_sigma(scheduler, timestep, arguments)
        return 1 - sigma, sigma

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        if prediction_type in ("sample", "original_sample"):
            return 0.0, 1.0
        return 1.0, -sigma


class FlowTowardData(Parametrisation):
    """``x = t x0 + (1 - t) noise``, the output a velocity toward data."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        inverted = getattr(scheduler.config, "invert_sigmas", False)  # OmniGen
        time = _sigma(scheduler, timestep) if inverted else time_of(scheduler, timestep)
        return time, 1 - time

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        return 1.0, sigma


class TrigFlow(Parametrisation):
    """``x = cos(t) x0 + sin(t) noise`` (Lu and Song 2024, arXiv 2410.11081); also used by IPNDM."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        if hasattr(scheduler, "alphas"):
            index = _step_index(scheduler, timestep)
            return _at(scheduler.alphas, index), _at(scheduler.betas, index)
        angle = torch.tensor(time_of(scheduler, timestep), dtype=torch.float64, device="cpu")
        return float(angle.cos()), float(angle.sin())

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        return alpha, -sigma


class Score(Parametrisation):
    """``x = x0 + sigma noise``, the output the score."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        return 1.0, _at(scheduler.discrete_sigmas, int(time_of(scheduler, timestep) * (len(scheduler.timesteps) - 1)))

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        return 1.0, sigma**2


class KarrasVe(Parametrisation):
    """``x = x0 + sigma noise`` at a raised noise level, the output noise with the opposite sign."""

    def levels(self, scheduler: Any, timestep: Tensor | float, arguments: Arguments) -> tuple[Level, Level]:
        return 1.0, time_of(scheduler, timestep)

    def coefficients(self, scheduler: Any, prediction_type: str, alpha: Level, sigma: Level) -> tuple[Level, Level]:
        return 1.0, sigma


_vp, _vp_sigma, _ve, _edm, _flow = VariancePreserving(), VariancePreservingSigma(), VarianceExploding(), EDM(), Flow()
_toward_data, _trig = FlowTowardData(), TrigFlow()

# By class name, looked up along a scheduler's class hierarchy, so subclasses are supported.
PARAMETRISATIONS: dict[str, Parametrisation] = {
    "DDPMScheduler": _vp,
    "DDIMScheduler": _vp,
    "DDPMParallelScheduler": _vp,
    "DDIMParallelScheduler": _vp,
    "PNDMScheduler": _vp,
    "LCMScheduler": _vp,
    "TCDScheduler": _vp,
    "CogVideoXDDIMScheduler": _vp,
    "CogVideoXDPMScheduler": _vp,
    "UnCLIPScheduler": _vp,
    "RePaintScheduler": _vp,
    "DDPMWuerstchenScheduler": VariancePreservingTime(),
    "DPMSolverMultistepScheduler": _vp_sigma,
    "DPMSolverSinglestepScheduler": _vp_sigma,
    "DEISMultistepScheduler": _vp_sigma,
    "UniPCMultistepScheduler": _vp_sigma,
    "SASolverScheduler": _vp_sigma,
    "EulerDiscreteScheduler": _ve,
    "EulerAncestralDiscreteScheduler": _ve,
    "HeunDiscreteScheduler": _ve,
    "LMSDiscreteScheduler": _ve,
    "KDPM2DiscreteScheduler": _ve,
    "KDPM2AncestralDiscreteScheduler": _ve,
    "DPMSolverSDEScheduler": _ve,
    "EDMEulerScheduler": _edm,
    "EDMDPMSolverMultistepScheduler": _edm,
    "CosineDPMSolverMultistepScheduler": _edm,
    "CMStochasticIterativeScheduler": Consistency(),
    "FlowMatchEulerDiscreteScheduler": _flow,
    "FlowMatchHeunDiscreteScheduler": _flow,
    "FlowMatchLCMScheduler": _flow,
    "FlowMapEulerDiscreteScheduler": _flow,
    "LTXEulerAncestralRFScheduler": _flow,
    "HeliosScheduler": _flow,
    "HeliosDMDScheduler": _flow,
    "MiniMaxH3Scheduler": _toward_data,
    "RFD4ProteinaScheduler": _toward_data,
    "SCMScheduler": _trig,
    "IPNDMScheduler": _trig,
    "ScoreSdeVeScheduler": Score(),
    "KarrasVeScheduler": KarrasVe(),
}
_DISCRETE, _INVERSE = "it samples discrete tokens, which have no gradient", "it runs from images to noise"
UNGUIDABLE = {  # schedulers that no hook can guide, with the reason
    "AmusedScheduler": _DISCRETE,
    "VQDiffusionScheduler": _DISCRETE,
    "BlockRefinementScheduler": _DISCRETE,
    "DiscreteDDIMScheduler": _DISCRETE,
    "EntropyBoundScheduler": _DISCRETE,
    "DDIMInverseScheduler": _INVERSE,
    "DPMSolverMultistepInverseScheduler": _INVERSE,
    "PiflowScheduler": "its model returns a policy that is rolled out inside the step, not a prediction",
}


def supported_schedulers() -> list[str]:
    """Names of the supported scheduler classes."""
    return sorted(PARAMETRISATIONS)


def parametrisation_of(scheduler: Any) -> Parametrisation:
    """The parametrisation of the scheduler's class, or of its nearest known ancestor.

    Raises:
        UnsupportedSchedulerError: if the scheduler is not supported.
    """
    for cls in type(scheduler).__mro__:
        found = PARAMETRISATIONS.get(cls.__name__)
        if found is not None:
            inverted = isinstance(found, Flow) and getattr(scheduler.config, "invert_sigmas", False)
            return _toward_data if inverted else found
        if cls.__name__ in UNGUIDABLE:
            raise UnsupportedSchedulerError(f"{type(scheduler).__name__} cannot be guided: {UNGUIDABLE[cls.__name__]}")
    raise UnsupportedSchedulerError(
        f"{type(scheduler).__name__} is not supported; use one of {', '.join(supported_schedulers())}, "
        "e.g. pipe.scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)"
    )


def predict(
    scheduler: Any,
    model_output: Any,
    timestep: Tensor | float,
    sample: Any,
    arguments: Arguments | None = None,
    parametrisation: Parametrisation | None = None,
) -> Prediction:
    """Compute x0 (float32 or wider) before a scheduler step.

    Args:
        scheduler: one of :func:`supported_schedulers`, with its timesteps set.
        model_output: ``[n, c, ...]``, or ``[n, 2c, ...]`` with a learned variance in the second half.
        timestep: as passed to ``scheduler.step``.
        sample: noisy ``[n, c, ...]``; model output and sample are lists for a state of several tensors at one noise level.
        arguments: further arguments of ``scheduler.step``, by name.
        parametrisation: the scheduler's parametrisation, if it was looked up before.

    Raises:
        UnsupportedSchedulerError: for an unknown scheduler or prediction type.
    """
    found, arguments = parametrisation or parametrisation_of(scheduler), arguments or {}
    if isinstance(sample, list | tuple):
        parts = [predict(scheduler, m, timestep, x, arguments, found) for m, x in zip(model_output, sample, strict=True)]
        first = parts[0]
        return Prediction(
            [p.x0 for p in parts], [p.sample for p in parts], first.alpha, first.sigma, first.slope, share=first.share
        )
    alpha, sigma = found.levels(scheduler, timestep, arguments)
    if isinstance(sigma, Tensor) and sigma.ndim > sample.ndim:
        sigma = sigma.flatten(0, sigma.ndim - sample.ndim)
        alpha = 1 - sigma
    a: Level = 0.0
    b: Level = 1.0  # for pipelines that pass x0 themselves
    if arguments.get("pred_original_sample") is None:
        name = getattr(scheduler.config, "prediction_type", found.default_prediction_type)
        a, b = found.coefficients(scheduler, name, alpha, sigma)
    x = sample if sample.dtype == torch.float64 else sample.float()
    m = model_output.to(x.dtype)
    if m.shape != x.shape:
        m = m[:, : x.shape[1]]
    of_noise = isinstance(a, float) and isinstance(alpha, float) and b != 0 and abs(a * alpha - 1) < 1e-12
    share = 1.0 if getattr(scheduler, "state_in_first_order", True) else share_of_move(scheduler, sigma)
    return Prediction(_combine(a, x, b, m), x, alpha, sigma, b, m if of_noise else None, share)
