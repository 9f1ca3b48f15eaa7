"""Is a scheduler's x0 read off rightly, and is it left alone at scale 0? For every scheduler class that diffusers
exports."""

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
    """``evidence`` says what the recovered x0 was held against; ``error`` is the largest difference, relative to x0's
    scale."""

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
    """Every scheduler class that diffusers exports."""
    found = [n for n in dir(diffusers) if n.endswith("Scheduler") and inspect.isclass(getattr(diffusers, n))]
    return sorted(n for n in set(found) - BASES if not n.startswith("Flax"))


def make(name: str, prediction: str | None = None) -> Any:
    cls = getattr(diffusers, name)
    settings = dict(SETTINGS.get(name, {}))
    if prediction and "prediction_type" in inspect.signature(cls.__init__).parameters:
        settings["prediction_type"] = prediction
    if prediction == "flow_prediction" and "use_flow_sigmas" in inspect.signature(cls.__init__).parameters:
        settings["use_flow_sigmas"] = True
    return cls(**settings)


def start(scheduler: Any, steps: int) -> None:
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


def arguments(scheduler: Any, k: int, m: Tensor, t: Any, x: Tensor, memory: dict[str, Any]) -> dict[str, Any]:
    """Arguments of ``step``, as the scheduler's pipeline gives them."""
    name = type(scheduler).__name__
    step = getattr(scheduler, "step", None) or scheduler.step_pred
    given: dict[str, Any] = {"model_output": m, "timestep": t, "sample": x}
    if name == "KarrasVeScheduler":
        sigma = scheduler.schedule[int(t)]
        before = scheduler.schedule[int(t) - 1] if int(t) > 0 else 0.0
        return {"model_output": m, "sigma_hat": float(sigma), "sigma_prev": float(before), "sample_hat": x}
    if name == "CogVideoXDPMScheduler":
        times = scheduler.timesteps
        given |= {"old_pred_original_sample": memory.get("x0"), "timestep_back": times[k - 1] if k > 0 else None}
    if name == "RePaintScheduler":
        given |= {"original_image": torch.zeros_like(x), "mask": torch.zeros_like(x[:, :1])}
    if name == "HeliosDMDScheduler":
        sigmas = torch.linspace(1.0, 0.0, 1001, dtype=torch.float64)
        given |= {
            "cur_sampling_step": k, "dmd_noisy_tensor": torch.zeros_like(x), "dmd_sigmas": sigmas,
            "dmd_timesteps": 1000 * sigmas, "all_timesteps": scheduler.timesteps,
        }  # fmt: skip
    if name == "DDPMWuerstchenScheduler":
        given["timestep"] = t.expand(len(x))
    if name == "ScoreSdeVeScheduler":
        given["timestep"] = t * torch.ones(len(x))
    if name == "RFD4ProteinaScheduler":
        given["emit_mask"] = torch.ones(x.shape[:2], dtype=torch.bool)
    if name == "TCDScheduler":
        given["eta"] = 0.0  # from x0 straight to the next noise level, so that the last step ends at x0
    if "generator" in inspect.signature(step).parameters:
        given["generator"] = torch.Generator().manual_seed(k)
        if name == "RFD4ProteinaScheduler":
            given["generator"] = [torch.Generator().manual_seed(k + 10 * row) for row in range(len(x))]
    return given


def sample_for(name: str) -> Tensor:
    shape = (3, 16, 3) if name == "RFD4ProteinaScheduler" else SHAPE
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def model(x: Tensor, t: Any) -> Tensor:
    """Any smooth function will do for a network."""
    return (x * 0.3).tanh() + 0.1


def run(scheduler: Any, steps: int, seen: Any = None) -> Tensor:
    """A pipeline's loop on a bare scheduler; ``seen(k, given, result)`` at every step."""
    torch.manual_seed(0)
    start(scheduler, steps)
    x = sample_for(type(scheduler).__name__)
    x = x * float(getattr(scheduler, "init_noise_sigma", 1.0))
    memory: dict[str, Any] = {}
    times = (
        scheduler.timesteps[:-1]
        if type(scheduler).__name__ in ("SCMScheduler", "DDPMWuerstchenScheduler")
        else scheduler.timesteps
    )
    for k, t in enumerate(times):
        if type(scheduler).__name__ == "IPNDMScheduler" and steps == 2 and k == 0:
            scheduler._step_index = 1  # its first noise level is pure noise, where it divides by zero
            continue
        scaled = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        m = model(scaled, t)
        given = arguments(scheduler, k, m, t, x, memory)
        before = seen(k, given, None) if seen else None
        step = getattr(scheduler, "step", None) or scheduler.step_pred
        result = step(**given, return_dict=False)
        if seen:
            seen(k, before, result)
        x, memory["x0"] = result[0], result[1] if len(result) > 1 else None
    return x


