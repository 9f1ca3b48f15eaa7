"""Why less classifier-free guidance costs agreement with the prompt, and what a push gains where agreement is kept.

    python benchmarks/agreement.py --seeds 10    # then python -m benchmarks.arena.page

On the mixtures a sample agrees with its prompt if it is in a mode that the prompt gives at least 1%. Pushes are tuned over
a grid of CFG weights and strengths on the tuning half, 10 seeds, and fronts over the strengths are of the report half.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.batched import Setting, run
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.analytic import COUNTS, Analytic
from benchmarks.arena.beds.base import blocks
from benchmarks.arena.harness import FIDELITY_LOSS, PENALTY
from benchmarks.arena.quality import by_block, change
from kspec_guidance.bench.fronts import at_gain, matched, weights
from kspec_guidance.utils.atomic_io import replacing

ROOT = Path(__file__).parents[1]
MIXTURES = ("mixture-2", "mixture-8", "mixture-32", "mixture-64")
PUSH = Setting(scale=3.0, order=0.5)
LOWER = 1.3
CAUSES = {
    "push alone": PUSH,
    f"CFG {LOWER} alone": Setting(weight=LOWER),
    "the prompt's own distribution (CFG 1)": Setting(weight=1.0),
    f"push, CFG {LOWER}": replace(PUSH, weight=LOWER),
    **{f"push, CFG {LOWER} for {share:.0%}": replace(PUSH, weight=LOWER, until=share) for share in (0.2, 0.27, 0.33, 0.5)},
    f"push, CFG {LOWER}, guard": replace(PUSH, weight=LOWER, guard=True),
}
OSCAR = "OSCAR without its noise"
STRENGTHS, EARLY_STRENGTHS, WEIGHTS = (1.0, 2.0, 4.0, 8.0), (0.2, 0.4, 0.8, 1.6), (1.2, 1.4, 1.7, 2.0, 2.5)
PUSHES: dict[str, tuple[Setting, tuple[float, ...]]] = {
    OSCAR: (Setting(log_det=True, early=True), EARLY_STRENGTHS),
    "order 0.5, `vivid`": (Setting(order=0.5), STRENGTHS),
    "order 0.5, guard": (Setting(order=0.5, guard=True), STRENGTHS),
    "order 0.5, OSCAR's sizes": (Setting(order=0.5, early=True), EARLY_STRENGTHS),
    "order 2": (Setting(order=2.0), STRENGTHS),
    "log det, fading": (Setting(log_det=True), STRENGTHS),
}


# Tuned for the gain at equal quality alone, whatever that costs in agreement
FREE = {label: PUSHES[label][0] for label in (OSCAR, "order 0.5, `vivid`", "log det, fading")}
FREE['log det, `order="logdet"`'] = Setting(log_det=True, exponential=True)
FREE_WEIGHTS, FREE_STRENGTHS, FREE_EARLY = (1.1, 1.35, 1.8), (2.0, 6.0), (0.3, 0.6)


class Half:
    """Cases of one half of a bed's prompts, with plain sampling of them."""

    def __init__(self, bed: Analytic, half: str, seeds: int):
        self.bed, self.cases = bed, bed.cases(half, seeds)
        self.prompts = [case.prompt for case in self.cases]
        self.weights = weights([self.prompts[block[0]] for block in blocks(self.prompts)])
        self.plain = self.figures(Setting())

    def samples(self, setting: Setting) -> torch.Tensor:
        return run(self.bed, self.cases, setting)

    def figures(self, setting: Setting) -> dict[str, np.ndarray]:
        rows, found = list(self.samples(setting)), {}
        for x, case in zip(rows, self.cases, strict=True):
            for k, v in self.bed.figures(x, case).items():
                found.setdefault(k, []).append(v)
        return by_block(found, self.bed.distances(rows, self.cases), self.prompts)

    def change(self, setting: Setting) -> dict[str, np.ndarray]:
        """Bootstrap draws of the changes against plain sampling."""
        return change(self.figures(setting), self.plain, self.weights)

    def median_share(self, setting: Setting) -> float:
        """What a prompt gives, at the median, to the modes in which samples that do not agree with it are."""
        found = []
        for x, case in zip(self.samples(setting), self.cases, strict=True):
            share = self.bed.shares(case.prompt)[self.bed.assign(x)[0]]
            found += share[share < COUNTS].tolist()
        return float(np.median(found)) if found else float("nan")


def spread(draws: np.ndarray) -> list[float]:
    return [float(f"{v:.5g}") for v in (draws[0], *np.quantile(draws, [0.025, 0.975]))]


def causes(half: Half) -> list[dict[str, Any]]:
    found = []
    for label, setting in CAUSES.items():
        c = half.change(setting)
        row = {"label": label, "modes": spread(c["modes"]), "agreement": spread(c["agreement"])}
        found.append(row | {"kept": float(c["kept"][0]), "share": half.median_share(setting)})
    return found


