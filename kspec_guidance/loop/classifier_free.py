"""Classifier-free guidance of one step, found from the denoiser's outputs: what it adds, and how much of it.

Pipelines combine predictions with and without the prompt as ``uncond + weight (cond - uncond)``, from one call with a
doubled batch or from two calls, and keep the weight in a local variable as often as in an attribute. So nothing of theirs
is set: the two predictions are observed, and the weight is computed from what the scheduler is given.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.loop.context import StepContext
from kspec_guidance.loop.prediction import Prediction

__all__ = ["ClassifierFree", "UnknownGuidanceError", "classifier_free"]

# Largest error of the combination, relative to the model output: rounding is below a tenth of it
FIT, FIT_HALF = 1e-3, 3e-2


class UnknownGuidanceError(ValueError):
    """The predictions that classifier-free guidance combines cannot be told from what the denoiser returned."""


@dataclass(frozen=True)
class ClassifierFree:
    """Classifier-free guidance of one step: the model output is ``cond + (weight - 1) direction``.

    Attributes:
        cond: the model output with the prompt alone ``[n, c, ...]``, in float32.
        direction: that less the model output without the prompt.
        weight: of classifier-free guidance, a tensor of one element; 1 if both predictions are equal.
        normed: whether the combination is scaled to the norm of ``cond`` along its last dimension, as Qwen-Image and Lumina
            2 do; a tensor of one element.
        fits: whether the model output is this combination, a tensor of one element.
    """

    cond: Tensor
    direction: Tensor
    weight: Tensor
    normed: Tensor
    fits: Tensor

    def at_weight(self, model_output: Tensor, weight: Tensor) -> Tensor:
        """The model output with another weight; further channels (a learned variance) are unchanged."""
        channels = self.direction.shape[1]
        own = model_output[:, :channels]
        changed = self.cond + (weight - 1) * self.direction
        scaled = changed * (_norms(self.cond) / _norms(changed))
        changed = torch.where(self.normed, scaled, own.float() + (weight - self.weight) * self.direction)
        changed = changed.to(model_output.dtype)
        return changed if channels == model_output.shape[1] else torch.cat([changed, model_output[:, channels:]], 1)


def classifier_free(model_output: Any, prediction: Prediction, context: StepContext) -> ClassifierFree | None:
    """Classifier-free guidance of the current step; None if the denoiser made one prediction for each sample.

    Args:
        model_output: as passed to ``scheduler.step``.
        prediction: the prediction of this step.
        context: with the denoiser's calls of this step.

    Raises:
        UnknownGuidanceError: if the denoiser was not seen, made other than one or two predictions for each sample, or
            returns them in another form than the scheduler takes.
    """
    call = context.denoiser_call
    if call is None or not call.outputs:
        raise UnknownGuidanceError("the calls of its denoiser cannot be seen here; use `with guide.attach(pipe)`")
    several = isinstance(model_output, list | tuple)
    like, shape = (model_output[0], prediction.sample[0].shape) if several else (model_output, prediction.sample.shape)
    rows = len(like) // context.layout.copies
    outputs = [_rows(output, shape[1:]) for output in call.outputs]
    total = sum(len(output) for output in outputs)
    if total == rows or not _has_cfg(context.call.pipe):
        return None
    if total != 2 * rows:
        raise UnknownGuidanceError(
            f"its denoiser made {total} predictions in {len(outputs)} calls for {rows} samples, and two for each are needed"
        )
    if several or any(output.shape[1:] != shape[1:] for output in outputs):
        raise UnknownGuidanceError("its denoiser returns predictions in another form than its scheduler takes")
    first, second = torch.cat(outputs).float().chunk(2)
    half = min(x.dtype.itemsize for x in (like, *outputs)) <= 2
    found = _fitted(like[:rows, : shape[1]].float(), first, second, FIT_HALF if half else FIT)
    copies = context.layout.copies
    if copies == 1:
        return found
    return replace(found, cond=torch.cat([found.cond] * copies), direction=torch.cat([found.direction] * copies))


def _has_cfg(pipe: Any) -> bool:
    """False for pipelines whose second prediction is only a perturbed one, of the same prompt."""
    enabled = getattr(getattr(pipe, "guider", None), "_is_cfg_enabled", None)
    if callable(enabled):
        return bool(enabled())
    perturbed = getattr(pipe, "do_perturbed_attention_guidance", False)
    return not perturbed or bool(getattr(pipe, "do_classifier_free_guidance", True))


def _rows(output: Any, shape: torch.Size) -> Tensor:
    """What a denoiser returned, as one tensor ``[rows, ...]``; of the given shape, as far as that can be brought about."""
    while not isinstance(output, Tensor):
        if isinstance(output, list | tuple) and len(output) > 1 and all(isinstance(o, Tensor) for o in output):
            if len({o.shape for o in output}) == 1 and output[0].shape.numel() == shape.numel():
                output = torch.stack(tuple(output))  # a tensor for each sample
                break
        elif isinstance(output, list) and len(output) == 1 and output[0].shape.numel() == shape.numel():
            output = output[0][None]
            break
        try:
            output = output[0]
        except (TypeError, KeyError, IndexError) as error:
            raise UnknownGuidanceError(f"its denoiser returns a {type(output).__name__}") from error
    if output.shape[1:].numel() == shape.numel():
        return output.reshape(len(output), *shape)
    if output.ndim == len(shape) + 1 and output.shape[2:] == shape[1:] and output.shape[1] > shape[0]:
        return output[:, : shape[0]]  # without the learned variance, or the tokens of a condition image
    return output


def _norms(x: Tensor) -> Tensor:
    """Norms along the last dimension, which is kept."""
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)


def _fitted(guided: Tensor, first: Tensor, second: Tensor, tolerance: float) -> ClassifierFree:
    """The combination of two predictions that is nearest to the guided one, up to its sign; nothing is read by the host."""
    difference, most = second - first, tolerance * guided.norm()

    def share_of(target: Tensor, along: Tensor) -> tuple[Tensor, Tensor]:
        """The factor of ``along`` that is nearest to the target, 1 if it is all 0; and the error."""
        square = along.square().sum()
        found = (target * along).sum() / square.clamp_min(torch.finfo(square.dtype).tiny)
        share = torch.where(square > 0, found, 1.0)
        return share, (target - share * along).norm()

    plus, plus_error = share_of(guided - first, difference)
    minus, minus_error = share_of(-guided - first, difference)  # some pipelines change the sign of the output
    linear = torch.minimum(plus_error, minus_error) <= most
    unit = guided / _norms(guided)

    def across(x: Tensor) -> Tensor:
        return x - (x * unit).sum(-1, keepdim=True) * unit

    share, error = share_of(-across(first), across(difference))  # of the combination's direction, whatever its norm
    share = torch.where(linear, torch.where(plus_error <= minus_error, plus, minus), share)
    last_is_cond = share >= 0.5  # guidance extrapolates: its weight is above 1
    cond, direction = torch.where(last_is_cond, second, first), torch.where(last_is_cond, difference, -difference)
    normed = ~linear & (error <= most) & ((_norms(guided) - _norms(cond)).norm() <= most)
    sign = torch.where((guided * (first + share * difference)).sum() >= 0, 1.0, -1.0)
    weight = torch.where(last_is_cond, share, 1 - share)
    return ClassifierFree(sign * cond, sign * direction, weight, normed, linear | normed)
