"""Attachment of a handler to a pipeline: for all calls, or step by step."""

from typing import Any

from torch import Tensor

from kspec_guidance.loop.components import find_scheduler
from kspec_guidance.loop.context import CallContext, StepHandler
from kspec_guidance.loop.observer import DenoiserWatch, PipelineObserver
from kspec_guidance.loop.prompts import masked_mean
from kspec_guidance.loop.scheduler_hook import SchedulerHook

__all__ = ["Attachment", "StepwiseAttachment"]


class Attachment:
    """A handler attached to all calls of a pipeline, until :meth:`remove`.

    Args:
        pipe: a pipeline, classic or modular, or a bare scheduler.
        handler: called at each step.
        tag: identifies the owner of the patches; a pipeline accepts patches of one tag at a time.
        scheduler: name of the scheduler component to hook, for pipelines with several schedulers.

    Raises:
        UnsupportedSchedulerError: if the pipeline has no supported scheduler.
        ValueError: if the pipeline is hooked under another tag.
    """

    def __init__(self, pipe: Any, handler: StepHandler, tag: Any, scheduler: str | None = None):
        self.pipe, self.handler, self.tag, self.observer = pipe, handler, tag, None
        found = find_scheduler(pipe, scheduler)
        self._hook = self._hooked(found)
        try:
            if found is not pipe:
                self.observer = PipelineObserver(pipe, self._on_call, self._hook_end, handler.needs_denoiser_call, tag)
        except BaseException:
            self.remove()
            raise

    def _hooked(self, scheduler: Any) -> SchedulerHook:
        denoiser_call = self._denoiser_call if self.handler.needs_denoiser_call else None
        hook = SchedulerHook(scheduler, self.handler, self._call, self.tag, self.pipe, denoiser_call)
        hook.install()
        return hook

    def _call(self) -> CallContext:
        return CallContext() if self.observer is None else self.observer.context()

    def _denoiser_call(self) -> Any:
        return None if self.observer is None else self.observer.denoiser_call()

    def _on_call(self) -> None:
        self._hook.check_thread()
        self._hook.forget()
        current = getattr(self.pipe, "scheduler", None)
        if current is not None and current is not self._hook.scheduler:  # the scheduler was replaced
            self._hook.remove()
            self._hook = self._hooked(current)

    def _hook_end(self) -> None:
        self._hook.end()

    def end(self) -> None:
        """Finish a pass in progress, unless the pipeline was interrupted."""
        if not getattr(self.pipe, "interrupt", False):
            self._hook.end()

    def remove(self) -> None:
        """Remove all hooks. Further calls have no effect."""
        self._hook.remove()
        if self.observer is not None:
            self.observer.remove()


class StepwiseAttachment:
    """A handler attached to single steps of a pipeline; call :meth:`before_step` before each step.

    A hook is removed at its step, so an aborted call leaves at most one hook, which does not affect other runs.

    Args:
        pipe: a pipeline with a ``scheduler``.
        handler, tag: see :class:`Attachment`.
    """

    def __init__(self, pipe: Any, handler: StepHandler, tag: Any):
        self.pipe, self.handler, self.tag = pipe, handler, tag
        self._context = CallContext(pipe)
        self._hook: SchedulerHook | None = None
        self._denoiser: DenoiserWatch | None = None

    def begin_call(self, tensors: dict[str, Any]) -> None:
        """Begin a new call of the pipeline.

        Args:
            tensors: ``prompt_embeds`` and ``latents``, if available.
        """
        if self._hook is not None:
            self._hook.check_thread()
        self.remove()
        self._hook = None
        prompts = prompts_given(self.pipe, tensors)
        encoder = None if prompts is None else f"{type(getattr(self.pipe, 'text_encoder', None)).__name__} by callback"
        self._context = CallContext(self.pipe, prompts, encoder)

    def before_step(self, step: int, total: int) -> None:
        """Hook the next scheduler step only."""
        scheduler = find_scheduler(self.pipe)
        if self._hook is None or self._hook.scheduler is not scheduler:
            self.remove()
            self._hook = SchedulerHook(
                scheduler, self.handler, lambda: self._context, self.tag, self.pipe, self._denoiser_call
            )
        self._hook.install(once=(step, total))
        if self.handler.needs_denoiser_call and self._denoiser is None:
            self._denoiser = DenoiserWatch(self.pipe)

    def _denoiser_call(self) -> Any:
        if self._denoiser is None:
            return None
        found = self._denoiser.take()
        self._denoiser.remove()
        self._denoiser = None
        return found

    def remove(self) -> None:
        """Remove the hook, if any."""
        if self._hook is not None:
            self._hook.remove()
        if self._denoiser is not None:
            self._denoiser.remove()
            self._denoiser = None


def prompts_given(pipe: Any, tensors: dict[str, Any]) -> Tensor | None:
    """Unit-norm prompt features ``[rows, p]`` of ``prompt_embeds``; None if there are none."""
    embeds, latents = tensors.get("prompt_embeds"), tensors.get("latents")
    if not isinstance(embeds, Tensor) or embeds.ndim < 2:
        return None
    n = len(latents) if isinstance(latents, Tensor) else len(embeds)
    if len(embeds) % (2 * n) == 0 and getattr(pipe, "do_classifier_free_guidance", False):
        embeds = embeds[len(embeds) // 2 :]  # with classifier-free guidance the negative prompts come first
    return masked_mean(embeds, None)
