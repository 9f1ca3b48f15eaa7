"""From measured cases to fronts: hypervolume, diversity at matched fidelity, paired intervals, corrected for many tests.

All figures are relative to plain sampling of the same cases. ``modes`` and ``valid`` stand for a bed's diversity and
fidelity.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from kspec_guidance.bench.methods import METHODS

from .harness import FIDELITY_LOSS

DEPTH = 0.1  # fidelity below plain sampling at which the hypervolume's box ends
DRAWS = 2000


@dataclass
class Summary:
    """One method on one bed: value, 95% interval; ``p`` of the difference to the reference method, Holm-corrected."""

    method: str
    gain: float
    gain_low: float
    gain_high: float
    volume: float
    volume_low: float
    volume_high: float
    ahead: float | None = None  # of the reference method in gain, with its interval
    ahead_low: float | None = None
    ahead_high: float | None = None
    p: float | None = None
    seconds: float = 0.0  # relative to plain


def weights(prompts: list[str], draws: int = DRAWS, seed: int = 0) -> np.ndarray:
    """Bootstrap weights ``[draws, cases]``: prompts and seeds are both drawn with replacement (Owen 2007).

    Cases come seed by seed, all prompts of a seed together. Row 0 is the sample itself.
    """
    names = list(dict.fromkeys(prompts))
    per_seed = len(names) if len(names) > 1 else 1
    seeds = len(prompts) // per_seed
    rng = np.random.default_rng(seed)
    p = rng.multinomial(per_seed, np.full(per_seed, 1 / per_seed), draws) if per_seed > 1 else np.ones((draws, 1))
    s = rng.multinomial(seeds, np.full(seeds, 1 / seeds), draws) if seeds > 1 else np.ones((draws, 1))
    w = (s[:, :, None] * p[:, None, :]).reshape(draws, -1).astype(float)
    w[0] = 1
    return w / w.sum(1, keepdims=True)


def hypervolume(gain: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Area under the staircase of points ``[draws, points]``: relative gain above 0, fidelity from ``-DEPTH`` on.

    In units of one plain sampling's diversity over the whole depth: a method that doubles the modes at no loss has 1.

    >>> hypervolume(np.array([[1.0, 2.0]]), np.array([[0.0, -0.05]])).round(3)
    array([1.5])
    """
    x = np.clip((kept + DEPTH) / DEPTH, 0, None)
    y = np.clip(gain, 0, None)
    order = np.argsort(-x, axis=1)
    x, y = np.take_along_axis(x, order, 1), np.maximum.accumulate(np.take_along_axis(y, order, 1), axis=1)
    width = x - np.concatenate([x[:, 1:], np.zeros_like(x[:, :1])], 1)
    return (width * y).sum(1)


def matched(gain: np.ndarray, kept: np.ndarray, loss: float = FIDELITY_LOSS) -> np.ndarray:
    """Largest gain along the polyline from plain sampling through points ``[draws, points]`` that keeps fidelity.

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


def holm(p: list[float]) -> list[float]:
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


def points(data: dict[str, Any], method: str) -> list[dict[str, Any]]:
    """The points of a front, from weak to strong."""
    found = sorted(data["methods"][method]["front"], key=lambda p: p["strength"], reverse=METHODS[method].falls)
    return found


def pooled(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scores of all cases together, of each method where its gain in modes at matched fidelity is reached.

    Between two points of the front they are interpolated as the gain is.
    """
    settings, plain = data["settings"], data["methods"]["plain"]
    if "pooled" not in plain:
        return {}
    base = plain[f"report {settings['seeds']}"]
    m0, v0 = (np.mean(base[settings[k]]) for k in ("diversity", "fidelity"))
    found = {"plain": plain["pooled"]}
    for method, has in data["methods"].items():
        if "front" not in has:
            continue
        front = points(data, method)
        modes, valid = (np.array([np.mean(p["cases"][settings[k]]) for p in front]) for k in ("diversity", "fidelity"))
        kept = np.concatenate([[0.0], valid - v0])
        gain = np.concatenate([[0.0], modes / m0 - 1])
        scores = [plain["pooled"], *(p["pooled"] for p in front)]
        best = matched(gain[None, 1:], kept[None, 1:])[0]
        choices = [(abs(gain[k] - best), scores[k]) for k in range(len(scores)) if kept[k] >= -FIDELITY_LOSS]
        for a in range(len(scores) - 1):
            if (kept[a] >= -FIDELITY_LOSS) != (kept[a + 1] >= -FIDELITY_LOSS):
                part = (kept[a] + FIDELITY_LOSS) / (kept[a] - kept[a + 1])
                at = {n: scores[a][n] + part * (scores[a + 1][n] - scores[a][n]) for n in scores[a]}
                choices.append((abs(gain[a] + part * (gain[a + 1] - gain[a]) - best), at))
        found[method] = min(choices, key=lambda c: c[0])[1]
    return found


def against(gains: dict[str, np.ndarray], reference: str) -> dict[str, tuple[float, float, float, float]]:
    """How far a reference method is ahead of each other one: difference of gains, its 95% interval, Holm-corrected p."""
    found, ps = {}, []
    for method in gains:
        if reference in gains and method != reference:
            d = gains[reference] - gains[method]
            found[method] = (float(d[0]), *map(float, np.quantile(d, [0.025, 0.975])))
            ps.append(min(1.0, 2 * (min((d[1:] <= 0).mean(), (d[1:] >= 0).mean()) + 1 / len(d))))
    return {method: (*values, p) for (method, values), p in zip(found.items(), holm(ps), strict=True)}


def summaries(data: dict[str, Any], reference: str, diversity: str | None = None) -> list[Summary]:
    """All methods of a bed, compared with one of them; by another figure of the judge than the bed's own if given."""
    settings = data["settings"] | ({} if diversity is None else {"diversity": diversity})
    w = weights(settings["prompts"])
    base = data["methods"]["plain"][f"report {settings['seeds']}"]
    m0, v0 = (w @ np.array(base[settings[k]]) for k in ("diversity", "fidelity"))
    gains, volumes, seconds = {}, {}, {}
    for method, found in data["methods"].items():
        if "front" not in found:
            continue
        front = points(data, method)
        modes, valid = (np.array([p["cases"][settings[k]] for p in front]) @ w.T for k in ("diversity", "fidelity"))
        gain, kept = modes.T / m0[:, None] - 1, valid.T - v0[:, None]
        gains[method], volumes[method] = matched(gain, kept), hypervolume(gain, kept)
        seconds[method] = float(np.median([np.array(p["cases"]["seconds"]) for p in front]) / np.median(base["seconds"]))
    out = []
    for method in gains:
        g, v = gains[method], volumes[method]
        s = Summary(method, g[0], *np.quantile(g, [0.025, 0.975]), v[0], *np.quantile(v, [0.025, 0.975]))
        s.seconds = seconds[method]
        out.append(s)
    compared = against(gains, reference)
    for s in out:
        if s.method in compared:
            s.ahead, s.ahead_low, s.ahead_high, s.p = compared[s.method]
    return sorted(out, key=lambda s: -s.gain)
