"""What is known of one pipeline call, and of one pass through a scheduler's timesteps in it."""

import threading
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor, nn

from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction

__all__ = ["CallContext", "DenoiserCall", "StepContext", "StepHandler"]


@dataclass(frozen=True)
class DenoiserCall:
    """A call of the denoiser: the network, and its arguments by name, which are the caller's own tensors."""

    module: nn.Module
    arguments: dict[str, Any]


@dataclass(frozen=True)
class CallContext:
    """What is known of one pipeline call when its first scheduler step begins.

    Attributes:
        pipe: None where a bare scheduler is guided.
        prompts: unit-norm features ``[rows, p]``, one row for each prompt or sample, negatives possibly among them.
        encoder: fingerprint of what made the prompt features.
        class_labels: whether the features are class labels, of which the negatives come last.
        count: images or clips that the pipeline makes noise for.
        size: their height and width in pixels.
        steps: scheduler steps that the pipeline plans.
    """

    pipe: Any = None
    prompts: Tensor | None = None
    encoder: str | None = None
    class_labels: bool = False
    count: int | None = None
    size: tuple[int, int] | None = None
    steps: int | None = None


@dataclass(eq=False)
class StepContext:
    """One pass through a scheduler's timesteps, and where it stands.

    Attributes:
        call: the pipeline call that it belongs to.
        scheduler: whose steps are taken.
        timesteps: the list that it goes through.
        layout: of the samples.
        shapes: of the noisy sample, or of the parts of a sample of several tensors.
        total: number of steps.
        prompts: features ``[n, p]``, one row for each sample; None where prompts are unknown.
        step: index of the step at hand.
        denoiser_call: the first call of the denoiser at this step, where a handler asked for it.
        seconds: that handling the steps took, the denoiser and the scheduler not counted.
        final: the sample after the latest step.
        done: whether the last step was taken, or the call has ended.
        thread: that takes the steps.
    """

    call: CallContext
    scheduler: Any
    timesteps: Any
    layout: Layout
    shapes: Any
    total: int
    prompts: Tensor | None = None
    step: int = 0
    denoiser_call: DenoiserCall | None = None
    seconds: float = 0.0
    final: Any = None
    done: bool = False
    thread: threading.Thread = field(default_factory=threading.current_thread)

    def check_thread(self) -> None:
        """
        Raises:
            RuntimeError: from another thread than the one that takes the steps, while that one is alive.
        """
        if threading.current_thread() is not self.thread and self.thread.is_alive():
            raise RuntimeError(
                "one guide is being used by two threads at once; give each thread its own pipeline and its own guide, and "
                "join their memories afterwards with memory.merge(other)"
            )


class StepHandler(Protocol):
    """What a denoising loop offers to guidance: all that a handler is told, and all that it can change.

    Every method is called without gradients. Samples are in the loop's own layout; ``context.layout`` packs them.
    """

    needs_denoiser_call: bool

    def begin(self, context: StepContext, sample: Any) -> None:
        """A new pass through the timesteps begins, at this noisy sample."""

    def step(self, prediction: Prediction, context: StepContext) -> Any | None:
        """The move of the clean prediction x0 at this step, in its layout; None for no move."""

    def after_step(self, latents: Tensor, prediction: Prediction, context: StepContext) -> Tensor | None:
        """The latents with which to go on, given those after the step; None to leave them."""

    def finish(self, context: StepContext) -> None:
        """The last step was taken, or the call has ended before it; ``context.final`` is what was made."""
