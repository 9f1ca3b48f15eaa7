"""What all methods share: the hook on the scheduler's step, the hooks around the denoiser, and the moment between them.

A method changes one of four things: the condition that the denoiser sees, what classifier-free guidance makes of its
output, the clean prediction behind the model output, or the sample after the step. Each is a method to override; the
pipeline is left as it was found, whatever happens.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance.guidance import transforms as moves
from kspec_guidance.loop.components import denoiser_of
from kspec_guidance.loop.prediction import predict
from kspec_guidance.loop.scheduler_hook import SchedulerHook

__all__ = ["Log", "Method", "Moment", "Real", "Whole", "norms", "rbf", "repulsion"]


@dataclass(frozen=True)
class Real:
    """A tuned number in ``low..high``; ``log`` for one whose order of magnitude matters."""

    low: float
    high: float
    log: bool = False


def Log(low: float, high: float) -> Real:
    return Real(low, high, True)


@dataclass(frozen=True)
class Whole:
    low: int
    high: int


@dataclass
class Moment:
    """One step about to be taken: everything in the shape of the samples ``[n, ...]``.

    ``x = alpha x0 + sigma noise``; ``fraction`` is the place in the run, 0 at its start.
    """

    x0: Tensor
    x: Tensor
    alpha: float
    sigma: float
    step: int
    total: int
    call: tuple[Any, dict[str, Any]] | None
    pipe: Any
    scheduler: Any
    timestep: Any

    @property
    def fraction(self) -> float:
        return self.step / self.total

    @property
    def noise(self) -> Tensor:
        return (self.x - self.alpha * self.x0) / max(self.sigma, 1e-8)

    @property
    def score(self) -> Tensor:
        """``grad log p(x) = -noise / sigma``."""
        return -self.noise / max(self.sigma, 1e-8)

    def denoise(self, x: Tensor) -> Tensor:
        """The clean prediction at other samples of this noise level, classifier-free guidance included."""
        return predict(self.scheduler, self.output(x), self.timestep, x, {}).x0

    def output(self, x: Tensor) -> Tensor:
        """What the denoiser says of other samples of this noise level."""
        assert self.call is not None
        module, given = self.call
        name = next(k for k, v in given.items() if isinstance(v, Tensor) and v.ndim > 1)
        scale = getattr(self.pipe, "guidance_scale", 1.0)
        doubled = len(given[name]) == 2 * len(x)
        inputs = torch.cat([x, x]) if doubled else x
        if hasattr(self.scheduler, "scale_model_input"):
            inputs = self.scheduler.scale_model_input(inputs, self.timestep)
        out = module.forward(**{**given, name: inputs, "return_dict": False})[0]
        if doubled:
            free, held = out.chunk(2)
            out = free + scale * (held - free)
        return out


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, ``[n, 1, ...]``, never 0."""
    return moves.norms(x).clamp_min(1e-12)


