"""Diversity at equal quality: what a method gains where none of several figures of quality is worse than plain sampling's.

A gain in modes alone can be bought with images off the data, or with the same few outliers of each mode. So quality is a
vector: the share of samples on the data, coverage of the truth and Frechet distance to it. Agreement with the prompt is
kept apart, since a sample in another prompt's mode is not off the data.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from kspec_guidance.bench.fronts import Standing, at_gain, hypervolume, matched, standings, weights
from kspec_guidance.bench.methods import METHODS

from .beds.base import Bed, Case, blocks
from .fronts import Weigh, measured, points
from .harness import FIDELITY_LOSS, PENALTY, Goal, measure_all

__all__ = [
    "FIGURES",
    "WORSE",
    "EqualQuality",
    "change",
    "equal_quality",
    "quality_goal",
    "with_other_half",
    "with_other_tuning",
]

# What still counts as no worse than plain sampling: a difference, or a factor for distances
WORSE = {"on_data": FIDELITY_LOSS, "coverage": 0.02, "frechet_distance": 1.05}
FEWEST = 8  # blocks that make a test: resampling five of them gives intervals a third too narrow
SHARED = 3  # strengths of two fronts of a method that are the same, at which only those are joined
DISTANCES = ("frechet_distance",)  # lower is better; compared by their ratio
FIGURES = ("modes", "on_data", "agreement", "valid", "coverage", "recall", "frechet_distance", "mmd")


@dataclass
class EqualQuality(Standing):
    """A method on one bed: its standing with the whole vector of quality.

    ``agreement`` is the change of agreement there; ``gain_agreed`` is the gain that also keeps agreement.
    """

    agreement: float = 0.0
    gain_agreed: float = 0.0


def by_block(cases: dict[str, list[float]], distances: list[dict[str, float]], prompts: list[str]) -> dict[str, np.ndarray]:
    """The figures of each block of cases: means of those of its cases, and the distances of its samples to the truth."""
    members = blocks(prompts)
    found = {k: np.array([np.mean([v[i] for i in block]) for block in members]) for k, v in cases.items()}
    return found | {k: np.array([d[k] for d in distances]) for k in distances[0]}


def change(found: dict[str, np.ndarray], base: dict[str, np.ndarray], w: np.ndarray) -> dict[str, np.ndarray]:
    """Figures of a setting against plain sampling, for bootstrap weights ``[draws, blocks]``.

    ``modes`` and distances as factors, others as differences; ``kept`` is the quality kept, the least of the quality
    figures in units in which ``-FIDELITY_LOSS`` still counts as equal.
    """
    out = {}
    for name in FIGURES:
        a, b = w @ found[name], w @ base[name]
        out[name] = a / b if name in ("modes", *DISTANCES) else a - b
    parts = [
        -np.log(out[name]) * FIDELITY_LOSS / np.log(WORSE[name]) if name in DISTANCES else out[name] * FIDELITY_LOSS / worse
        for name, worse in WORSE.items()
    ]
    return out | {"kept": np.minimum.reduce(parts)}


def quality_goal(bed: Bed, cases: Sequence[Case]) -> Goal:
    """What tuning maximises: relative modes, less a penalty for quality lost beyond what counts as equal."""
    prompts = [case.prompt for case in cases]
    own, together = measure_all(bed, METHODS["plain"], cases)
    base, w = by_block(own, together()["distances"], prompts), np.full((1, len(blocks(prompts))), 1 / len(blocks(prompts)))

    def goal(found: dict[str, list[float]], together: dict[str, Any]) -> float:
        changed = change(by_block(found, together["distances"], prompts), base, w)
        return float(changed["modes"][0] - PENALTY * max(0.0, -FIDELITY_LOSS - changed["kept"][0]))

    return goal


def with_other_tuning(data: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A bed's results, in which each method also has its front of another record of the same cases, with another tuning.

    Raises:
        ValueError: if the cases differ.
    """
    if any(data["settings"][k] != other["settings"][k] for k in ("prompts", "seeds", "images", "steps")):
        raise ValueError(f"{data['bed']}: the two records are of other cases")
    methods = dict(data["methods"])
    for name, found in other["methods"].items():
        if found.get("front"):
            mine = methods.get(name, {})
            names = ("other_front", "other_tuned") if mine.get("front") else ("front", "tuned")
            methods[name] = mine | dict(zip(names, (found["front"], found.get("tuned", {})), strict=True))
    return data | {"methods": methods}


