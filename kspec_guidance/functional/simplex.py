"""Minima of convex functions over weights, with the proof of their quality."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["SimplexSolution", "minimise_on_simplex"]

SMALLEST = 1e-30  # share of a weight to the largest below which it does not fall, so that it can return
MEMORY = 10  # values above which a step must not end
DECREASE = 1e-4  # share of the predicted decrease that a step must reach


@dataclass(frozen=True)
class SimplexSolution:
    """Weights that minimise a convex function over the simplex.

    Attributes:
        weights: ``[..., k]`` in float64; each row sums to 1.
        value: the function at the weights.
        gap: upper bound of ``value`` minus the minimum, ``sum of rows (w'g - min g)`` with the gradient g; scaled by
            ``1 - k floor`` if there is a floor.
        steps: number of evaluations of the function.
    """

    weights: Tensor
    value: float
    gap: float
    steps: int


def _start(start: Tensor | int, floor: float) -> Tensor:
    """Start weights ``[..., k]``: of the part above the floor, positive, with rows that sum to 1."""
    if isinstance(start, int) and not isinstance(start, bool):
        if start < 1:
            raise ValueError(f"a simplex has at least one weight, got {start}")
        start = torch.full((start,), 1 / start, dtype=torch.float64)
    if not isinstance(start, Tensor) or start.ndim < 1 or not start.numel():
        raise ValueError("start must be a number of weights, or weights [..., k], with k of at least 1")
    w = start.detach().cpu().double()
    k = w.shape[-1]
    if not (torch.isfinite(w).all() and (w >= 0).all() and (w.sum(-1) > 0).all()):
        raise ValueError("start weights must be finite, at least 0, and not all 0 in a row")
    if not 0 <= floor * k <= 1:
        raise ValueError(f"floor must lie between 0 and 1/{k}, since {k} weights sum to 1; got {floor}")
    w = w / w.sum(-1, keepdim=True)
    spare = 1 - k * floor
    if spare > 0:
        w = ((w - floor) / spare).clamp_min(0)
        total = w.sum(-1, keepdim=True)
        w = torch.where(total > 0, w / torch.where(total > 0, total, 1.0), 1 / k)
    w = w.clamp_min(1e-12 / k)
    return w / w.sum(-1, keepdim=True)


def minimise_on_simplex(
    objective: Callable[[Tensor], tuple[Tensor | float, Tensor]],
    start: Tensor | int,
    floor: float = 0.0,
    tolerance: float = 1e-8,
    max_steps: int = 2000,
) -> SimplexSolution:
    """Minimise a convex function over the simplex, or over a product of simplices, by exponentiated gradients.

    ``w <- w exp(-eta g)``, normalised (Kivinen, Warmuth 1997). The step size is the inverse curvature along the last step
    in the entropy metric (Barzilai, Borwein 1988), ``eta = <w' - w, log w' - log w> / <w' - w, g' - g>``, halved until the
    value is below the largest of the last 10 (Grippo, Lampariello, Lucidi 1986). It stops when the duality gap
    ``w'g - min g``, which bounds the distance to the minimum, is at most ``tolerance``. To maximise a concave function,
    give its negative.

    Args:
        objective: maps weights ``[..., k]`` (float64, on the host) to the value and the gradient ``[..., k]``. An infinite
            value away from the start shortens the step.
        start: weights ``[..., k]``, or their number k for uniform weights. Zeros are raised to 1e-12: they could not grow.
        floor: least weight, at most ``1 / k``.
        tolerance: largest gap.
        max_steps: evaluations of ``objective``.

    Raises:
        ValueError: for start weights or a floor that are no weights, a gradient of another shape, or values that are not
            finite.

    Warns:
        UserWarning: if the gap is above ``tolerance`` after ``max_steps``.

    >>> modes = torch.tensor([2.0, 3.0, 5.0], dtype=torch.float64)
    >>> minimise_on_simplex(lambda w: ((w * w / modes).sum(), 2 * w / modes), 3).weights  # proportional to the modes
    tensor([0.2000, 0.3000, 0.5000], dtype=torch.float64)
    """
    v = _start(start, floor)
    spare, evaluations = 1 - v.shape[-1] * floor, 0

    def evaluate(v: Tensor) -> tuple[float, Tensor]:
        nonlocal evaluations
        evaluations += 1
        value, g = objective(floor + spare * v)
        if not isinstance(g, Tensor) or g.shape != v.shape:
            found = list(g.shape) if isinstance(g, Tensor) else type(g).__name__
            raise ValueError(f"the gradient must have the shape of the weights, {list(v.shape)}; got {found}")
        g = g.detach().cpu().double() * spare
        return float(value), g - (v * g).sum(-1, keepdim=True)

    def gap_of(g: Tensor) -> float:
        return max(0.0, float(-g.amin(-1).sum()))  # rows of g are centred: w'g = 0

    value, g = evaluate(v)
    if not (math.isfinite(value) and bool(torch.isfinite(g).all())):
        raise ValueError("the function or its gradient is not finite at the start weights")
    logs, recent = v.log(), [value]
    best, eta = (v, value, gap_of(g)), 1 / max(float(g.abs().max()), 1e-300)
    while best[2] > tolerance and evaluations < max_steps:
        moved = logs - eta * g
        moved = moved.clamp_min(math.log(SMALLEST) + moved.amax(-1, keepdim=True)).log_softmax(-1)
        new = moved.exp()
        new_value, new_g = evaluate(new)
        ceiling = max(recent) + DECREASE * float((g * (new - v)).sum()) + 1e-13 * max(abs(value), 1e-3)  # rounding
        if not (new_value <= ceiling and math.isfinite(new_value) and bool(torch.isfinite(new_g).all())):
            eta /= 2
            continue
        step, change = float(((new - v) * (moved - logs)).sum()), float(((new - v) * (new_g - g)).sum())
        longest = 1e3 / max(float(new_g.abs().max()), 1e-300)  # no weight changes by more than exp(1000) in a step
        eta = min(step / change, longest) if change > 0 and step > 0 else longest
        v, logs, value, g = new, moved, new_value, new_g
        recent = [*recent[1 - MEMORY :], value]
        if gap_of(g) < best[2]:
            best = v, value, gap_of(g)
    v, value, gap = best
    if gap > tolerance:
        warnings.warn(
            f"the weights are optimal to {gap:.2g} only, above the tolerance of {tolerance:.2g}, after {evaluations} "
            "evaluations; raise max_steps, or check the gradient",
            stacklevel=2,
        )
    return SimplexSolution(floor + spare * v, value, gap, evaluations)