def rbf(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Squared distances, kernel ``exp(-d_ij^2 / h_i)`` without its diagonal ``[n, n]``, and ``h_i [n, 1]``.

    ``h_i`` is the squared median distance from i to the others over ``log(n - 1)``, as in the authors' code of particle
    guidance.
    """
    n = len(rows)
    d2 = torch.cdist(rows, rows).square()
    others = d2[~torch.eye(n, dtype=torch.bool)].view(n, n - 1)
    h = others.median(1, keepdim=True).values.clamp_min(1e-12) / math.log(max(n - 1, 2))
    return d2, torch.exp(-d2 / h).fill_diagonal_(0), h


def repulsion(x: Tensor) -> Tensor:
    """``sum_j 2/h_i k_ij (x_i - x_j)``: away from the others, as the gradient of each sample's own potential."""
    rows = x.flatten(1)
    _, k, h = rbf(rows)
    return (2 / h * (k.sum(1, keepdim=True) * rows - k @ rows)).view(x.shape)


@dataclass
class Method:
    """Base class: does nothing. Subclasses are dataclasses of their parameters.

    ``tuned`` names what the optimiser may choose and within what; ``strength`` is the one of them whose sweep makes the
    front; ``needs`` what a bed must have for it: ``features`` of the denoiser, classifier-free ``guidance``, ``prompts``.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    tuned: ClassVar[dict[str, Real | Whole]] = {}
    strength: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    falls: ClassVar[bool] = False  # whether a smaller strength is the stronger one
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    @classmethod
    def first(cls, steps: int) -> dict[str, Any]:
        """What the authors would begin with at so many steps, where it is not the default."""
        return {}

    # -- to override -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """A run begins."""

    def condition(self, states: Tensor, fraction: float) -> Tensor:
        """The wanted prompts' states ``[n, l, c]`` that the denoiser sees."""
        return states

    def outputs(self, free: Tensor, held: Tensor, scale: float, fraction: float) -> tuple[Tensor, Tensor]:
        """Unconditional and conditional output; the pipeline makes ``free + scale (held - free)`` of them."""
        return free, held

    def resample(self, m: Moment) -> Tensor | None:
        """Another sample of the same noise level to take the step from; the denoiser is asked again."""
        return None

    def move(self, m: Moment) -> Tensor | None:
        """What is added to the clean prediction."""
        return None

    def after(self, m: Moment, latents: Tensor) -> Tensor:
        """The sample that the step has made."""
        return latents

    def noise_like(self, x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype)

    def sample(self, bed: Any, case: Any) -> Tensor:
        """A bed's number of samples of one of its cases."""
        with self.attach(bed.pipe):
            return bed.run(case, bed.images)

    # -- the hooks -------------------------------------------------------------------------------------------------

    @contextmanager
    def attach(self, pipe: Any) -> Iterator["Method"]:
        """Until the block ends, whatever happens in it."""
        self.begin()
        self._step, self._call = 0, None
        scheduler = pipe.scheduler
        hooks: list[Callable[[], None]] = []
        try:
            hook = SchedulerHook(scheduler, lambda *a: self._on_step(pipe, *a), self, pipe)
            hooks.append(hook.remove)
            denoiser = denoiser_of(pipe)
            if denoiser is not None:
                before = denoiser.register_forward_pre_hook(lambda m, a, k: self._before(pipe, m, a, k), with_kwargs=True)
                hooks.append(before.remove)
                behind = denoiser.register_forward_hook(lambda m, a, out: self._behind(pipe, out))
                hooks.append(behind.remove)
            yield self
        finally:
            for remove in hooks:
                remove()

    def _fraction(self, pipe: Any) -> float:
        return self._step / max(1, len(pipe.scheduler.timesteps))

    def _before(self, pipe: Any, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        names = ("sample", "timestep", "encoder_hidden_states")
        given = {**dict(zip(names, args, strict=False)), **kwargs}
        states = given["encoder_hidden_states"]
        if pipe.do_classifier_free_guidance:
            empty, wanted = states.chunk(2)
            given["encoder_hidden_states"] = torch.cat([empty, self.condition(wanted, self._fraction(pipe))])
        else:
            given["encoder_hidden_states"] = self.condition(states, self._fraction(pipe))
        self._call = module, given
        return (), given

    def _behind(self, pipe: Any, out: Any) -> Any:
        if not pipe.do_classifier_free_guidance:
            return out
        free, held = out[0].chunk(2)
        return (torch.cat(self.outputs(free, held, pipe.guidance_scale, self._fraction(pipe))), *out[1:])

    def _on_step(self, pipe: Any, scheduler: Any, proceed: Any, output: Any, t: Any, x: Any, extra: Any) -> Any:
        seen = predict(scheduler, output, t, x, extra)
        alpha, sigma = float(seen.alpha), float(seen.sigma)
        total = len(scheduler.timesteps)
        m = Moment(seen.x0, x, alpha, sigma, self._step, total, self._call, pipe, scheduler, t)
        again = self.resample(m)
        if again is not None:
            x, output = again, m.output(again)
            seen = predict(scheduler, output, t, x, extra)
            m = Moment(seen.x0, x, alpha, sigma, self._step, total, self._call, pipe, scheduler, t)
        move = self.move(m)
        if move is not None:
            output = seen.moved(output, move)
        result = proceed(output, x)
        latents = self.after(m, result[0])
        self._step += 1
        if isinstance(result, tuple):
            return (latents, *result[1:])
        result.prev_sample = latents
        return result
