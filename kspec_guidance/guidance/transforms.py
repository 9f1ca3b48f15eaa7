"""Transforms from a gradient to a move: named functions ``(move, state) -> move``, applied in order.

Directions and moves are rows ``[n, d]``. Projections change their directions. Scalings change their norms, and are written
as functions ``(norms, state) -> factors``, see :class:`Scaling`. Transforms treat samples independently, except for the
shared maximum of :func:`bound`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "TRANSFORMS",
    "Scaling",
    "Transform",
    "TransformState",
    "bound",
    "fade",
    "fading",
    "keep_prompt",
    "off_score",
    "plain",
    "rescale",
    "rescale_damped",
    "rescale_from",
    "tangent",
    "transformed",
]

LEAST_NORM = 1e-8  # gradient norm up to which SPARKE's code does not rescale
DAMPING = 1e-5  # added to the gradient norm by the code of MMD guidance


@dataclass(frozen=True)
class TransformState:
    """The input of a transform besides the move.

    Attributes:
        target: the sample that is moved: x0 or the noisy sample ``[n, d]``.
        score: a direction parallel to the score ``[n, d]``; None if no transform needs it.
        fraction: position in the run, in [0, 1).
        window: the guided interval, as fractions of the run.
        scale: size of the move, relative to the norm of the target; a number, or a tensor of one element or ``[n, 1]``.
        effective_count: effective number of samples of its own prompt that each sample is compared with ``[n]``; None if
            undefined.
        sizes: norms of the target ``[n, 1]``; computed if not given.
        prompt: what classifier-free guidance adds to the clean prediction, that with the prompt less that without
            ``[n, d]``; None if there is none, or if no transform needs it.
    """

    target: Tensor
    score: Tensor | None
    fraction: float
    window: tuple[float, float]
    scale: float | Tensor
    effective_count: Tensor | None = None
    sizes: Tensor = None  # type: ignore[assignment]
    prompt: Tensor | None = None

    def __post_init__(self) -> None:
        if self.sizes is None:
            object.__setattr__(self, "sizes", norms(self.target))


Transform = Callable[[Tensor, TransformState], Tensor]


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row ``[n, 1]``."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


class Scaling:
    """A transform that multiplies rows by ``factors``, a number or ``[n, 1]``: a function of their norms ``[n, 1]``.

    Several in turn are applied as one product with the rows, see :func:`transformed`.
    """

    def __init__(self, factors: Callable[[Tensor, TransformState], float | Tensor]):
        functools.update_wrapper(self, factors)
        self.factors = factors

    def __call__(self, move: Tensor, state: TransformState) -> Tensor:
        return move * self.factors(norms(move), state)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of ``x`` and ``y`` ``[n, d]``, as ``[n, 1]``."""
    return (x * y).sum(1, keepdim=True)


def without(x: Tensor, direction: Tensor, sizes: Tensor | None = None) -> Tensor:
    """Rows ``[n, d]`` less their components along the rows of ``direction``, whose norms ``[n, 1]`` may be given.

    Not differentiable, as all of a step: the result is written into memory of its own products.
    """
    return _less_part(x, direction, norms(direction) if sizes is None else sizes)


def without_unit(x: Tensor, direction: Tensor) -> Tensor:
    """As :func:`without` for directions of norm 1 or 0."""
    return _less_part(x, direction)


def _less_part(x: Tensor, direction: Tensor, sizes: Tensor | None = None) -> Tensor:
    products = x * direction  # its memory is used again: new pages cost more than the sum
    part = products.sum(1, keepdim=True)
    if sizes is not None:
        part = part / sizes.square().clamp_min(torch.finfo(x.dtype).tiny)
    return torch.addcmul(x, direction, part, value=-1, out=products)


def tangent(move: Tensor, state: TransformState) -> Tensor:
    """Remove the component along the target, which keeps its norm to first order: contrast does not change."""
    return without(move, state.target, state.sizes)


