"""Diversity against quality over a method's strengths: gain at equal quality, hypervolume, and paired intervals.

All figures are relative to plain sampling of the same prompts and seeds. Arrays ``[draws, points]`` hold bootstrap draws,
of which row 0 is the sample itself, by the points of a front from weak to strong. ``gain`` is the relative gain in
diversity, ``kept`` the change of quality, below 0 for losses.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

__all__ = [
    "DEPTH",
    "DRAWS",
    "LOSS",
    "Standing",
    "against",
    "at_gain",
    "holm",
    "hypervolume",
    "matched",
    "resampled",
    "runs_needed",
    "standings",
    "weights",
    "weights_of_seeds",
]

LOSS = 0.02  # quality that a method may lose against plain sampling and still count as equal
DEPTH = 0.1  # quality below plain sampling at which the hypervolume's box ends
DRAWS = 2000


@dataclass
class Standing:
    """One method: gain at equal quality and hypervolume, with 95% intervals.

    ``ahead`` is how far a reference method is ahead of it in gain, and ``p`` the p-value of that, Holm-corrected; None for
    the reference itself.
    """

    method: str
    gain: float
    gain_low: float
    gain_high: float
    volume: float
    volume_low: float
    volume_high: float
    ahead: float | None = None
    ahead_low: float | None = None
    ahead_high: float | None = None
    p: float | None = None


def resampled(prompts: int, seeds: int, draws: int = DRAWS, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Bootstrap weights of prompts ``[draws, prompts]`` and of seeds ``[draws, seeds]``, each row with the sum 1.

    Both are drawn with replacement; the weight of a case is the product of both (Owen 2007). Row 0 is the sample itself.
    """
    rng = np.random.default_rng(seed)

    def drawn(n: int) -> np.ndarray:
        w = rng.multinomial(n, np.full(n, 1 / n), draws).astype(float) if n > 1 else np.ones((draws, 1))
        w[0] = 1
        return w / w.sum(1, keepdims=True)

    return drawn(prompts), drawn(seeds)


def weights(prompts: Sequence[str], draws: int = DRAWS, seed: int = 0, same_seeds: bool = False) -> np.ndarray:
    """Bootstrap weights ``[draws, cases]`` of cases with prompts and seeds, as :func:`resampled` draws them.

    Args:
        prompts: of the cases, seed by seed, all prompts of a seed together.
        draws: number of draws; row 0 is the sample itself.
        seed: of the draws.
        same_seeds: whether prompts alone are drawn: what would be left of an interval with any number of seeds.
    """
    per_seed = len(set(prompts)) if len(set(prompts)) > 1 else 1
    p, s = resampled(per_seed, len(prompts) // per_seed, draws, seed)
    if same_seeds:
        s = np.full_like(s, 1 / s.shape[1])
    return (s[:, :, None] * p[:, None, :]).reshape(draws, -1)


def weights_of_seeds(prompts: Sequence[str], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap weights ``[draws, cases]`` of the seeds of each prompt, whose prompts are all that there are.

    Of the ``n`` cases of a prompt ``n - 1`` are drawn, so that the variance of their mean is unbiased (Rao, Wu 1988).

    Args:
        prompts: of the cases, seed by seed, all prompts of a seed together; at least two seeds.
        draws: number of draws; row 0 is the sample itself.
        seed: of the draws.
    """
    number = len(set(prompts))
    seeds = len(prompts) // number
    w = np.random.default_rng(seed).multinomial(seeds - 1, np.full(seeds, 1 / seeds), (draws, number)) / (seeds - 1)
    w[0] = 1 / seeds
    return (w.transpose(0, 2, 1) / number).reshape(draws, -1)


def hypervolume(gain: np.ndarray, kept: np.ndarray, depth: float = DEPTH) -> np.ndarray:
    """Area under the staircase of points ``[draws, points]``: relative gain above 0, quality from ``-depth`` on.

    In units of one plain sampling's diversity over the whole depth: a method that doubles it at no loss has 1.

    >>> hypervolume(np.array([[1.0, 2.0]]), np.array([[0.0, -0.05]])).round(3)
    array([1.5])
    """
    x = np.clip((kept + depth) / depth, 0, None)
    y = np.clip(gain, 0, None)
    order = np.argsort(-x, axis=1)
    x, y = np.take_along_axis(x, order, 1), np.maximum.accumulate(np.take_along_axis(y, order, 1), axis=1)
    width = x - np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], 1)
    return (width * y).sum(1)


def matched(gain: np.ndarray, kept: np.ndarray, loss: float = LOSS) -> np.ndarray:
    """Largest gain along the polyline from plain sampling through points ``[draws, points]`` that loses at most ``loss``.

    >>> matched(np.array([[1.0, 2.0]]), np.array([[0.0, -0.04]])).round(3)
    array([1.5])
    """
    zero = np.zeros_like(gain[:, :1])
    g, k = np.concatenate([zero, gain], 1), np.concatenate([zero, kept], 1)
    best = np.where(k >= -loss, g, -np.inf).max(1)
    for a in range(g.shape[1] - 1):
        ka, kb, ga, gb = k[:, a], k[:, a + 1], g[:, a], g[:, a + 1]
        crosses = (ka >= -loss) != (kb >= -loss)
        part = np.where(crosses, (ka + loss) / np.where(ka == kb, 1, ka - kb), 0)
        best = np.maximum(best, np.where(crosses, ga + part * (gb - ga), -np.inf))
    return best


def at_gain(gain: np.ndarray, kept: np.ndarray, values: np.ndarray, best: float, loss: float = LOSS) -> float:
    """Another figure where the polyline reaches its gain at equal quality, interpolated as the gain is.

    Args:
        gain: of the points ``[points]``, without plain sampling.
        kept: of the points ``[points]``.
        values: of the other figure, of plain sampling and then of the points ``[points + 1]``.
        best: of :func:`matched`.
        loss: as given to :func:`matched`.

    >>> at_gain(np.array([1.0, 2.0]), np.array([0.0, -0.04]), np.array([5.0, 6.0, 8.0]), 1.5)
    7.0
    """
    g, k = (np.concatenate([[0.0], a]) for a in (gain, kept))
    choices = [(abs(g[i] - best), values[i]) for i in range(len(g)) if k[i] >= -loss]
    for a in range(len(g) - 1):
        if (k[a] >= -loss) != (k[a + 1] >= -loss):
            part = (k[a] + loss) / (k[a] - k[a + 1])
            choices.append((abs(g[a] + part * (g[a + 1] - g[a]) - best), values[a] + part * (values[a + 1] - values[a])))
    return float(min(choices, key=lambda c: c[0])[1])


def holm(p: Sequence[float]) -> list[float]:
    """Holm's step-down correction.

    >>> holm([0.01, 0.04, 0.03])
    [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda k: p[k])
    out, running = [0.0] * len(p), 0.0
    for rank, k in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[k]))
        out[k] = running
    return out


