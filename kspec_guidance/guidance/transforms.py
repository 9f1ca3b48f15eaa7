"""From a gradient to a move: a chain of small named transforms, each ``(move, state) -> move``.

Directions and moves are rows ``[n, d]``; every transform treats each sample by itself, but for the shared maximum of
:func:`bound`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["TRANSFORMS", "Transform", "TransformState", "bound", "fade", "off_score", "rescale", "tangent"]


@dataclass(frozen=True)
class TransformState:
    """What a transform may use.

    Attributes:
        target: what is moved, x0 or the noisy sample ``[n, d]``.
        score: a direction parallel to the score ``[n, d]``; None if no transform of the chain needs it.
        fraction: place in the run, 0 at its start.
        window: the guided interval, as fractions of the run.
        scale: of the move, relative to the norm of the target.
        effective_count: how many samples of its own prompt each one is compared with ``[n]``; None where that has no
            meaning.
    """

    target: Tensor
    score: Tensor | None
    fraction: float
    window: tuple[float, float]
    scale: float
    effective_count: Tensor | None = None


Transform = Callable[[Tensor, TransformState], Tensor]


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each row ``[n, 1]``."""
    return torch.linalg.vector_norm(x, dim=1, keepdim=True)


def row_dots(x: Tensor, y: Tensor) -> Tensor:
    """Inner products of the rows of ``x`` and ``y`` ``[n, d]``, as ``[n, 1]``."""
    return (x * y).sum(1, keepdim=True)


def without(x: Tensor, direction: Tensor) -> Tensor:
    """Rows ``[n, d]`` less their components along the rows of ``direction``."""
    square = norms(direction).square().clamp_min(torch.finfo(x.dtype).tiny)
    return torch.addcmul(x, direction, row_dots(x, direction) / square, value=-1)


def tangent(move: Tensor, state: TransformState) -> Tensor:
    """Keep the norm of the target to first order: no component along it, so images are not washed out or burnt."""
    return without(move, state.target)


def off_score(move: Tensor, state: TransformState) -> Tensor:
    """No component along the score, i.e. along the noise ``x - alpha x0``: the likelihood is kept to first order.

    The same projection as in OSCAR (arXiv 2510.09060) and in the marginal-preserving drift of EDDY (arXiv 2605.06553).
    """
    assert state.score is not None
    return without(move, state.score)


def rescale(move: Tensor, state: TransformState) -> Tensor:
    """Every sample moves by ``scale`` times the norm of its target, however small its gradient: the published step."""
    size = norms(move)
    unit = torch.where(size > 0, move / size.clamp_min(torch.finfo(move.dtype).tiny), 0)
    return state.scale * norms(state.target) * unit


def bound(move: Tensor, state: TransformState) -> Tensor:
    """The sample with the largest gradient moves by ``scale`` times its norm, the others in proportion to theirs.

    A sample that is already away from all others hardly moves; rescaling each one would move it as far as the rest. Where
    samples are compared only with samples of hardly related prompts, which together weigh less than one of the same prompt,
    moves are smaller by as much: different subjects do not repel.
    """
    largest = norms(move).amax()
    factor = torch.where(largest > 0, state.scale / largest, 0)
    if state.effective_count is not None:
        factor = factor * state.effective_count.amax().clamp(max=1)
    return factor * norms(state.target) * move


def fade(move: Tensor, state: TransformState) -> Tensor:
    """From full strength at the start of the guided interval to none at its end: ``cos^2(pi/2 * place)``."""
    start, stop = state.window
    place = min(max((state.fraction - start) / max(stop - start, 1e-9), 0.0), 1.0)
    return move * math.cos(place * math.pi / 2) ** 2


TRANSFORMS: dict[str, Transform] = {
    "tangent": tangent,
    "off_score": off_score,
    "rescale": rescale,
    "bound": bound,
    "fade": fade,
}
