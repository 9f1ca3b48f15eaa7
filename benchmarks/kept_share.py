"""How much of a push the denoiser keeps, and whether that, or another free quantity, tells when to push and how much CFG.

    python benchmarks/kept_share.py --kept                        # the share kept at each step
    python benchmarks/kept_share.py --windows --seeds 5           # moves at the steps at which it is large
    python benchmarks/kept_share.py --shares --seeds 5            # the best share of CFG; --seeds 1 on the transformer
    python benchmarks/kept_share.py --page docs/arena/ablations.md

Pushes are those of the preset ``vivid``: order 0.5 at the median distance, off the score, the largest bounded. The share
kept is measured on runs of plain sampling: a push of a tenth of the norm of the clean prediction x0 is taken on to the next
step, whose prediction from there is compared with that from the plain sample. Shares are measured on one half of a bed's
prompts and schedules on the other; CFG weights are chosen on one and reported on the other. Results are kept for each
setting and block of five seeds, from which an interrupted run continues.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.batched import Setting, run, weight_by_spread
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import Bed, Case
from benchmarks.arena.harness import FIDELITY_LOSS, PENALTY
from benchmarks.arena.quality import change
from benchmarks.easing import PLAIN, joined, judged, measure_settings
from kspec_guidance.bench.fronts import matched
from kspec_guidance.bench.methods.base import Method, Moment, guidance_of, norms, without
from kspec_guidance.guidance.run import ascent_direction
from kspec_guidance.guidance.transforms import fading
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.loop.prediction import Prediction, predict
from kspec_guidance.objectives import Vendi
from kspec_guidance.utils.atomic_io import replacing

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results" / "arena"
KEPT, SETTINGS = RESULTS / "kept_share.json", RESULTS / "kept_share_settings.json"
MIXTURES = ("mixture-2", "mixture-8", "mixture-32", "mixture-64")
DISTILLED, TRANSFORMER = "emoji-transformer-distilled", "emoji-transformer"
PROBED = {**dict.fromkeys(MIXTURES, 2), DISTILLED: 1, TRANSFORMER: 1, "digits": 1, "emoji": 1}  # seeds of each prompt
PUSH = 0.1  # of the norm of the prediction: small, so that the answer is about linear
NEARLY_CLEAN = 0.85  # of the run: from there on any push is kept, as the noise is gone
VIVID = Setting(scale=1.5, order=0.5)
# not in 2 dimensions, where a direction off the score is that of the push, and nothing is left to compare it with
STRENGTHS = {**dict.fromkeys(MIXTURES[1:], (2.0, 4.5, 10.0)), DISTILLED: (0.6, 1.2)}
# the pipeline's own weights of CFG, and what they are lowered to
OWN = {**dict.fromkeys(MIXTURES, (3.0, 2.0, 6.0)), TRANSFORMER: (4.0,)}
LOWER = {**dict.fromkeys(MIXTURES, (1.125, 1.25, 1.375, 1.5)), TRANSFORMER: (1.0, 1.375)}
SHARES = (0.25, 0.5)
BOUND = 0.25
FIXED = "fade"


def push(m: Moment) -> Tensor:
    """The move of ``vivid`` whose largest row has the norm of its prediction, before any fade."""
    g, _ = ascent_direction(Vendi(GaussianKernel(), 0.5), m.x0.flatten(1), None, None)
    g = without(g.view(m.x0.shape), m.noise)
    return g / norms(g).amax() * norms(m.x0)


@dataclass
class Probe(Method):
    """Plain sampling; ``rows`` has the figures of each step.

    ``kept`` is the share of a push that the next clean prediction has kept along it, ``random`` that of a random direction
    of the same norm, off the score as well; ``passed`` what a first-order step passes on of a move of x0, relative to the
    part of x0 in the next sample. ``spread`` is the median distance of the predictions, scaled to norm 1; ``cfg`` the norm
    of the prediction with the prompt less that without, relative to the guided one.
    """

    again = True

    def begin(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.last: tuple[dict[str, Tensor], float, float] | None = None

    def move(self, m: Moment) -> Tensor | None:
        if self.last is not None:
            moves, alpha, sigma = self.last
            passed = m.alpha - m.sigma * alpha / sigma  # of x = alpha x0 + sigma noise with a moved x0
            for name, move in moves.items():
                change = m.denoise(m.x + passed * move) - m.x0
                self.rows[-1][name] = float((change * move).sum() / move.square().sum())
            self.rows[-1]["passed"] = passed / m.alpha
        unit = torch.nn.functional.normalize(m.x0.flatten(1), dim=1)
        apart = torch.cdist(unit, unit)[~torch.eye(len(unit), dtype=torch.bool)]
        row, cfg = {"spread": float(apart.median())}, m.guidance()
        if cfg is not None and m.given is not None:
            without_prompt = predict(m.scheduler, m.given + cfg.direction, m.timestep, m.x).x0
            row["cfg"] = float((without_prompt - m.x0).norm() / m.x0.norm())
        self.rows.append(row)
        move = PUSH * push(m)
        other = without(self.noise_like(m.x0), m.noise)
        self.last = {"kept": move, "random": other / norms(other) * norms(move)}, m.alpha, m.sigma
        return None


def kept_on(bed: Bed, cases: Sequence[Case]) -> dict[str, Any]:
    """Means and standard errors over cases of the figures of :class:`Probe`, for each step."""
    found: list[list[dict[str, float]]] = []
    for case in cases:
        probe = Probe()
        bed.sample(probe, case)
        found.append(probe.rows)
    out: dict[str, Any] = {"bed": bed.name, "steps": bed.steps, "cases": len(cases)}
    for name in ("kept", "random", "passed", "spread", "cfg"):
        values = np.array([[row[name] for row in rows if name in row] for rows in found])
        if values.size:
            error = values.std(0, ddof=1) / len(values) ** 0.5 if len(values) > 1 else 0 * values[0]
            out[name] = [[float(f"{v:.4g}") for v in pair] for pair in zip(values.mean(0), error, strict=True)]
    return out


@dataclass
class Pushed(Method):
    """The push of a setting at each step, and its share of classifier-free guidance, on any bed."""

    setting: Setting = VIVID
    steps: int = 1
    own: float = 1.0  # the pipeline's weight of classifier-free guidance

    def move(self, m: Moment) -> Tensor | None:
        s = self.setting
        size = fading(m.fraction, (0.0, s.stop)) if s.sizes is None else s.sizes[m.step]
        return s.scale * size * push(m) if s.scale * size > 1e-9 else None

    def weight_of(self, fraction: float) -> float | None:
        if self.setting.weight is not None:
            return self.setting.weight
        return 1 + (1.0 if self.setting.share is None else self.setting.share) * (self.own - 1)

    def _weighted(self, pipe: Any, call: Any, output: Tensor, prediction: Prediction, weight: float | None) -> Tensor:
        found = guidance_of(pipe, call, output, prediction)
        if found is None:
            return output
        if self.setting.by_spread is not None:
            added = -prediction.slope * found.direction
            x0 = prediction.x0 + (found.weight - 1) * added
            chosen = weight_by_spread(self.setting.by_spread, self.own, x0.flatten(1)[None], added.flatten(1)[None])
            weight = float(chosen)
        return super()._weighted(pipe, call, output, prediction, weight)


def measure(bed: Bed, setting: Setting, cases: list[Case]) -> dict[str, Any]:
    """The judge's figures of the cases of one block of seeds, by prompt."""
    if isinstance(bed, Analytic):
        return judged(bed, list(run(bed, cases, setting)), cases)
    method = Pushed(setting=setting, steps=bed.steps, own=bed.guidance_scale)
    return judged(bed, [bed.sample(method, case) for case in cases], cases)


