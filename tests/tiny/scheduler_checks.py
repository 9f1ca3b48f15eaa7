"""Checks of x0 and of guidance at scale 0 for every scheduler class that diffusers exports."""

import inspect
from dataclasses import asdict, dataclass, field
from typing import Any

import diffusers
import torch
from torch import Tensor

from kspec_guidance import SPARKE
from kspec_guidance.loop.prediction import UNGUIDABLE, parametrisation_of, predict

BASES = {"SchedulerMixin"}
STEPS = 6
SETTINGS: dict[str, dict[str, Any]] = {
    "LCMScheduler": {"original_inference_steps": 50, "clip_sample": False},
    "TCDScheduler": {"original_inference_steps": 50, "clip_sample": False},
    "PNDMScheduler": {"skip_prk_steps": True, "set_alpha_to_one": True},
    "UnCLIPScheduler": {"clip_sample": False},
    "DDPMScheduler": {"clip_sample": False},
    "DDIMScheduler": {"clip_sample": False},
    "DDPMParallelScheduler": {"clip_sample": False},
    "DDIMParallelScheduler": {"clip_sample": False},
    "CogVideoXDDIMScheduler": {"clip_sample": False},
    "CogVideoXDPMScheduler": {"clip_sample": False},
    "RePaintScheduler": {"clip_sample": False},
    "CMStochasticIterativeScheduler": {"clip_denoised": False},
    "HeliosScheduler": {"stages": 1, "stage_range": [0, 1]},
    "HeliosDMDScheduler": {"stages": 1, "stage_range": [0, 1]},
    "RFD4ProteinaScheduler": {
        "schedule_mode": "power",
        "noise_mode": "tan",
        "tsr_k": 1.0,
        "tsr_sigma": 1.0,
        "t_lim_ode": 0.0,
        "tail_steps": 0,
    },
}
PREDICTIONS = ("epsilon", "v_prediction", "sample", "flow_prediction", "trigflow")
SHAPE = (3, 4, 8, 8)


@dataclass
class SchedulerVerdict:
    """``evidence`` is what x0 was compared with; ``error`` is the largest difference relative to the largest ``|x0|``."""

    name: str
    evidence: str = ""
    kind: str = ""
    predictions: list[str] = field(default_factory=list)
    error: float = 0.0
    identical: bool = False
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def scheduler_names() -> list[str]:
    """Names of all scheduler classes that diffusers exports."""
    names = [n for n in dir(diffusers) if n.endswith("Scheduler") and inspect.isclass(getattr(diffusers, n))]
    return sorted(n for n in set(names) - BASES if not n.startswith("Flax"))


def build_scheduler(name: str, prediction: str | None = None) -> Any:
    cls = getattr(diffusers, name)
    settings = dict(SETTINGS.get(name, {}))
    if prediction and "prediction_type" in inspect.signature(cls.__init__).parameters:
        settings["prediction_type"] = prediction
    if prediction == "flow_prediction" and "use_flow_sigmas" in inspect.signature(cls.__init__).parameters:
        settings["use_flow_sigmas"] = True
    return cls(**settings)


def set_timesteps(scheduler: Any, steps: int) -> None:
    if type(scheduler).__name__ == "SCMScheduler":
        scheduler.set_timesteps(
            num_inference_steps=steps, max_timesteps=1.57080, intermediate_timesteps=1.3 if steps == 2 else None
        )
    elif type(scheduler).__name__ == "RePaintScheduler":
        scheduler.set_timesteps(steps, jump_length=1, jump_n_sample=1)
    elif type(scheduler).__name__ == "RFD4ProteinaScheduler":
        scheduler.set_timesteps(steps)
    elif type(scheduler).__name__ == "ScoreSdeVeScheduler":
        scheduler.set_timesteps(steps)
        scheduler.set_sigmas(steps)
    else:
        scheduler.set_timesteps(steps)


