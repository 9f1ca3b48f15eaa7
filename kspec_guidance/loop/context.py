"""Data of a pipeline call and of a pass through the scheduler's timesteps, and the interface of handlers."""

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.utils.messages import warn_user
from kspec_guidance.utils.timing import Stopwatch

if TYPE_CHECKING:
    from kspec_guidance.loop.blocks import Tokens, TransformerBlock

__all__ = ["CallContext", "ComingStep", "DenoiserCall", "StepContext", "StepHandler"]


@dataclass(frozen=True)
class DenoiserCall:
    """A call of the denoiser: the network, and its arguments by name (the caller's tensors, not copies).

    ``outputs`` is what this call and the further ones of the same step returned, in order.
    """

    module: nn.Module
    arguments: dict[str, Any]
    outputs: list[Any] = field(default_factory=list)


@dataclass(frozen=True)
class CallContext:
    """Data of one pipeline call, collected before its first scheduler step.

    Attributes:
        pipe: the pipeline; None for a bare scheduler.
        prompts: unit-norm features ``[rows, p]``, one row per prompt or sample, possibly with negative prompts.
        encoder: fingerprint or name of the source of the prompt features.
        class_labels: whether the features are class labels; negatives then come last.
        prompted: whether the pipeline takes prompts.
        count: number of images or clips.
        size: height and width in pixels.
        steps: number of scheduler steps that the pipeline plans.
        warned: warnings of this call so far.
        texts: of its prompts; None if they are unknown.
        mask: pixels to repaint ``[1 or n, 1, h, w]``, if it inpaints.
    """

    pipe: Any = None
    prompts: Tensor | None = None
    encoder: str | None = None
    class_labels: bool = False
    prompted: bool = False
    count: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None
    warned: set[str] = field(default_factory=set)
    texts: list[str] | None = None
    mask: Tensor | None = None

    @property
    def different_prompts(self) -> int | None:
        """Number of different prompts, at most; None for calls without prompts, and if prompts are empty or unknown."""
        if self.texts:
            return len(set(self.texts)) if any(text.strip() for text in self.texts) else None
        return None if self.prompts is None else len(self.prompts)

    def texts_of_samples(self, n: int) -> list[str] | None:
        """The text of the prompt of each of ``n`` samples; None if they are unknown."""
        texts = self.texts
        if not texts or n % len(texts):
            return None
        return [text for text in texts for _ in range(n // len(texts))]

    def warn(self, message: str) -> None:
        """Issue a warning once in this call."""
        if message not in self.warned:
            self.warned.add(message)
            warn_user(message)


@dataclass(eq=False)
class StepContext:
    """State of one pass through a scheduler's timesteps.

    Attributes:
        call: the pipeline call.
        scheduler: the scheduler.
        timesteps: timesteps of the scheduler.
        layout: layout of the samples.
        shapes: shape of the noisy sample, or a list of shapes if it consists of several tensors.
        total: number of steps.
        prompts: features ``[n, p]``, one row per sample; None if prompts are unknown.
        mask: 1 where packed samples ``[n, ...]`` may move, else 0; None if they may move everywhere.
        step: index of the current step.
        denoiser_call: first call of the denoiser at this step, if the handler needs it.
        time: time spent in the handler, without the denoiser and the scheduler.
        overflows: whether a move has overflowed the dtype of the samples, see :func:`keep_finite`.
        final: sample after the latest step.
        done: whether the last step was taken, or the call has ended.
        thread: thread that takes the steps.
    """

    call: CallContext
    scheduler: Any
    timesteps: Any
    layout: Layout
    shapes: Any
    total: int
    prompts: Tensor | None = None
    mask: Tensor | None = None
    step: int = 0
    denoiser_call: DenoiserCall | None = None
    time: Stopwatch = field(default_factory=Stopwatch)
    overflows: list[Tensor] = field(default_factory=list)
    final: Any = None
    done: bool = False
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def check_thread(self) -> None:
        """Check that the calling thread is the one that takes the steps.

        Raises:
            RuntimeError: in another thread, while the first one is alive.
        """
        if threading.current_thread() is not self.thread and self.thread.is_alive():
            raise RuntimeError(
                "one guide is used by two threads at once; give each thread its own pipeline and guide, and merge their "
                "memories afterwards with memory.merge(other)"
            )


@dataclass(frozen=True)
class ComingStep:
    """A step whose denoiser call is in progress, before the scheduler takes it.

    Attributes:
        call: the pipeline call.
        context: the pass through the timesteps; None before its first step.
        step: index of the step.
        total: number of steps.
        rows: the rows of the denoiser's batch that have the prompt, one for each sample.
        prompts: features ``[n, p]``, one row per sample; None if prompts are unknown.
    """

    call: CallContext
    context: StepContext | None
    step: int
    total: int
    rows: slice
    prompts: Tensor | None = None


class StepHandler(Protocol):
    """Interface of an object that changes the steps of a denoising loop.

    All methods run without gradients. Samples are in the loop's layout; ``context.layout`` packs them.
    """

    needs_denoiser_call: bool  # whether ``context.denoiser_call`` is needed, with its outputs

    def blocks(self, denoiser: nn.Module) -> "list[TransformerBlock]":
        """The blocks of a denoiser whose tokens :meth:`inside` changes."""

    def inside(
        self, block: "TransformerBlock", tokens: "Tokens", coming: ComingStep
    ) -> "tuple[Tensor, Tensor | None] | None":
        """Image and text tokens that replace those of a block in the denoiser's call of a step; None to keep them."""

    def begin(self, context: StepContext, sample: Any) -> None:
        """Begin a pass through the timesteps, at this noisy sample."""

    def output(self, model_output: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The model output that replaces that of the denoiser at this step; None to keep it."""

    def step(self, prediction: Prediction, context: StepContext) -> Any | None:
        """The move of the clean prediction x0 at this step, in its layout; None for no move."""

    def realised(self, move: Any, context: StepContext) -> None:
        """Take note of the move that x0 has received at this step, in its layout: rounding may have left less of it."""

    def before_step(self, sample: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The noisy sample that the step starts from, in place of this one; None to keep it."""

    def after_step(self, latents: Tensor, prediction: Prediction, context: StepContext) -> Tensor | None:
        """The latents that replace those after the step; None to keep them."""

    def finish(self, context: StepContext) -> None:
        """End a pass, after its last step or an early end of the call; ``context.final`` is the result."""