def curve(about: dict[str, Any]) -> np.ndarray:
    """What is kept of a push more than of a random direction at each step, of what arrives; 0..1, smoothed by threes."""
    steps = about["steps"]
    more = [(k[0] - r[0]) / p[0] for k, r, p in zip(about["kept"], about["random"], about["passed"], strict=True)]
    more = np.array([*more, 0.0]) * (np.arange(steps) / steps < NEARLY_CLEAN)
    if steps > 8:
        more = np.convolve(np.pad(more, 1, mode="edge"), np.ones(3) / 3, "valid")
    return more.clip(0) / max(more.max(), 1e-9)


def window(kept: np.ndarray) -> tuple[float, float]:
    """Begin and end, as fractions of the run, of the steps with at least half of what is kept at most."""
    on = np.flatnonzero(kept >= 0.5)
    return float(on[0]) / len(kept), float(on[-1] + 1) / len(kept)


def schedules(about: dict[str, Any], stop: float = 0.65) -> dict[str, list[float]]:
    """Sizes of moves at each step: the fade of the package, and others by what is kept."""
    at = np.arange(about["steps"]) / about["steps"]
    kept = curve(about)
    first, last = window(kept)

    def fade(begin: float, end: float) -> list[float]:
        return [fading(float(f), (begin, end)) if begin - 1e-9 <= f < end - 1e-9 else 0.0 for f in at]

    return {
        FIXED: fade(0.0, stop),
        "fade to the end of the run": fade(0.0, 1.0),
        "constant where kept": [1.0 if first - 1e-9 <= f < last - 1e-9 else 0.0 for f in at],
        "fade from there on": fade(first, max(last, first + 1 / about["steps"])),
        "fade until then": fade(0.0, last),
        "by the share kept": kept.tolist(),
    }