def gains(tuning: Half, report: Half) -> list[dict[str, Any]]:
    """Of each push the gain at equal quality that keeps agreement, tuned on the other half, and less that of OSCAR."""
    found, draws = [], {}
    for label, (push, strengths) in PUSHES.items():
        tried = {}
        for weight in WEIGHTS:
            for scale in strengths:
                c = tuning.change(replace(push, weight=weight, scale=scale))
                lost = -FIDELITY_LOSS - min(c["kept"][0], c["agreement"][0])
                tried[weight, scale] = c["modes"][0] - PENALTY * max(0.0, lost)
        weight, scale = max(tried, key=lambda k: tried[k])
        front = [report.change(replace(push, weight=weight, scale=s)) for s in sorted({*strengths, strengths[0] / 2})]
        gain, kept, agreement = (np.stack([c[k] for c in front], 1) for k in ("modes", "kept", "agreement"))
        draws[label] = matched(gain - 1, np.minimum(kept, agreement))
        row = {"label": label, "weight": weight, "scale": scale, "kept": spread(matched(gain - 1, kept))}
        row |= {"agreed": spread(draws[label]), "less": spread(draws[label] - draws[OSCAR])}
        print(row, flush=True)
        found.append(row)
    return found


def free(tuning: Half, report: Half) -> list[dict[str, Any]]:
    """Of some pushes the gain at equal quality, each with the CFG weight and strength best for it on the other half."""
    found, draws = [], {}
    for label, push in FREE.items():
        tried = {}
        for weight in FREE_WEIGHTS:
            for scale in FREE_EARLY if push.early else FREE_STRENGTHS:
                c = tuning.change(replace(push, weight=weight, scale=scale))
                tried[weight, scale] = c["modes"][0] - PENALTY * max(0.0, -FIDELITY_LOSS - c["kept"][0])
        weight, scale = max(tried, key=lambda k: tried[k])
        front = [report.change(replace(push, weight=weight, scale=scale * f)) for f in (0.35, 0.7, 1.0, 1.5, 3.0)]
        gain, kept, agreement = (np.stack([c[k] for c in front], 1) for k in ("modes", "kept", "agreement"))
        draws[label] = matched(gain - 1, kept)
        lost = at_gain(gain[0] - 1, kept[0], np.concatenate([[0.0], agreement[0]]), draws[label][0])
        row = {"label": label, "weight": weight, "scale": scale, "kept": spread(draws[label]), "agreement": lost}
        found.append(row | {"less": spread(draws[label] - draws[OSCAR])})
        print(found[-1], flush=True)
    return found


def percent(v: list[float]) -> str:
    return f"{v[0]:+.0%} [{v[1]:+.0%}, {v[2]:+.0%}]"


def tables(done: dict[str, Any]) -> str:
    parts = []
    for found in done.values():
        rows = []
        for r in found["causes"]:
            m, a = r["modes"], r["agreement"]
            rows.append([r["label"], f"x{m[0]:.2f} [{m[1]:.2f}, {m[2]:.2f}]", f"{a[0]:+.3f} [{a[1]:+.3f}, {a[2]:+.3f}]",
                         "yes" if r["kept"] >= -FIDELITY_LOSS else "no",
                         "-" if np.isnan(r["share"]) else f"{r['share']:.2%}"])  # fmt: skip
        title = f"{found['bed']}, {found['runs']} runs"
        parts.append(pages.table([title, "modes", "agreement", "equal quality", "share of the modes they leave for"], rows))
        rows = [[r["label"], f"{r['weight']:g}, {r['scale']:g}", percent(r["kept"]), percent(r["agreed"]),
                 "" if r["label"] == OSCAR else percent(r["less"])] for r in found["gains"]]  # fmt: skip
        parts.append(
            pages.table([title, "CFG, strength", "gain at equal quality", "that keeps agreement", "less OSCAR's"], rows)
        )
        if "free" in found:
            rows = [[r["label"], f"{r['weight']:g}, {r['scale']:g}", percent(r["kept"]), f"{r['agreement']:+.3f}",
                     "" if r["label"] == OSCAR else percent(r["less"])] for r in found["free"]]  # fmt: skip
            parts.append(
                pages.table([title, "CFG, strength", "gain at equal quality", "agreement there", "less OSCAR's"], rows)
            )
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=list(MIXTURES), choices=MIXTURES)
    parser.add_argument("--seeds", type=int, default=0, help="of the report half; measure nothing if 0")
    parser.add_argument("--free", action="store_true", help="only the tables of pushes that are tuned for quality alone")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "agreement.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.beds if args.seeds else ():
        bed = BEDS[name]()
        assert isinstance(bed, Analytic)
        report = Half(bed, "report", args.seeds)
        tuning, mine = Half(bed, "tune", 10), done.setdefault(name, {})
        mine |= {"bed": bed.name, "runs": len(report.cases)}
        if not args.free:
            mine |= {"causes": causes(report), "gains": gains(tuning, report)}
        mine["free"] = free(tuning, report)
        with replacing(args.out) as fresh:
            fresh.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
    print(tables(done))


if __name__ == "__main__":
    main()