# Schedulers whose last step is a plain one from a noise level to none, but that cannot run in one step.
LAST = {
    "HeliosScheduler": 2,
    "HeliosDMDScheduler": 2,
    "MiniMaxH3Scheduler": 2,
    "RFD4ProteinaScheduler": STEPS,
    "IPNDMScheduler": 2,
}
NO_X0 = ("LCM", "TCD", "ScoreSdeVe", "KarrasVe", "SASolver", "CMStoch", "RePaint")  # a second result that is something else


def converted(scheduler: Any, m: Tensor, x: Tensor) -> Tensor | None:
    """x0 by the solver's own ``convert_model_output``; DEIS turns it into noise, which is turned back by its own levels."""
    if not hasattr(scheduler, "convert_model_output"):
        return None
    own = scheduler.convert_model_output(m, sample=x)
    if type(scheduler).__name__ == "DEISMultistepScheduler":
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[scheduler.step_index])
        return (x - sigma * own) / alpha
    return own


def check_prediction(name: str, prediction: str | None) -> tuple[str, float]:
    """What x0 was held against, and the largest difference over a run, relative to x0."""
    scheduler = make(name, prediction)
    errors: dict[str, float] = {}
    last: list[Tensor] = []

    def note(what: str, own: Tensor, x0: Tensor) -> None:
        errors[what] = max(errors.get(what, 0.0), float((own - x0).abs().max() / x0.abs().max()))

    def seen(k: int, given: Any, result: Any) -> Any:
        if result is not None:
            own = result[1] if len(result) > 1 and isinstance(result[1], Tensor) and not name.startswith(NO_X0) else None
            if own is not None and own.shape == given.shape:
                note("its own x0", own, given)
            if name == "TCDScheduler":  # its second result is x0 noised again: hold ours, noised so, against it
                x, abar = last[2], scheduler.alphas_cumprod
                now, times = abar[int(last[3])], scheduler.timesteps
                low = abar[times[k + 1]] if k + 1 < len(times) else abar[0]
                noise = (x - now.sqrt() * given) / (1 - now).sqrt()
                note("its own x0, noised again", result[1], low.sqrt() * given + (1 - low).sqrt() * noise)
            last[:] = [given, result[0]]
            return None
        t, x = given.get("timestep", given.get("sigma_hat")), given.get("sample", given.get("sample_hat"))
        x0 = predict(scheduler, given["model_output"], t, x, {n: v for n, v in given.items() if n != "model_output"}).x0
        last[:] = [x0, x0, x, t]
        own = converted(scheduler, given["model_output"], x)
        if own is not None:
            note("its own conversion", own, x0)
        return x0

    run(scheduler, 2 if name == "SCMScheduler" else STEPS, seen)
    if errors:
        return next(iter(errors)), max(errors.values())
    scheduler = make(name, prediction)
    run(scheduler, LAST.get(name, 1), seen)  # a step from a noise level to none ends at the prediction
    note("where the last step ends", last[1], last[0])
    return next(iter(errors)), max(errors.values())


def check_scheduler(name: str) -> SchedulerVerdict:
    """The verdict on one class; ``evidence`` is ``not applicable`` with the reason where no hook can guide it."""
    verdict = SchedulerVerdict(name)
    if name in UNGUIDABLE:
        verdict.evidence, verdict.reason = "not applicable", UNGUIDABLE[name]
        return verdict
    verdict.kind = type(parametrisation_of(make(name))).__name__
    takes = "prediction_type" in inspect.signature(getattr(diffusers, name).__init__).parameters
    takes = takes and not name.startswith("Helios")  # velocities only, whatever the argument
    for prediction in PREDICTIONS if takes else (None,):
        try:
            run(make(name, prediction), 2)
        except (ValueError, NotImplementedError):
            continue  # the class does not have this prediction type
        evidence, error = check_prediction(name, prediction)
        verdict.evidence = verdict.evidence or evidence
        verdict.error = max(verdict.error, error)
        verdict.predictions.append(prediction or "its own")
    plain = run(make(name), STEPS if name != "SCMScheduler" else 2)
    scheduler, guide = make(name), SPARKE(0.0)
    with guide.attach(scheduler):
        verdict.identical = torch.equal(run(scheduler, STEPS if name != "SCMScheduler" else 2), plain)
    assert len(guide.memory) == len(plain), f"{len(guide.memory)} samples in memory, {len(plain)} were made"
    strong, scheduler = SPARKE(0.5, stop=1.0), make(name)
    with strong.attach(scheduler):
        moved = run(scheduler, STEPS if name != "SCMScheduler" else 2)
    assert torch.isfinite(moved).all(), "guided samples are not finite"
    assert not torch.equal(moved, plain), "guidance changed nothing"
    return verdict