def window_settings(name: str, about: dict[str, Any]) -> dict[str, Setting]:
    """Each schedule at each strength, in the order of strengths."""
    stop = 0.6 if name == DISTILLED else 0.65
    return {PLAIN: Setting()} | {
        f"{label}, scale {s:g}": Setting(scale=s, order=0.5, sizes=tuple(sizes))
        for label, sizes in schedules(about, stop).items()
        for s in STRENGTHS[name]
    }


def share_settings(name: str) -> dict[str, Setting]:
    """``vivid`` with lower weights and shares of the CFG, and with CFG that adds no more than a share of the spread."""
    about: dict[str, Any] = {"scale": VIVID.scale, "order": VIVID.order}
    found = {f"weight {w:g}": Setting(**about, weight=w) for w in LOWER[name]}
    found |= {f"share {s:g}": Setting(**about, share=s) for s in SHARES}
    if name in MIXTURES:
        found[f"by spread {BOUND:g}"] = Setting(**about, by_spread=BOUND)
    return {PLAIN: Setting()} | found


def changes(found: dict[str, Any]) -> dict[str, dict[str, np.ndarray]]:
    """Bootstrap draws of the changes of all settings against plain sampling."""
    figures, w, _ = joined(found)
    return {label: change(own, figures[PLAIN], w) for label, own in figures.items() if label != PLAIN}


def goal(c: dict[str, np.ndarray]) -> float:
    """Modes, less a penalty for quality or agreement lost beyond what counts as equal."""
    lost = max(0.0, -FIDELITY_LOSS - c["kept"][0]) + max(0.0, -FIDELITY_LOSS - c["agreement"][0])
    return float(c["modes"][0] - PENALTY * lost)


def chosen(c: dict[str, dict[str, np.ndarray]]) -> str:
    """The setting of the largest goal."""
    return max(c, key=lambda k: goal(c[k]))


def interval(draws: np.ndarray, sign: str = "") -> str:
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{draws[0]:{sign}.2f} [{low:{sign}.2f}, {high:{sign}.2f}]"


def kept_table(done: dict[str, Any]) -> str:
    """Shares kept at eight positions of a run."""
    rows, columns = [], [k / 8 for k in range(8)]
    for about in done.values():
        steps = about["steps"]

        def cells(name: str, over: str | None = None, about: dict = about, steps: int = steps) -> list[str]:
            made = []
            for f in columns:
                k = math.floor(f * steps + 1e-9)
                if ((f * steps) % 1 > 1e-9 and steps < 8) or k >= len(about.get(name, [])):
                    made.append("")
                    continue
                (value, error), by = about[name][k], about[over][k][0] if over else 1.0
                made.append(f"{value / by:.2f} ±{error / by:.2f}")
            return made

        rows.append([f"{about['bed']}, {steps} steps", "kept of a push", *cells("kept")])
        rows.append(["", "the same, of what arrives", *cells("kept", "passed")])
        rows.append(["", "a random direction, of what arrives", *cells("random", "passed")])
        rows.append(["", "spread", *cells("spread")])
        if "cfg" in about:
            rows.append(["", "with the prompt less without", *cells("cfg")])
    found = pages.table(["bed", "", *(f"{f:.0%}" if f else "start" for f in columns)], rows)
    windows = {done[n]["bed"]: window(curve(done[n])) for n in MIXTURES[1:] if n in done}
    lines = "; ".join(f"{bed}: {a:.0%} to {b:.0%}" for bed, (a, b) in windows.items())
    return f"{found}\n\nWhere a push keeps more than a random direction, by at least half of the most: {lines}."