def with_other_half(data: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A bed's results on both halves of its prompts, each with settings that were tuned on the other half.

    Points of the two fronts are joined by their strength where at least ``SHARED`` are the same, as with whole numbers,
    else in their order from weak to strong; the shorter one's last point stands for those that it lacks. Methods without
    both fronts, or whose fronts lack the figures of the whole judge, are left out.

    Raises:
        ValueError: if the halves share prompts, or differ in seeds, images or steps.
    """
    mine, theirs = data["settings"], other["settings"]
    if any(mine[k] != theirs[k] for k in ("seeds", "images", "steps")) or set(mine["prompts"]) & set(theirs["prompts"]):
        raise ValueError(
            f"{data['bed']}: the two records are not of two halves of the prompts with the same number of seeds"
        )
    n, m = len(set(mine["prompts"])), len(set(theirs["prompts"]))

    def woven(a: list[Any], b: list[Any]) -> list[Any]:
        """Values of all prompts of a seed together, or of a block of seeds."""
        return [v for k in range(len(a) // n) for v in (*a[k * n : (k + 1) * n], *b[k * m : (k + 1) * m])]

    def both(a: dict[str, Any], b: dict[str, Any]) -> dict[str, Any]:
        return {k: woven(a[k], b[k]) for k in a if k in b}

    report = f"report {mine['seeds']}"
    plain, base = data["methods"]["plain"], other["methods"]["plain"]
    methods = {"plain": {report: both(plain[report], base[report]),
                         "distances": woven(plain["distances"], base["distances"])}}  # fmt: skip
    for name, has in data["methods"].items():
        own, others = has.get("front", []), other["methods"].get(name, {}).get("front", [])
        if not own or not others or not all("distances" in p for p in (*own, *others)):
            continue
        fronts = [points(data, name), points(other, name)]
        shared = {p["strength"] for p in own} & {p["strength"] for p in others}
        if len(shared) >= SHARED:
            fronts = [[p for p in f if p["strength"] in shared] for f in fronts]
        longest = max(map(len, fronts))
        left, right = (f + f[-1:] * (longest - len(f)) for f in fronts)
        methods[name] = has | {"front": [
            {"strength": p["strength"], "cases": both(p["cases"], q["cases"]),
             "distances": woven(p["distances"], q["distances"])}
            for p, q in zip(left, right, strict=True)
        ]}  # fmt: skip
    prompts = woven(mine["prompts"], theirs["prompts"])
    return data | {"methods": methods, "settings": mine | {"prompts": prompts}}


def equal_quality(data: dict[str, Any], reference: str, weigh: Weigh = weights, agreed: bool = False) -> list[EqualQuality]:
    """All methods of a bed whose fronts have the figures of the whole judge, compared with one of them.

    Of two fronts of a method, from two aims of tuning, the one with the larger gain counts; for the gain that keeps
    agreement, the one with the larger such gain. With fewer than ``FEWEST`` blocks there are no p-values.

    Args:
        data: the results of a bed.
        reference: the method that the others are compared with.
        weigh: bootstrap weights of cases with these prompts.
        agreed: whether gains, volumes and the comparison are of what keeps agreement with the prompt too.
    """
    settings, plain = data["settings"], data["methods"]["plain"]
    own = plain.get(f"report {settings['seeds']}", {})
    if "distances" not in plain or "on_data" not in own:
        return []
    prompts = settings["prompts"]
    base = by_block(own, plain["distances"], prompts)
    w = weigh([prompts[block[0]] for block in blocks(prompts)])
    gains, volumes, others = {}, {}, {}
    for method, has in data["methods"].items():
        if not has.get("front") or not all("distances" in p for p in has["front"]):
            continue
        for front in measured(data, method):
            found = [change(by_block(p["cases"], p["distances"], prompts), base, w) for p in front]
            gain, kept, agreement = (np.stack([f[k] for f in found], 1) for k in ("modes", "kept", "agreement"))
            gain, keeping = gain - 1, np.minimum(kept, agreement)
            kept = keeping if agreed else kept
            best, with_agreement = matched(gain, kept), float(matched(gain, keeping)[0])
            before = others.get(method, {}).get("gain_agreed", 0.0)
            if method not in gains or best[0] > gains[method][0]:
                gains[method], volumes[method] = best, hypervolume(gain, kept)
                there = at_gain(gain[0], kept[0], np.concatenate([[0.0], agreement[0]]), best[0])
                others[method] = {"agreement": there}
            others[method]["gain_agreed"] = max(before, with_agreement)
    found = standings(gains, volumes, reference)
    if w.shape[1] < FEWEST:
        for s in found.values():
            s.p = None
    return sorted((EqualQuality(**vars(s), **others[m]) for m, s in found.items()), key=lambda s: -s.gain)
