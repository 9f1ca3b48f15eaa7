"""Attachment of a handler to a pipeline: for all calls, or step by step."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from kspec_guidance.loop.blocks import BlockHooks
from kspec_guidance.loop.callers import in_progress, owns, running_pipelines
from kspec_guidance.loop.components import find_scheduler
from kspec_guidance.loop.context import CallContext, StepHandler
from kspec_guidance.loop.observer import DenoiserWatch, PipelineObserver
from kspec_guidance.loop.prompts import condition_states, masked_mean
from kspec_guidance.loop.scheduler_hook import SchedulerHook
from kspec_guidance.utils.messages import warn_user

__all__ = ["Attachment", "StepwiseAttachment"]


class Attachment:
    """A handler attached to all calls of a pipeline, until :meth:`remove`.

    Other pipelines that share the scheduler are left alone, with a warning.

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
        self._depth = 0  # number of calls of the pipeline on the stack when the current one began
        self._warned = False
        self.blocks = 0  # number of ``with`` blocks in progress
        found = find_scheduler(pipe, scheduler)
        self._bare = found is pipe
        self._blocks: BlockHooks | None = None
        self._hook = self._hooked(found)
        try:
            if not self._bare:
                self.observer = PipelineObserver(
                    pipe, self._on_call, self.end, handler.needs_denoiser_call, tag, timesteps=self._timesteps
                )
                watch = self.observer.denoiser
                if watch is not None and handler.needs_denoiser_call:
                    self._blocks = BlockHooks(pipe, lambda: self.handler, watch, lambda: self._hook, self._call)
        except BaseException:
            self.remove()
            raise

    def _hooked(self, scheduler: Any) -> SchedulerHook:
        denoiser_call = self._denoiser_call if self.handler.needs_denoiser_call else None
        hook = SchedulerHook(scheduler, self.handler, self._call, self.tag, self.pipe, denoiser_call, self._foreign)
        hook.install()
        return hook

    def serves(self, pipe: Any) -> bool:
        """Whether the calls of a pipeline are guided: those of the attached one, and of its inner pipelines."""
        return owns(self.pipe, pipe)

    def _foreign(self) -> bool:
        caller = None if self._bare else next(running_pipelines(), None)
        if caller is None or self.serves(caller):
            return False
        if not self._warned:
            self._warned = True
            warn_user(
                f"this {type(caller).__name__} shares its scheduler with the guided {type(self.pipe).__name__}; its own "
                "calls are not guided and their images are not remembered. To guide it as well, attach another guide while "
                "the first is detached, or give it a scheduler of its own: scheduler.from_config(scheduler.config)"
            )
        return True

    def _call(self) -> CallContext:
        return CallContext() if self.observer is None else self.observer.context()

    def _denoiser_call(self) -> Any:
        return None if self.observer is None else self.observer.denoiser_call()

    def _timesteps(self) -> Any:
        return getattr(self._hook.scheduler, "timesteps", None)

    def _on_call(self) -> None:
        self._hook.check_thread()
        depth = sum(p is self.pipe for p in running_pipelines())
        if self._hook.in_pass() and depth > self._depth > 0:
            raise RuntimeError(
                f"this {type(self.pipe).__name__} is called inside its own guided call; use a second pipeline with a "
                "scheduler of its own for the inner call, for example type(pipe)(**pipe.components | "
                "{'scheduler': pipe.scheduler.from_config(pipe.scheduler.config)})"
            )
        self._depth = depth
        self._hook.forget()
        current = getattr(self.pipe, "scheduler", None)
        if current is not None and current is not self._hook.scheduler:  # the scheduler was replaced
            self._hook.remove()
            self._hook = self._hooked(current)

    @contextmanager
    def handled_by(self, handler: StepHandler) -> Iterator[None]:
        """Let a handler take the steps of the call in this block, which is forgotten if it fails."""
        own, hook = self.handler, self._hook
        passes = hook.context, hook.entered
        try:
            self.handler = hook.handler = handler
            yield
            self.end()
        finally:
            hook.context, hook.entered = passes
            self.handler = self._hook.handler = own

    def end(self) -> None:
        """Finish a pass in progress, unless the pipeline was interrupted."""
        if not getattr(self.pipe, "interrupt", False):
            self._hook.end()

    def end_block(self) -> None:
        """Finish the pass of a call that has returned; one in progress goes on, or is abandoned if hooks are removed."""
        if not 0 < self._depth <= sum(p is self.pipe for p in running_pipelines()):
            self.end()

    def remove(self) -> None:
        """Remove all hooks, and abandon a pass in progress. Further calls have no effect."""
        self._hook.remove()
        self._hook.forget()
        if self._blocks is not None:
            self._blocks.remove()
        if self.observer is not None:
            self.observer.remove()


