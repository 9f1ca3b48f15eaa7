"""Hook on ``scheduler.step``: computes the clean prediction, applies the move of a handler, and takes the step.

A hook is an instance attribute that replaces a method; removing it restores all attributes of the object. diffusers is
neither copied nor subclassed, and the denoiser is not modified.
"""

import functools
import inspect
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance.loop.callers import in_progress
from kspec_guidance.loop.context import CallContext, DenoiserCall, StepContext, StepHandler
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.masks import mask_of_samples
from kspec_guidance.loop.prediction import apply_move, parametrisation_of, predict, time_of
from kspec_guidance.loop.prompts import prompts_of_samples
from kspec_guidance.utils.timing import Stopwatch
from kspec_guidance.utils.transfer import on_host

__all__ = ["MethodPatch", "SchedulerHook"]

Function = Callable[..., Any]

# These loops call the step up to three times per noise level, the first two only to convert outputs to predictions.
REPEATED_STEPS = {"CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline"}
ARGUMENT_NAMES = {"sample_hat": "sample", "sigma_hat": "timestep"}  # KarrasVe's names


def never() -> bool:
    """False."""
    return False


class MethodPatch:
    """Replaces a method of one object until :meth:`remove`.

    Patches can be removed in any order, even after other code has wrapped the method: a removed patch forwards calls to
    the callable that it replaced. Copies and pickles of the owner contain the original method.

    Args:
        owner: the object.
        name: name of the method.
        wrap: function from the previous method to its replacement.
        tag: identifies the owner of the patch; a method accepts patches of one tag at a time.
        replaceable: whether a patch of another tag may replace this one, as left over from a call that was aborted.

    Raises:
        ValueError: if the method is patched under another tag.
    """

    owner: Any
    name: str
    tag: Any
    active: bool
    replaceable: Callable[[], bool]
    _patches: "ClassVar[weakref.WeakSet[MethodPatch]]" = weakref.WeakSet()

    def __init__(
        self,
        owner: Any,
        name: str,
        wrap: Callable[[Function], Function],
        tag: Any,
        replaceable: Callable[[], bool] = never,
    ):
        for other in list(self._patches):
            if other.active and other.owner is owner and other.name == name and other.tag is not tag:
                if not other.replaceable():
                    raise ValueError(
                        f"this {type(owner).__name__} is already guided by another guide; combine the two with `guide + "
                        "other`, or detach() the first"
                    )
                other.remove()
        self.owner, self.name, self.tag, self.active, self.replaceable = owner, name, tag, True, replaceable
        self.replaced_attribute, self.original = _live(owner, name)
        functools.update_wrapper(self, self.original, updated=())
        below = functools.update_wrapper(lambda *args, **kwargs: self.original(*args, **kwargs), self.original, updated=())
        self.function = wrap(below)
        object.__setattr__(owner, name, self)
        self._patches.add(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return (self.function if self.active else self.original)(*args, **kwargs)

    def remove(self) -> None:
        """Restore the method. Further calls have no effect."""
        if not self.active:
            return
        self.active = False
        top = self.owner.__dict__.get(self.name)
        if top is self:
            attribute, original = _live(self.owner, self.name)
            if attribute:
                object.__setattr__(self.owner, self.name, original)
            else:
                object.__delattr__(self.owner, self.name)
            return
        while isinstance(top, MethodPatch):  # patches applied after this one
            if top.original is self:
                top.replaced_attribute, top.original = self.replaced_attribute, self.original
                return
            top = top.original

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        copied = memo.get(id(self.owner))  # None if only the owner's attributes are copied, to be restored later
        return self if copied is None else types.MethodType(getattr(type(copied), self.name), copied)

    def __reduce__(self) -> Any:
        return getattr, (self.owner, self.name)


def _live(owner: Any, name: str) -> tuple[bool, Function]:
    """Whether the method is an instance attribute, and the method itself; removed patches are skipped."""
    attribute, method = name in owner.__dict__, getattr(owner, name)
    while isinstance(method, MethodPatch) and not method.active:
        attribute, method = method.replaced_attribute, method.original
    return attribute, method


class SchedulerHook:
    """Calls a handler at each step of a scheduler.

    Args:
        scheduler: the scheduler to hook.
        handler: the handler to call.
        call: returns the context of the pipeline call; called at the start of a pass through the timesteps.
        tag: see :class:`MethodPatch`.
        pipe: the pipeline that calls the step, if known.
        denoiser_call: returns the denoiser's first call since the last step; called at each step.
        foreign: whether the current step belongs to another pipeline, which is left alone; called where a pass begins.

    Raises:
        UnsupportedSchedulerError: if the scheduler is not supported.
        ValueError: by :meth:`install`, if the scheduler is hooked under another tag.
    """

    def __init__(
        self,
        scheduler: Any,
        handler: StepHandler,
        call: Callable[[], CallContext],
        tag: Any,
        pipe: Any = None,
        denoiser_call: Callable[[], DenoiserCall | None] | None = None,
        foreign: Callable[[], bool] = never,
    ):
        self.parametrisation = parametrisation_of(scheduler)  # raises before anything is changed
        self.scheduler, self.handler, self.call, self.tag = scheduler, handler, call, tag
        self.denoiser_call, self.foreign, self.pipe = denoiser_call, foreign, pipe
        self.context: StepContext | None = None  # of the current pass; None during a step, and after a failed step
        self.entered: StepContext | None = None  # of the current pass, also during a step
        self._repeated = not REPEATED_STEPS.isdisjoint(cls.__name__ for cls in type(pipe).__mro__)
        self._patch: MethodPatch | None = None
        self._once: tuple[int, int] | None = None
        self._timesteps: Any = None

    def install(self, once: tuple[int, int] | None = None) -> None:
        """Hook the scheduler.

        Args:
            once: step index and number of steps, to hook the next step only: the hook then removes itself.
        """
        self.remove()
        name = "step" if hasattr(self.scheduler, "step") else "step_pred"
        self._once, self._timesteps = once, getattr(self.scheduler, "timesteps", None)
        thread = threading.current_thread()

        def left_over() -> bool:
            return once is not None and (
                self.scheduler.timesteps is not self._timesteps or not in_progress(self.pipe, thread)
            )

        self._patch = MethodPatch(self.scheduler, name, self._wrap, self.tag, left_over)

    def remove(self) -> None:
        """Remove the hook, if any."""
        if self._patch is not None:
            self._patch.remove()
            self._patch = None

    def forget(self) -> None:
        """Make the next step begin a new pass."""
        self.context = self.entered = None

    def check_thread(self) -> None:
        """Check that no other thread is in a pass.

        Raises:
            RuntimeError: if another thread is.
        """
        if self.entered is not None:
            self.entered.check_thread()

    def end(self) -> None:
        """End the call: finish a pass that has not reached its last step."""
        if self.context is not None and not self.context.done and self.context.final is not None:
            self._finish(self.context)

    def in_pass(self) -> bool:
        """Whether the current timesteps are being stepped through."""
        return self.entered is not None and self.entered.timesteps is self.scheduler.timesteps

    def coming(self, call: CallContext) -> tuple[StepContext | None, int, int]:
        """The pass in progress, None before its first step; and index and number of steps of the step to come."""
        context, planned = self.context, len(self.scheduler.timesteps)
        if context is not None and not context.done and context.timesteps is self.scheduler.timesteps:
            return context, context.step, context.total
        return None, *(self._once or (0, planned if call.steps is None else min(planned, call.steps)))

    def _wrap(self, original: Function) -> Function:
        signature = inspect.signature(getattr(type(self.scheduler), "step", None) or type(self.scheduler).step_pred)
        names = {ARGUMENT_NAMES.get(name, name): name for name in signature.parameters}

        def step(*args: Any, **kwargs: Any) -> Any:
            context = self.context
            if context is not None and (context.done or context.timesteps is not self.scheduler.timesteps):
                context = None  # this step begins a new pass
            known = context is not None and context.thread is threading.current_thread() and self._once is None
            if not known and self.foreign():  # the steps of one pass are of one pipeline
                return original(*args, **kwargs)
            bound = signature.bind(self.scheduler, *args, **kwargs)
            given = bound.arguments
            if self._once is not None and self.scheduler.timesteps is not self._timesteps:  # left over from an aborted run
                self.remove()
                return original(*args, **kwargs)
            output = "pred_original_sample" if given.get("pred_original_sample") is not None else "model_output"
            if self._repeated and output == "model_output":
                return original(*args, **kwargs)
            if self._once is not None:
                self.remove()

            def proceed(model_output: Any, sample: Any) -> Any:
                given[output], given[names["sample"]] = model_output, sample
                return original(*bound.args[1:], **bound.kwargs)

            return self._step(context, proceed, given[output], given[names["timestep"]], given[names["sample"]], given)

        return step

    def _step(
        self,
        context: StepContext | None,
        proceed: Function,
        model_output: Any,
        timestep: Any,
        sample: Any,
        arguments: dict[str, Any],
    ) -> Any:
        """One guided step, of the pass in progress or of a new one."""
        if context is None or shapes_of(sample) != context.shapes:
            context = self._begin(timestep, sample)
        elif context.thread is not threading.current_thread():
            context.check_thread()
        self.context = None  # until this step has succeeded: an aborted pass is not continued
        context.denoiser_call = None if self.denoiser_call is None else self.denoiser_call()
        began = context.time.now()
        with torch.no_grad():
            prediction = predict(self.scheduler, model_output, timestep, sample, arguments, self.parametrisation)
            output = self.handler.output(model_output, prediction, context)
            if output is not None:
                model_output = output
                prediction = predict(self.scheduler, model_output, timestep, sample, arguments, self.parametrisation)
            move = self.handler.step(prediction, context)
            if move is not None:
                output = prediction.moved(model_output, move)
                model_output = apply_move(model_output, output, move, self.handler, context, prediction.slope)
            moved = self.handler.before_step(sample, prediction, context)
            sample = sample if moved is None else moved
        context.time.spans.append((began, context.time.now()))
        result = proceed(model_output, sample)
        began = context.time.now()
        with torch.no_grad():
            latents = self.handler.after_step(result[0], prediction, context)
            if latents is not None:
                result = _with_sample(result, latents)
            context.step += 1
            context.final = result[0]
            if context.step >= context.total:
                self._finish(context)
        context.time.spans.append((began, context.time.now()))
        self.context = context
        return result

    def _begin(self, timestep: Any, sample: Any) -> StepContext:
        call, scheduler = self.call(), self.scheduler
        count, given, changed = call.count, call.prompts, self._resized(sample)
        if changed is not None:
            step, total, count, given = changed.step, changed.total, None, one_prompt(changed, len(sample))
        elif self._once is not None:
            step, total = self._once
        else:
            step, total = 0, len(scheduler.timesteps) - first_index(scheduler, timestep)
            if call.steps is not None:  # a base model may leave the last timesteps to a refiner
                total = min(total, call.steps)
        layout = Layout.of(sample, count)
        device = layout.device(sample)
        prompts = prompts_of_samples(given, layout.count(sample), device, call.class_labels, call.warn)
        mask = mask_of_samples(call.mask, layout, sample)
        context = StepContext(call, scheduler, scheduler.timesteps, layout, shapes_of(sample), total, prompts, mask, step)
        context.time = Stopwatch(device)
        self.entered = context
        with torch.no_grad():
            self.handler.begin(context, sample)
        return context

    def _resized(self, sample: Any) -> StepContext | None:
        """The pass in progress, if this step continues it with another number of samples; else None."""
        last = self.entered
        if last is None or last.done or not self.in_pass() or not last.layout.trivial or not isinstance(sample, Tensor):
            return None
        one = last.shapes[0] == 1 and len(sample) > 1  # frames are made from one sample
        return last if not one and len(sample) != last.shapes[0] and sample.shape[1:] == last.shapes[1:] else None

    def _finish(self, context: StepContext) -> None:
        context.done, self.entered = True, None
        with torch.no_grad():
            self.handler.finish(context)


def _with_sample(result: Any, latents: Tensor) -> Any:
    """A scheduler's result with its sample replaced."""
    if isinstance(result, tuple):
        return (latents, *result[1:])
    result.prev_sample = latents
    return result


def one_prompt(context: StepContext, n: int) -> Tensor | None:
    """Features ``[1, p]`` of the prompt that all samples of a pass have; None if prompts are unknown.

    Raises:
        ValueError: if the prompts differ.
    """
    prompts = context.prompts
    if prompts is not None and not bool((prompts == prompts[:1]).all()):
        raise ValueError(
            f"the batch changed from {len(prompts)} to {n} samples at step {context.step + 1} of {context.total}, and its "
            "prompts differ, so the prompts of the remaining samples are unknown; nothing was added to the memory. Keep "
            "the batch until the end of the call, or call the pipeline once per prompt"
        )
    return None if prompts is None else prompts[:1]


def shapes_of(sample: Any) -> Any:
    """Shape of a sample, or a list of the shapes of its parts."""
    return sample.shape if isinstance(sample, Tensor) else [s.shape for s in sample]


def first_index(scheduler: Any, timestep: Any) -> int:
    """Index of the timestep at which a scheduler begins: not 0 for image-to-image."""
    begin = getattr(scheduler, "begin_index", None)
    if begin is not None:
        return int(begin)
    times = on_host(scheduler.timesteps)  # which parametrisations read anyway
    at = torch.tensor(time_of(scheduler, timestep), dtype=torch.float64, device="cpu").to(times)
    found = (times == at).nonzero()
    return int(found[0]) if len(found) else 0