def step_arguments(scheduler: Any, k: int, m: Tensor, t: Any, x: Tensor, previous: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``step``, as the scheduler's pipeline passes them."""
    name = type(scheduler).__name__
    step = getattr(scheduler, "step", None) or scheduler.step_pred
    arguments: dict[str, Any] = {"model_output": m, "timestep": t, "sample": x}
    if name == "KarrasVeScheduler":
        sigma = scheduler.schedule[int(t)]
        previous_sigma = scheduler.schedule[int(t) - 1] if int(t) > 0 else 0.0
        return {"model_output": m, "sigma_hat": float(sigma), "sigma_prev": float(previous_sigma), "sample_hat": x}
    if name == "CogVideoXDPMScheduler":
        timesteps = scheduler.timesteps
        arguments |= {"old_pred_original_sample": previous.get("x0"), "timestep_back": timesteps[k - 1] if k > 0 else None}
    if name == "RePaintScheduler":
        arguments |= {"original_image": torch.zeros_like(x), "mask": torch.zeros_like(x[:, :1])}
    if name == "HeliosDMDScheduler":
        sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)
        arguments |= {
            "cur_sampling_step": k, "dmd_noisy_tensor": torch.zeros_like(x), "dmd_sigmas": sigmas,
            "dmd_timesteps": 1000 * sigmas, "all_timesteps": scheduler.timesteps,
        }  # fmt: skip
    if name == "DDPMWuerstchenScheduler":
        arguments["timestep"] = t.expand(len(x))
    if name == "ScoreSdeVeScheduler":
        arguments["timestep"] = t * torch.ones(len(x))
    if name == "RFD4ProteinaScheduler":
        arguments["emit_mask"] = torch.ones(x.shape[:2], dtype=torch.bool)
    if name == "TCDScheduler":
        arguments["eta"] = 0.0  # deterministic, so that the last step ends at x0
    if "generator" in inspect.signature(step).parameters:
        arguments["generator"] = torch.Generator().manual_seed(k)
        if name == "RFD4ProteinaScheduler":
            arguments["generator"] = [torch.Generator().manual_seed(k + 10 * row) for row in range(len(x))]
    return arguments


def sample_for(name: str) -> Tensor:
    shape = (3, 16, 3) if name == "RFD4ProteinaScheduler" else SHAPE
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def model(x: Tensor, t: Any) -> Tensor:
    """A smooth function in place of a network."""
    return (x * 0.3).tanh() + 0.1


def run_scheduler(scheduler: Any, steps: int, observe: Any = None) -> Tensor:
    """A denoising loop; ``observe(k, arguments, None)`` runs before each step, and gets its return value back after it."""
    torch.manual_seed(0)
    set_timesteps(scheduler, steps)
    x = sample_for(type(scheduler).__name__)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    previous: dict[str, Any] = {}
    timesteps = (
        scheduler.timesteps[:-1]
        if type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler")
        else scheduler.timesteps
    )
    for k, t in enumerate(timesteps):
        if type(scheduler).__name__ == "IPNDMScheduler" and steps == 2 and k == 0:
            scheduler._step_index = 1  # it divides by zero at pure noise
            continue
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = model(scaled, t)
        arguments = step_arguments(scheduler, k, m, t, x, previous)
        state = observe(k, arguments, None) if observe else None
        step = getattr(scheduler, "step", None) or scheduler.step_pred
        result = step(**arguments, return_dict=False)
        if observe:
            observe(k, state, result)
        x, previous["x0"] = result[0], result[1] if len(result) > 1 else None
    return x


# Schedulers that cannot run in one step, with the number of steps after which the last one ends at x0.
MIN_STEPS = {
    "HeliosScheduler": 2,
    "HeliosDMDScheduler": 2,
    "MiniMaxH3Scheduler": 2,
    "RFD4ProteinaScheduler": STEPS,
    "IPNDMScheduler": 2,
}
NO_X0 = ("LCM", "TCD", "ScoreSdeVe", "KarrasVe", "SASolver", "CMStoch", "RePaint")  # their second result is not x0


def converted_x0(scheduler: Any, m: Tensor, x: Tensor) -> Tensor | None:
    """x0 from the solver's ``convert_model_output``; DEIS returns noise, which is converted with its own levels."""
    if not hasattr(scheduler, "convert_model_output"):
        return None
    converted = scheduler.convert_model_output(m, sample=x)
    if type(scheduler).__name__ == "DEISMultistepScheduler":
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
        return (x - sigma * converted) / alpha
    return converted


