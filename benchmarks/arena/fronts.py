"""From measured cases to fronts and standings of the methods of a bed.

All figures are relative to plain sampling of the same cases. ``modes`` and ``valid`` stand for a bed's diversity and
fidelity.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kspec_guidance.bench.fronts import Standing, at_gain, hypervolume, matched, standings, weights
from kspec_guidance.bench.methods import METHODS

Weigh = Callable[[Sequence[str]], np.ndarray]  # bootstrap weights of cases with these prompts


@dataclass
class Summary(Standing):
    """One method on one bed; its seconds are relative to plain sampling."""

    seconds: float = 0.0


def points(data: dict[str, Any], method: str, front: str = "front") -> list[dict[str, Any]]:
    """The points of a front, from weak to strong."""
    found = sorted(data["methods"][method][front], key=lambda p: p["strength"], reverse=METHODS[method].falls)
    return found


def measured(data: dict[str, Any], method: str) -> list[list[dict[str, Any]]]:
    """The fronts of a method, each from weak to strong: one, or two of two tunings."""
    found = data["methods"][method]
    return [points(data, method, name) for name in ("front", "other_front") if found.get(name)]


def pooled(data: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Scores of all cases together, of each method where its gain in modes at matched fidelity is reached.

    Between two points of the front they are interpolated as the gain is; of two fronts the one with the larger gain counts.
    """
    settings, plain = data["settings"], data["methods"]["plain"]
    if "pooled" not in plain:
        return {}
    base = plain[f"report {settings['seeds']}"]
    m0, v0 = (np.mean(base[settings[k]]) for k in ("diversity", "fidelity"))
    found = {"plain": plain["pooled"]}
    for method in data["methods"]:
        largest = -np.inf
        for front in measured(data, method):
            modes, valid = (np.array([np.mean(p["cases"][settings[k]]) for p in front]) for k in ("diversity", "fidelity"))
            kept, gain = valid - v0, modes / m0 - 1
            scores = [plain["pooled"], *(p["pooled"] for p in front)]
            best = matched(gain[None], kept[None])[0]
            if best > largest:
                largest = best
                found[method] = {n: at_gain(gain, kept, np.array([s[n] for s in scores]), best) for n in scores[0]}
    return found


def summaries(data: dict[str, Any], reference: str, diversity: str | None = None, weigh: Weigh = weights) -> list[Summary]:
    """All methods of a bed, compared with one of them; by another figure of the judge than the bed's own if given.

    Of two fronts of a method the one with the larger gain counts.
    """
    settings = data["settings"] | ({} if diversity is None else {"diversity": diversity})
    w = weigh(settings["prompts"])
    base = data["methods"]["plain"][f"report {settings['seeds']}"]
    m0, v0 = (w @ np.array(base[settings[k]]) for k in ("diversity", "fidelity"))
    gains, volumes, seconds = {}, {}, {}
    for method in data["methods"]:
        for front in measured(data, method):
            modes, valid = (np.array([p["cases"][settings[k]] for p in front]) @ w.T for k in ("diversity", "fidelity"))
            gain, kept = modes.T / m0[:, None] - 1, valid.T - v0[:, None]
            best = matched(gain, kept)
            if method in gains and best[0] <= gains[method][0]:
                continue
            gains[method], volumes[method] = best, hypervolume(gain, kept)
            taken = np.median([np.array(p["cases"]["seconds"]) for p in front])
            seconds[method] = float(taken / np.median(base["seconds"]))
    found = standings(gains, volumes, reference)
    return sorted((Summary(**vars(s), seconds=seconds[m]) for m, s in found.items()), key=lambda s: -s.gain)
