"""What all methods share: a patch of the scheduler's step, hooks on the denoiser, and the state of the step in between.

A method changes one of five things: the condition that the denoiser gets, the weight of classifier-free guidance, the
sample that the step starts from, the clean prediction behind the model output, or the sample after the step. Each is a
method to override. The pipeline is restored afterwards, also after an exception.
"""

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance.loop.classifier_free import ClassifierFree, UnknownGuidanceError, classifier_free
from kspec_guidance.loop.components import denoiser_of
from kspec_guidance.loop.context import CallContext, DenoiserCall, StepContext
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.observer import DenoiserWatch
from kspec_guidance.loop.prediction import Prediction, predict
from kspec_guidance.loop.scheduler_hook import MethodPatch

__all__ = ["Log", "Method", "Moment", "Real", "Whole", "norms", "rbf", "repulsion", "without"]


CONDITIONS = ("encoder_hidden_states", "pooled_projections")  # arguments of denoisers that hold the prompts' states


@dataclass(frozen=True)
class Real:
    """A number to be tuned in ``low..high``, on a logarithmic scale if ``log``."""

    low: float
    high: float
    log: bool = False


def Log(low: float, high: float) -> Real:
    """A number to be tuned on a logarithmic scale."""
    return Real(low, high, True)


@dataclass(frozen=True)
class Whole:
    """A whole number to be tuned in ``low..high``, both included."""

    low: int
    high: int


@dataclass
class Moment:
    """One step about to be taken; all tensors have the shape of the samples ``[n, ...]``, and at least single precision.

    ``x = alpha x0 + sigma noise``; ``fraction`` is the position in the run, 0 at its start. ``call`` is the denoiser's call
    at this step, ``weight`` that of classifier-free guidance if it is not the pipeline's, and ``given`` the model output
    that the step is given.
    """

    x0: Tensor
    x: Tensor
    alpha: float
    sigma: float
    step: int
    total: int
    call: DenoiserCall | None
    pipe: Any
    scheduler: Any
    timestep: Any
    weight: float | None = None
    given: Tensor | None = None

    @property
    def fraction(self) -> float:
        """Position of the step in the run, 0 at its start."""
        return self.step / self.total

    @property
    def noise(self) -> Tensor:
        """The noise that the prediction leaves, of the shape of the samples."""
        return (self.x - self.alpha * self.x0) / max(self.sigma, 1e-8)

    @property
    def score(self) -> Tensor:
        """``grad log p(x) = -noise / sigma``."""
        return -self.noise / max(self.sigma, 1e-8)

    def guidance(self) -> ClassifierFree | None:
        """Classifier-free guidance of the step; None where the model makes one prediction for each sample."""
        if self.given is None:
            return None
        found = predict(self.scheduler, self.given, self.timestep, self.x)
        return guidance_of(self.pipe, self.call, self.given, found)

    def denoise(self, x: Tensor) -> Tensor:
        """The clean prediction at other samples of this noise level, classifier-free guidance included."""
        return predict(self.scheduler, self.output(x), self.timestep, x).x0

    def output(self, x: Tensor) -> Tensor:
        """The denoiser's output at other samples of this noise level, classifier-free guidance included."""
        assert self.call is not None
        arguments = self.call.arguments
        name = next(k for k, v in arguments.items() if isinstance(v, Tensor) and v.ndim > 1)
        scale = getattr(self.pipe, "guidance_scale", 1.0) if self.weight is None else self.weight
        doubled, x = len(arguments[name]) == 2 * len(x), x.to(arguments[name].dtype)
        inputs = torch.cat([x, x]) if doubled else x
        if hasattr(self.scheduler, "scale_model_input"):
            inputs = self.scheduler.scale_model_input(inputs, self.timestep)
        out = self.call.module.forward(**{**arguments, name: inputs, "return_dict": False})[0]
        if doubled:
            uncond, cond = out.chunk(2)
            out = uncond + scale * (cond - uncond)
        return out


def guidance_of(pipe: Any, call: DenoiserCall | None, output: Tensor, prediction: Prediction) -> ClassifierFree | None:
    """Classifier-free guidance of a step with this model output; None without."""
    x, total = prediction.sample, len(pipe.scheduler.timesteps)
    context = StepContext(CallContext(pipe), pipe.scheduler, None, Layout.of(x), x.shape, total, denoiser_call=call)
    return classifier_free(output, prediction, context)


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample ``[n, 1, ...]``, at least 1e-12."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1)).clamp_min(1e-12)


