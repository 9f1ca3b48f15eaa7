"""From a gradient to a move: a chain of small named parts, each ``(move, state) -> move``, each switchable.

Directions and moves are ``[n, ...]`` in the shape of the samples; every part treats each sample on its own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["PARTS", "MoveState", "Part", "bound", "fade", "off_score", "rescale", "tangent"]


@dataclass(frozen=True)
class MoveState:
    """What a part may look at.

    ``target`` is what is moved (x0 or the noisy sample), ``score`` a direction parallel to the score,
    ``fraction`` the place in the run (0 at its start), ``window`` the guided interval, ``scale`` the strength,
    ``mass`` how many samples of its own prompt each one is held against ``[n]``, where that is known.
    """

    target: Tensor
    score: Tensor
    fraction: float
    window: tuple[float, float]
    scale: float
    mass: Tensor | None = None


Part = Callable[[Tensor, MoveState], Tensor]


def norms(x: Tensor) -> Tensor:
    """Euclidean norm of each sample, ``[n, 1, 1, ...]``."""
    return x.flatten(1).norm(dim=1).view(-1, *[1] * (x.ndim - 1))


def without(x: Tensor, direction: Tensor) -> Tensor:
    """``x`` ``[n, ...]`` less its component along ``direction``, sample by sample."""
    u = direction / norms(direction).clamp_min(torch.finfo(x.dtype).tiny)
    dot = (x * u).flatten(1).sum(1).view(-1, *[1] * (x.ndim - 1))
    return x - dot * u


def tangent(move: Tensor, state: MoveState) -> Tensor:
    """Keep the norm of the target to first order: no component along it, so images are not washed out or burnt."""
    return without(move, state.target)


def off_score(move: Tensor, state: MoveState) -> Tensor:
    """No component along the score, i.e. along the noise ``x - alpha x0`` in the sample: likelihood stays, to first order.

    The same projection as in OSCAR (arXiv 2510.09060) and in the marginal-preserving drift of EDDY (arXiv 2605.06553).
    """
    return without(move, state.score)


def rescale(move: Tensor, state: MoveState) -> Tensor:
    """Every sample moves by ``scale`` times the norm of its target, however small its gradient: the published step."""
    size = norms(move)
    unit = torch.where(size > 0, move / size.clamp_min(torch.finfo(move.dtype).tiny), 0)
    return state.scale * norms(state.target) * unit


def bound(move: Tensor, state: MoveState) -> Tensor:
    """The sample that is pushed hardest moves by ``scale`` times its norm, the others in proportion to their gradients.

    A sample that is already away from all others is left alone, which is what rescaling each one gets wrong. And where
    all that there is to be away from are samples of hardly related prompts, which together weigh less than one of the
    same prompt, the moves are smaller by as much: different subjects do not repel.
    """
    largest = norms(move).amax()
    if not largest > 0:
        return torch.zeros_like(move)
    related = 1.0 if state.mass is None else min(1.0, float(state.mass.max()))
    return related * state.scale * norms(state.target) * (move / largest)


def fade(move: Tensor, state: MoveState) -> Tensor:
    """From full strength at the start of the guided interval down to none at its end, as a half cosine."""
    start, stop = state.window
    place = (state.fraction - start) / max(stop - start, 1e-9)
    return move * float(torch.cos(torch.tensor(min(max(place, 0.0), 1.0) * torch.pi / 2)).square())


PARTS: dict[str, Part] = {"tangent": tangent, "off_score": off_score, "rescale": rescale, "bound": bound, "fade": fade}