def check_prediction(name: str, prediction: str | None) -> tuple[str, float]:
    """What x0 was compared with, and the largest relative difference over a run."""
    scheduler = build_scheduler(name, prediction)
    errors: dict[str, float] = {}
    last: list[Tensor] = []

    def compare(comparison: str, reference: Tensor, x0: Tensor) -> None:
        errors[comparison] = max(errors.get(comparison, 0.0), float((reference - x0).abs().max() / x0.abs().max()))

    def observe(k: int, state: Any, result: Any) -> Any:
        if result is not None:
            x0 = state
            reference = (
                result[1] if len(result) > 1 and isinstance(result[1], Tensor) and not name.startswith(NO_X0) else None
            )
            if reference is not None and reference.shape == x0.shape:
                compare("its own x0", reference, x0)
            if name == "TCDScheduler":  # its second result is x0 with noise added: compare with ours after the same
                x, alphas_cumprod = last[2], scheduler.alphas_cumprod
                alpha_cumprod, timesteps = alphas_cumprod[int(last[3])], scheduler.timesteps
                next_alpha_cumprod = alphas_cumprod[timesteps[k + 1]] if k + 1 < len(timesteps) else alphas_cumprod[0]
                noise = (x - alpha_cumprod.sqrt() * x0) / (1 - alpha_cumprod).sqrt()
                compare(
                    "its own x0 after renoising",
                    result[1],
                    next_alpha_cumprod.sqrt() * x0 + (1 - next_alpha_cumprod).sqrt() * noise,
                )
            last[:] = [x0, result[0]]
            return None
        arguments = state
        t, x = arguments.get("timestep", arguments.get("sigma_hat")), arguments.get("sample", arguments.get("sample_hat"))
        x0 = predict(
            scheduler, arguments["model_output"], t, x, {n: v for n, v in arguments.items() if n != "model_output"}
        ).x0
        last[:] = [x0, x0, x, t]
        reference = converted_x0(scheduler, arguments["model_output"], x)
        if reference is not None:
            compare("its own conversion", reference, x0)
        return x0

    run_scheduler(scheduler, 2 if name == "SCMScheduler" else STEPS, observe)
    if errors:
        return next(iter(errors)), max(errors.values())
    scheduler = build_scheduler(name, prediction)
    run_scheduler(scheduler, MIN_STEPS.get(name, 1), observe)  # a step to zero noise ends at x0
    compare("the sample after the last step", last[1], last[0])
    return next(iter(errors)), max(errors.values())


def check_scheduler(name: str) -> SchedulerVerdict:
    """Check one class; ``evidence`` is ``not applicable``, with the reason, for schedulers that cannot be guided."""
    verdict = SchedulerVerdict(name)
    if name in UNGUIDABLE:
        verdict.evidence, verdict.reason = "not applicable", UNGUIDABLE[name]
        return verdict
    verdict.kind = type(parametrisation_of(build_scheduler(name))).__name__
    has_prediction_type = "prediction_type" in inspect.signature(getattr(diffusers, name).__init__).parameters
    has_prediction_type = has_prediction_type and not name.startswith("Helios")  # velocities only, whatever the argument is
    for prediction in PREDICTIONS if has_prediction_type else (None,):
        try:
            run_scheduler(build_scheduler(name, prediction), 2)
        except (ValueError, NotImplementedError):
            continue  # the class does not support this prediction type
        evidence, error = check_prediction(name, prediction)
        verdict.evidence = verdict.evidence or evidence
        verdict.error = max(verdict.error, error)
        verdict.predictions.append(prediction or "its own")
    plain = run_scheduler(build_scheduler(name), STEPS if name != "SCMScheduler" else 2)
    scheduler, guide = build_scheduler(name), SPARKE(0.0)
    with guide.attach(scheduler):
        verdict.identical = torch.equal(run_scheduler(scheduler, STEPS if name != "SCMScheduler" else 2), plain)
    assert len(guide.memory) == len(plain), f"{len(guide.memory)} samples in memory, {len(plain)} were made"
    guide, scheduler = SPARKE(0.5, stop=1.0), build_scheduler(name)
    with guide.attach(scheduler):
        moved = run_scheduler(scheduler, STEPS if name != "SCMScheduler" else 2)
    assert torch.isfinite(moved).all(), "guided samples are not finite"
    assert not torch.equal(moved, plain), "guidance changed nothing"
    return verdict