def against(draws: Mapping[str, np.ndarray], reference: str) -> dict[str, tuple[float, float, float, float]]:
    """A reference method less each other one: difference, its 95% interval, and the Holm-corrected p-value.

    Args:
        draws: paired draws ``[draws]`` of each method.
        reference: name of the method that the others are compared with; without it the result is empty.
    """
    found, ps = {}, []
    for method in draws:
        if reference in draws and method != reference:
            d = draws[reference] - draws[method]
            low, high = np.quantile(d, [0.025, 0.975])
            found[method] = float(d[0]), float(low), float(high)
            ps.append(min(1.0, 2 * (float(min((d[1:] <= 0).mean(), (d[1:] >= 0).mean())) + 1 / len(d))))
    return {method: (*values, p) for (method, values), p in zip(found.items(), holm(ps), strict=True)}


def runs_needed(difference: float, low: float, high: float, runs: int, comparisons: int = 1) -> float:
    """Runs after which a difference as seen is significant at 0.05: its interval narrows as one over their root.

    Args:
        difference: as seen.
        low: end of its 95% interval.
        high: the other end.
        runs: that were made; the needed ones have as many more prompts, and seeds, as needed.
        comparisons: of which this is one; for the smallest p-value of Holm's correction.

    >>> runs_needed(0.1, -0.1, 0.3, 50)
    200.0
    """
    if not difference:
        return float("inf")
    normal = NormalDist()
    wider = normal.inv_cdf(1 - 0.025 / comparisons) / normal.inv_cdf(0.975)
    return runs * ((high - low) / 2 / difference * wider) ** 2


def standings(gains: Mapping[str, np.ndarray], volumes: Mapping[str, np.ndarray], reference: str) -> dict[str, Standing]:
    """The standing of each method from draws ``[draws]`` of :func:`matched` and of :func:`hypervolume`."""
    compared = against(gains, reference)
    out = {}
    for method, g in gains.items():
        v = volumes[method]
        intervals = [float(b) for x in (g, v) for b in (x[0], *np.quantile(x, [0.025, 0.975]))]
        out[method] = Standing(method, *intervals, *compared.get(method, ()))
    return out