def fronts(found: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of each schedule the gain at equal quality and agreement over its strengths."""
    by, c = {}, changes(found)
    for label in dict.fromkeys(label.rsplit(",", 1)[0] for label in c):
        points = [v for k, v in c.items() if k.rsplit(",", 1)[0] == label]
        gain, kept, agreement = (np.stack([p[k] for p in points], 1) for k in ("modes", "kept", "agreement"))
        by[label] = 1 + matched(gain - 1, np.minimum(kept, agreement))
    return by


def windows_table(done: dict[str, Any]) -> str:
    """Modes at equal quality and agreement of each schedule."""
    rows: dict[str, list[str]] = {}
    names = [n.removesuffix(" windows report") for n in done if n.endswith(" windows report")]
    for name in names:
        report = fronts(done[f"{name} windows report"])
        for label, draws in report.items():
            cell = f"x{interval(draws)}"
            if label != FIXED:
                cell += f"; {interval(draws - report[FIXED], '+')}"
            rows.setdefault(label, []).append(cell)
    return pages.table(["moves", *(done[f"{n} windows report"]["bed"] for n in names)], [[k, *v] for k, v in rows.items()])


def shares_table(done: dict[str, Any]) -> str:
    """Modes of weights and shares of the CFG at each of the pipeline's own weights, and where agreement is lost."""
    rows, columns = [], []
    for key, found in done.items():
        if not key.endswith(" shares report"):
            continue
        tune, report = done.get(key.replace("report", "tune")), changes(found)
        best = "" if tune is None else chosen(changes(tune))
        cells = {}
        for label, c in report.items():
            lost = "" if c["kept"][0] >= -FIDELITY_LOSS else ", worse"
            cell = f"x{c['modes'][0]:.2f}, {c['agreement'][0]:+.3f}{lost}"
            cells[label] = f"**{cell}**" if label == best else cell
        columns += [label for label in cells if label not in columns]
        rows.append((found["bed"], found["guidance_scale"], cells))
    columns.sort(key=lambda k: (not k.startswith("weight"), k.startswith("by"), float(k.split()[-1])))
    return pages.table(
        ["bed", "own weight", *columns], [[bed, f"{w:g}", *(c.get(k, "") for k in columns)] for bed, w, c in rows]
    )


def rules_table(done: dict[str, Any]) -> str:
    """The mean goal over the mixtures and their own weights, of one setting for all and of the best for each."""
    keys = [k.removesuffix("report") for k in done if k.endswith(" shares report")]
    keys = [k for k in keys if f"{k}tune" in done]
    tune, report = ([changes(done[k + half]) for k in keys] for half in ("tune", "report"))
    if not keys:
        return "(not measured)"
    rows = []
    for label in tune[0]:
        rows.append([label, *(f"{np.mean([goal(c[label]) for c in half]):.2f}" for half in (tune, report))])
        rows[-1].append(f"{min(goal(r[label]) - max(map(goal, r.values())) for r in report):+.2f}")
    best = [chosen(c) for c in tune]
    means = (np.mean([goal(c[k]) for c, k in zip(half, best, strict=True)]) for half in (tune, report))
    rows.append(["the best of each on the tuning half", *(f"{m:.2f}" for m in means)])
    rows[-1].append(f"{min(goal(r[k]) - max(map(goal, r.values())) for r, k in zip(report, best, strict=True)):+.2f}")
    return pages.table(["CFG", "goal, tuning half", "goal, report half", "most below the best of a bed"], rows)


def tables(kept: Path = KEPT, settings: Path = SETTINGS) -> dict[str, str]:
    """The tables of what has been measured."""
    none, parts = "(not measured)", {}
    parts["kept share"] = kept_table(json.loads(kept.read_text("utf-8"))) if kept.exists() else none
    done = json.loads(settings.read_text("utf-8")) if settings.exists() else {}
    parts["kept windows"] = windows_table(done) if done else none
    parts["cfg shares"] = shares_table(done) + "\n\n" + rules_table(done) if done else none
    return parts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kept", action="store_true", help="measure the share kept, on beds that have none yet")
    parser.add_argument("--windows", action="store_true", help="compare schedules; needs the shares kept")
    parser.add_argument("--shares", action="store_true", help="compare shares of classifier-free guidance")
    parser.add_argument("--beds", nargs="*", default=list(PROBED), choices=list(PROBED))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    done = json.loads(KEPT.read_text("utf-8")) if KEPT.exists() else {}
    for name in args.beds if args.kept else []:
        if name not in done:
            bed = BEDS[name]()
            done[name] = kept_on(bed, bed.cases("tune", PROBED[name]))
            with replacing(KEPT) as fresh:
                fresh.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
            print(name, flush=True)
    made = [("windows", n, None) for n in args.beds if args.windows and n in STRENGTHS]
    made += [("shares", n, w) for n in args.beds if args.shares and n in OWN for w in OWN[n]]
    for what, name, own in made:
        bed = BEDS[name]()
        bed.guidance_scale = bed.guidance_scale if own is None else own
        found = window_settings(name, done[name]) if what == "windows" else share_settings(name)
        called = name if own is None else f"{name} {own:g}"
        for half in ("tune", "report") if what == "shares" and name in MIXTURES else ("report",):
            measure_settings(
                SETTINGS, f"{called} {what} {half}", bed, half, args.seeds, found,
                lambda label, cases, bed=bed, found=found: measure(bed, found[label], cases),
            )  # fmt: skip
            print(called, what, half, flush=True)
    if args.page is not None:
        pages.fill(args.page, tables())


if __name__ == "__main__":
    main()