class StepwiseAttachment:
    """A handler attached to single steps of a pipeline; call :meth:`before_step` before each step.

    A hook is removed at its step. What an aborted call leaves behind has no effect on other calls, and gives way to the
    patches of other guides.

    Args:
        pipe: a pipeline with a ``scheduler``.
        handler, tag: see :class:`Attachment`.
    """

    def __init__(self, pipe: Any, handler: StepHandler, tag: Any):
        self.pipe, self.handler, self.tag = pipe, handler, tag
        self._context = CallContext(pipe)
        self._hook: SchedulerHook | None = None
        self._denoiser: DenoiserWatch | None = None
        self._blocks: BlockHooks | None = None
        self._observer: PipelineObserver | None = None
        self._began = False  # whether the observed call has taken a step
        self._thread = threading.current_thread()

    def in_progress(self) -> bool:
        """Whether the observed call is in progress."""
        return in_progress(self.pipe, self._thread)

    def observe(self) -> None:
        """Observe the call of the pipeline that begins now; the patches give way to those of other guides."""
        self.remove()
        self._began, self._thread = False, threading.current_thread()
        self._observer = self._observe()

    def _observe(self) -> PipelineObserver:
        return PipelineObserver(self.pipe, self._on_call, self.remove, False, self.tag, lambda: True)

    def _on_call(self) -> None:
        if self._began:  # a later call
            self.remove()

    def in_pass(self) -> bool:
        """Whether the steps of the scheduler's present timesteps have begun."""
        return self._hook is not None and self._hook.in_pass()

    def begin_call(self, given: dict[str, Any] | CallContext | None = None) -> None:
        """Begin the steps of a call.

        Args:
            given: prompt embeddings and ``latents`` by name, of a call without an observable prompt encoder, or all that is
                known.
        """
        if self._hook is not None:
            self._hook.check_thread()
        observer, self._observer = self._observer, None
        self.remove()
        self._hook, self._thread = None, threading.current_thread()
        if isinstance(given, CallContext):
            self._context = given
            return
        if given is not None:
            prompts = prompts_given(self.pipe, given)
            text_encoder = getattr(self.pipe, "text_encoder", None)
            encoder = "given" if text_encoder is None else f"{type(text_encoder).__name__} by block"
            self._context = CallContext(self.pipe, prompts, None if prompts is None else encoder, prompted=True)
            return
        if observer is None or self._began:  # the call was not announced: only its end is observed
            if observer is not None:
                observer.remove()
            observer = self._observe()
        observer.close()
        self._observer, self._began = observer, True
        self._context = observer.context()

    def before_step(self, step: int, total: int) -> None:
        """Hook the next scheduler step only."""
        scheduler = find_scheduler(self.pipe)
        if self._hook is None or self._hook.scheduler is not scheduler:
            self._remove_hooks()
            self._hook = SchedulerHook(
                scheduler, self.handler, lambda: self._context, self.tag, self.pipe, self._denoiser_call, self._foreign
            )
        hook = self._hook
        hook.install(once=(step, total))
        if self.handler.needs_denoiser_call and self._denoiser is None:
            watch = self._denoiser = DenoiserWatch(self.pipe)
            self._blocks = BlockHooks(self.pipe, lambda: self.handler, watch, lambda: hook, lambda: self._context)

    def _foreign(self) -> bool:
        caller = next(running_pipelines(), None)
        return caller is not None and not owns(self.pipe, caller)

    def _denoiser_call(self) -> Any:
        if self._denoiser is None:
            return None
        found = self._denoiser.take()
        self._remove_watch()
        return found

    def _remove_hooks(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._remove_watch()

    def _remove_watch(self) -> None:
        if self._blocks is not None:
            self._blocks.remove()
        if self._denoiser is not None:
            self._denoiser.remove()
        self._blocks = self._denoiser = None

    def remove(self) -> None:
        """Remove all hooks."""
        self._remove_hooks()
        if self._observer is not None:
            self._observer.remove()
            self._observer = None


def prompts_given(pipe: Any, tensors: dict[str, Any]) -> Tensor | None:
    """Unit-norm prompt features ``[rows, p]`` of the prompt embeddings; None if there are none."""
    embeds, latents = condition_states(tensors), tensors.get("latents")
    if embeds is None:
        return None
    n = len(latents) if isinstance(latents, Tensor) else len(embeds)
    if len(embeds) == 2 * n and getattr(pipe, "do_classifier_free_guidance", False):
        embeds = embeds[n:]  # with classifier-free guidance the negative prompts come first
    return masked_mean(embeds, None)