def off_score(move: Tensor, state: TransformState) -> Tensor:
    """Remove the component along the score, i.e. along the noise ``x - alpha x0``: keeps the likelihood to first order.

    The same projection as in OSCAR (arXiv 2510.09060) and in the marginal-preserving drift of EDDY (arXiv 2605.06553).
    """
    assert state.score is not None
    return without(move, state.score)


def keep_prompt(move: Tensor, state: TransformState) -> Tensor:
    """Remove the part of a move against the prompt: along the prediction without the prompt less that with it.

    One-sided: what goes toward the prompt stays. Without classifier-free guidance nothing is removed.
    """
    if state.prompt is None:
        return move
    square = state.prompt.square().sum(1, keepdim=True).clamp_min(torch.finfo(move.dtype).tiny)
    return torch.addcmul(move, state.prompt, (row_dots(move, state.prompt) / square).clamp_max(0), value=-1)


@Scaling
def rescale(size: Tensor, state: TransformState) -> Tensor:
    """Scale every move to ``scale`` times the norm of its target, however small the gradient."""
    return torch.where(size > 0, state.scale * state.sizes / size.clamp_min(torch.finfo(size.dtype).tiny), 0)


@Scaling
def rescale_from(size: Tensor, state: TransformState) -> Tensor:
    """As :func:`rescale` for gradients of norm above 1e-8, else ``scale`` times the gradient: the step of SPARKE's code."""
    return torch.where(size > LEAST_NORM, rescale.factors(size, state), state.scale)


@Scaling
def rescale_damped(size: Tensor, state: TransformState) -> Tensor:
    """As :func:`rescale`, with 1e-5 added to the norm of the gradient: the step of the code of MMD guidance."""
    return state.scale * state.sizes / (size + DAMPING)


@Scaling
def plain(size: Tensor, state: TransformState) -> float | Tensor:
    """``scale`` times the gradient, whatever its size: the step that papers write."""
    return state.scale


@Scaling
def bound(size: Tensor, state: TransformState) -> Tensor:
    """Move the sample with the largest gradient by ``scale`` times its norm, the others in proportion to their gradients.

    A sample far from all others hardly moves; :func:`rescale` would move it as far as the rest. If samples are compared
    only with samples of unrelated prompts (effective count below 1), moves shrink in proportion, so different subjects
    do not repel.
    """
    largest = size.amax()
    factor = state.scale / (largest + (largest == 0))  # moves of zeros stay zeros
    if state.effective_count is not None:
        factor = factor * state.effective_count.amax().clamp(max=1)
    return factor * state.sizes


def fading(fraction: float, window: tuple[float, float]) -> float:
    """``cos^2(pi/2 * position)``: from 1 at the start of the guided interval to 0 at its end."""
    start, stop = window
    position = min(max((fraction - start) / max(stop - start, 1e-9), 0.0), 1.0)
    return math.cos(position * math.pi / 2) ** 2


@Scaling
def fade(size: Tensor, state: TransformState) -> float:
    """Decrease the move from 1 at the start of the guided interval to 0 at its end, see :func:`fading`."""
    return fading(state.fraction, state.window)


TRANSFORMS: dict[str, Transform] = {
    "tangent": tangent,
    "off_score": off_score,
    "keep_prompt": keep_prompt,
    "rescale": rescale,
    "rescale_from": rescale_from,
    "rescale_damped": rescale_damped,
    "plain": plain,
    "bound": bound,
    "fade": fade,
}


def transformed(move: Tensor, names: Sequence[str], state: TransformState) -> tuple[Tensor, Tensor]:
    """A gradient ``[n, d]`` after the named transforms, and its norms ``[n, 1]``."""
    size, factor = None, None
    for transform in map(TRANSFORMS.__getitem__, names):
        if isinstance(transform, Scaling):
            size = norms(move) if size is None else size
            change = transform.factors(size, state)
            size, factor = size * change, change if factor is None else factor * change
        else:
            move, size, factor = transform(move if factor is None else move * factor, state), None, None
    move = move if factor is None else move * factor
    return move, norms(move) if size is None else size
