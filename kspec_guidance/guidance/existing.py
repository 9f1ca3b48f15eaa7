"""Images that exist already, added to a memory as if a call of the pipeline had made them."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kspec_guidance.guidance.comparison import RepeatedCall
from kspec_guidance.guidance.run import Run, TermState
from kspec_guidance.loop.blocks import Tokens
from kspec_guidance.loop.context import ComingStep, StepContext
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.utils.precision import full_precision

if TYPE_CHECKING:
    from kspec_guidance.guidance.guide import KernelGuidance

__all__ = ["remember_latents"]


class _Existing(Run):
    """Leads a call to given samples, and keeps their features at each guided step; nothing repels.

    Every prediction of x0 is replaced by the given samples, so that a deterministic sampler passes through ``alpha x0 +
    sigma noise`` with one noise for all steps, and ends at x0.
    """

    def __init__(self, guide: "KernelGuidance", latents: Tensor):
        super().__init__(guide)
        self.latents = latents
        self.packed: Tensor  # in the form of the packed samples

    def begin(self, context: StepContext, sample: Any) -> None:
        packed = context.layout.pack(sample)
        if len(packed) != len(self.latents) or packed[0].numel() != self.latents[0].numel():
            raise ValueError(
                f"this call of {type(context.call.pipe).__name__} makes samples {list(packed.shape)}, and the images are "
                f"{list(self.latents.shape)} in its latent space; call it as for so many images of this size"
            )
        self.packed = self.latents.to(packed.device).view(packed.shape)
        super().begin(context, sample)

    def output(self, model_output: Any, prediction: Prediction, context: StepContext) -> None:
        """No change."""

    def step(self, prediction: Prediction, context: StepContext) -> Any:
        """The move of x0 to the given samples."""
        if self._inside:
            self._report_inside(prediction, context)
        x0 = context.layout.pack(prediction.x0)
        for state in self._states:
            space = state.term.space
            if space.step_by_step and not space.inside and context.step in state.steps:
                state.kept.append(space.features(self.packed.to(x0.dtype), context.call, context.denoiser_call)[0])
        return context.layout.unpack(self.packed.to(x0.dtype) - x0)

    def realised(self, move: Any, context: StepContext) -> None:
        """Moves are not reported."""

    def before_step(self, sample: Any, prediction: Prediction, context: StepContext) -> None:
        """No move."""

    def after_step(self, latents: Any, prediction: Prediction, context: StepContext) -> None:
        """No move."""

    def _moved_tokens(self, state: TermState, tokens: Tokens, coming: ComingStep) -> tuple[Tensor, Tensor | None]:
        space: Any = state.term.space
        rows = space.means(tokens, coming.rows)
        state.kept.append(rows)
        self._moves_inside.append((state, torch.zeros(len(rows), device=rows.device)))
        return tokens.image, tokens.text

    def finish(self, context: StepContext) -> None:
        context.final = context.layout.unpack(self.packed.to(context.layout.pack(context.final).dtype))
        super().finish(context)


def remember_latents(guide: "KernelGuidance", attachment: Any, repeated: RepeatedCall, latents: Tensor) -> None:
    """:meth:`KernelGuidance.remember_images` for a guide that is attached to the pipeline, and latents of its loop."""
    run = _Existing(guide, latents)
    run._blocks = attachment.handler._blocks
    with attachment.handled_by(run):
        repeated()
    if not run.finished:
        raise ValueError(f"this call of {type(repeated.pipe).__name__} took no steps, so its images are not remembered")
    if not guide.remember:
        with full_precision(latents.device):
            for memory, features, prompts in run.finished:
                memory.add(features, prompts)