def without(x: Tensor, direction: Tensor) -> Tensor:
    """Samples ``[n, ...]`` less their components along those of ``direction``."""
    unit = direction / norms(direction)
    return x - (x * unit).flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1)) * unit


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

    ``name`` is that of tables, ``code`` that of commands. ``tuned`` names the parameters that the optimiser chooses, with
    their ranges; ``strength`` is the one that is swept for the front, at ``strengths`` if these are given. ``needs`` is
    what a bed or a pipeline must have: ``features`` of the denoiser, classifier-free ``guidance``, ``prompts`` among the
    denoiser's arguments, ``images`` with two axes of pixels, transformer ``blocks``. ``again``: whether it calls the
    denoiser again within a step, which must then make all predictions in one call. ``single``: whether calls of one image
    give what one call of several gives, as where images are made alone or one after another. ``tuned_as`` names a method
    whose tuned settings serve for this one as well.
    """

    name: ClassVar[str] = ""
    code: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    tuned: ClassVar[dict[str, Real | Whole]] = {}
    strength: ClassVar[str] = ""
    needs: ClassVar[frozenset[str]] = frozenset()
    strengths: ClassVar[tuple[float, ...]] = ()
    again: ClassVar[bool] = False
    single: ClassVar[bool] = False
    falls: ClassVar[bool] = False  # whether a smaller strength is the stronger one
    tuned_as: ClassVar[str] = ""
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0), repr=False)

    @classmethod
    def first(cls, steps: int) -> dict[str, Any]:
        """First setting that is tried for this number of steps, where it is not the default."""
        return {}

    @classmethod
    def sweep(cls, at: float, number: int) -> list[float]:
        """Values of the strength for a front: those that the class names, or ``number`` around ``at`` within its range."""
        if cls.strengths:
            return list(cls.strengths)
        if not cls.strength:
            return []
        r = cls.tuned[cls.strength]
        if isinstance(r, Whole):
            spread = [float(k) for k in range(r.low, r.high + 1)][:: max(1, (r.high - r.low + 1) // number)][:number]
            return sorted({*spread, at})
        if r.log:
            factors = [0.5, 1.0, 2.0] if number == 3 else [0.35, 0.7, 1.0, 1.5, 3.0][:number]
            return [at * f for f in factors]
        far = r.high if abs(r.high - at) > abs(at - r.low) else r.low
        opposite = r.low if far == r.high else r.high
        return sorted({round(v, 4) for v in (at, (at + opposite) / 2, (at + far) / 2, opposite, far)})[:number]

    # -- to override -----------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Reset the state of the last run; called when the method is attached, and before each further run."""

    def remember(self) -> None:
        """Keep the samples of each run in mind in the next ones, where the method has a memory; most have none."""

    def condition(self, states: Tensor, fraction: float) -> Tensor:
        """The prompts' hidden states ``[n, l, c]``, as the denoiser is to get them; a pooled one has l = 1."""
        return states

    def weight_of(self, fraction: float) -> float | None:
        """The weight of classifier-free guidance at this position in the run; None to keep it."""
        return None

    def resample(self, m: Moment) -> Tensor | None:
        """Another sample of the same noise level to step from, at the cost of one denoiser call; None to keep it."""
        return None

    def move(self, m: Moment) -> Tensor | None:
        """What to add to the clean prediction; None for nothing."""
        return None

    def after(self, m: Moment, latents: Tensor) -> Tensor:
        """The sample after the step, given as ``latents``."""
        return latents

    def noise_like(self, x: Tensor) -> Tensor:
        """Standard normal noise of the shape of ``x``, from the method's own generator."""
        return torch.randn(x.shape, generator=self.generator, dtype=x.dtype).to(x.device)

    def sample(self, bed: Any, case: Any) -> Any:
        """The samples of a case, in the form in which ``bed.run`` makes them."""
        with self.attach(bed.pipe):
            return bed.run(case, bed.images)

    # -- the hooks -------------------------------------------------------------------------------------------------

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        """Apply the method to all calls of ``pipe`` in the ``with`` block."""
        return self._attached(pipe)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator["Method"]:
        self._begin_run()
        with ExitStack() as hooks:
            patch = MethodPatch(pipe.scheduler, "step", functools.partial(self._wrap_step, pipe), self)
            hooks.callback(patch.remove)
            denoiser = denoiser_of(pipe)
            if denoiser is not None and type(self).condition is not Method.condition:
                before = functools.partial(self._before_denoiser, pipe)
                hooks.callback(denoiser.register_forward_pre_hook(before, with_kwargs=True).remove)
            self._watch = DenoiserWatch(pipe)
            hooks.callback(self._watch.remove)
            yield self

    def _begin_run(self) -> None:
        self.begin()
        self._step: int = 0
        self._ended: bool = False

    def _begin_next_run(self) -> None:
        """Begin anew where the last run has ended: the images of a case may need several calls."""
        if self._ended:
            self._begin_run()

    def _fraction(self, pipe: Any) -> float:
        return self._step / max(1, len(pipe.scheduler.timesteps))

    def _before_denoiser(self, pipe: Any, module: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        self._begin_next_run()
        names, placed, given = list(inspect.signature(module.forward).parameters), list(args), dict(kwargs)
        for name in CONDITIONS:
            if name not in given and name not in names[: len(placed)]:
                continue
            where: Any = given if name in given else placed  # by name, also where the signature is that of a wrapper
            key: Any = name if name in given else names.index(name)
            states = where[key]
            start = len(states) // 2 if getattr(pipe, "do_classifier_free_guidance", False) else 0  # rows of the prompts
            rows = states[start:].view(len(states) - start, -1, states.shape[-1])
            changed = self.condition(rows, self._fraction(pipe)).to(states.dtype).view(states[start:].shape)
            where[key] = torch.cat([states[:start], changed])
        return tuple(placed), given

    def _wrap_step(self, pipe: Any, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def step(*args: Any, **kwargs: Any) -> Any:
            self._begin_next_run()
            bound = signature.bind(*args, **kwargs)
            output, sample, moment = self._guide(pipe, bound.arguments)
            bound.arguments["model_output"], bound.arguments["sample"] = output, sample
            result = original(*bound.args, **bound.kwargs)
            latents = self.after(moment, result[0]).to(result[0].dtype)
            self._step += 1
            self._ended = self._step >= len(pipe.scheduler.timesteps)
            if isinstance(result, tuple):
                return (latents, *result[1:])
            result.prev_sample = latents
            return result

        return step

    def _guide(self, pipe: Any, arguments: dict[str, Any]) -> tuple[Tensor, Tensor, Moment]:
        """Model output and sample to step from, given the arguments of ``scheduler.step``; and the state of the step."""
        scheduler, t, call = pipe.scheduler, arguments["timestep"], self._watch.take()
        weight = self.weight_of(self._fraction(pipe))

        def prediction_at(output: Tensor, x: Tensor) -> tuple[Prediction, Moment]:
            found = predict(scheduler, output, t, x, arguments)
            alpha, sigma, total = float(found.alpha), float(found.sigma), len(scheduler.timesteps)
            x0, x = (y.float() if y.dtype.itemsize < 4 else y for y in (found.x0, x))
            return found, Moment(x0, x, alpha, sigma, self._step, total, call, pipe, scheduler, t, weight, output)

        output, x = arguments["model_output"], arguments["sample"]
        if type(self).weight_of is not Method.weight_of:
            output = self._weighted(pipe, call, output, predict(scheduler, output, t, x, arguments), weight)
        prediction, moment = prediction_at(output, x)
        resampled = self.resample(moment)
        if resampled is not None:
            output, x = moment.output(resampled), resampled
            prediction, moment = prediction_at(output, x)
        move = self.move(moment)
        return output if move is None else prediction.moved(output, move.to(output.dtype)), x, moment

    def _weighted(
        self, pipe: Any, call: DenoiserCall | None, output: Tensor, prediction: Prediction, weight: float | None
    ) -> Tensor:
        """The model output with another weight of classifier-free guidance; None keeps the pipeline's.

        Raises:
            UnknownGuidanceError: if the pipeline uses none, or another combination.
        """
        found = guidance_of(pipe, call, output, prediction)
        if found is None or not bool(found.fits):
            raise UnknownGuidanceError(
                f"{self.name} changes the weight of classifier-free guidance, and {type(pipe).__name__} "
                + ("uses none here" if found is None else "combines its predictions in another way")
            )
        return output if weight is None else found.at_weight(output, torch.tensor(weight, device=output.device))
