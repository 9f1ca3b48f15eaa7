"""Units of strength: does it pay to scale a push by something else than the norm of the prediction?

    python benchmarks/strength_units.py --beds mixture-8 --sets tune     # all units, on the prompts of tuning
    python benchmarks/strength_units.py --beds emoji-transformer-distilled --sets tune --units spread rms change kept
    python benchmarks/strength_units.py --beds emoji-transformer --sets tune --units change cfg
    python benchmarks/strength_units.py --beds emoji-transformer-distilled --sets again --units change
    python benchmarks/strength_units.py --beds mixture-8 --sets further --seeds 2 --units spread distance rms change
    python benchmarks/strength_units.py --mixtures                       # the unit "spread", beside less guidance too
    python benchmarks/strength_units.py --page docs/arena/ablations.md   # the tables of what has been measured

One push, that of the guide's default (order 2 at half the median distance, off the score, the largest bounded, fading to
65% of the run), in several units. Each is scaled so that on plain samples it has the mean of the norm; so one strength is
a push of the same mean size, and units differ in how they share it among prompts, samples and steps. Sets: the prompts of
tuning; ``again``, the same with other seeds; ``further``, prompts on which nothing was chosen, with seeds that no
other result has. The best strength of each prompt, chosen on one set of seeds and measured on the other, tells what any
unit that tells prompts apart could gain. Results are kept for each setting and block of five seeds.
"""

import argparse
import itertools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.batched import Setting, run
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Bed, Case
from benchmarks.arena.harness import FIDELITY_LOSS, PENALTY
from benchmarks.arena.quality import change
from benchmarks.easing import PLAIN, joined, judged, measure_settings
from kspec_guidance.bench.fronts import against, at_gain, matched
from kspec_guidance.bench.methods.base import Method, Moment, norms, without
from kspec_guidance.guidance.run import ascent_direction
from kspec_guidance.guidance.transforms import fading
from kspec_guidance.loop.prediction import predict
from kspec_guidance.objectives import RKE

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "arena" / "strength_units.json"
DISTILLED, TRANSFORMER = "emoji-transformer-distilled", "emoji-transformer"
NAMES = (DISTILLED, TRANSFORMER, "mixture-8")
STOP = 0.65
# around the strength of the largest gain of the norm
STRENGTHS = {DISTILLED: (0.3, 0.6, 1.0, 1.6), TRANSFORMER: (0.5, 0.9, 1.4), "mixture-8": (2.0, 4.0, 7.0, 12.0)}
BATCHED = ("mixture-8", "mixture-32", "mixture-64")
SCALES = {
    "norm": (1.0, 2.0, 2.8, 4.0, 7.0, 12.0),
    "spread": (50.0, 100.0, 140.0, 200.0, 280.0, 400.0, 800.0),
}  # the latter as varieties
GUIDES = ((2.0, 3.0), (0.5, 1.5))  # orders of the entropy, and weights of classifier-free guidance
# half of the bed's prompts, whether they are further ones, and the first seed
SETS = {"tune": ("tune", False, 0), "again": ("tune", False, 500), "further": ("report", True, 20_000)}
TYPICAL = 0.25  # share of a push that the distilled transformer keeps where it keeps most


@dataclass
class Step:
    """A step as units see it: its moment, the clean predictions before the last push, and that push."""

    moment: Moment
    last: Tensor | None = None
    push: Tensor | None = None

    @property
    def norm(self) -> Tensor:
        """Norms of the clean predictions ``[n, 1, ...]``."""
        return norms(self.moment.x0)

    def apart(self) -> Tensor:
        """Median distance of the clean predictions, scaled to norm 1."""
        unit = torch.nn.functional.normalize(self.moment.x0.flatten(1), dim=1)
        return torch.cdist(unit, unit)[~torch.eye(len(unit), dtype=torch.bool)].median()

    def rms(self) -> Tensor:
        """Root mean square of the clean predictions' distances from their mean."""
        x0 = self.moment.x0
        return (x0 - x0.mean(0)).flatten(1).square().sum(1).mean().sqrt()

    def change(self) -> Tensor:
        """Norms ``[n, 1, ...]`` of what the prediction has changed by since the last step."""
        return self.norm if self.last is None else norms(self.moment.x0 - self.last)

    def kept(self) -> Tensor:
        """A factor ``[n, 1, ...]``: 1 for a sample of which nothing of the last push is left, up to 2, down to 0.25."""
        if self.push is None or self.last is None:
            return torch.ones_like(self.norm)
        share = ((self.moment.x0 - self.last) * self.push).flatten(1).sum(1) / self.push.flatten(1).square().sum(1)
        return (1 + share / TYPICAL).clamp(0.25, 2).view(self.norm.shape)

    def guidance(self) -> Tensor:
        """Norms ``[n, 1, ...]`` of the prediction with the prompt less that without."""
        m, cfg = self.moment, self.moment.guidance()
        assert cfg is not None
        assert m.given is not None
        return norms(predict(m.scheduler, m.given + cfg.direction, m.timestep, m.x).x0 - m.x0)


@dataclass(frozen=True)
class Unit:
    """A unit of strength.

    Attributes:
        text: in tables.
        size: of a step, broadcastable to the samples.
        first: whether it has a value at the first step; if not, the norm is taken there.
        guided: whether it needs classifier-free guidance.
        each: whether each sample moves by the unit, in place of the one with the largest gradient, the others by theirs.
    """

    text: str
    size: Callable[[Step], Tensor]
    first: bool = True
    guided: bool = False
    each: bool = False


NORM = "norm"
UNITS = {
    NORM: Unit("norm of the prediction", lambda s: s.norm),
    "each": Unit("norm, each sample as far", lambda s: s.norm, each=True),
    "spread": Unit("norm, times the squared median distance (`unit=\"spread\"`)", lambda s: s.norm * s.apart().square()),
    "distance": Unit("norm, times the median distance", lambda s: s.norm * s.apart()),
    "inverse": Unit("norm, over the median distance", lambda s: s.norm / s.apart().clamp_min(1e-3)),
    "rms": Unit("root mean square deviation from the batch's mean", lambda s: s.rms()),
    "norm, rms": Unit("geometric mean of that and the norm", lambda s: (s.norm * s.rms()).sqrt()),
    "change": Unit("change of the prediction since the last step", lambda s: s.change(), first=False),
    "norm, change": Unit("geometric mean of that and the norm", lambda s: (s.norm * s.change()).sqrt(), first=False),
    "kept": Unit("norm, times what the sample kept of its last push", lambda s: s.norm * s.kept()),
    "cfg": Unit("what classifier-free guidance adds", lambda s: s.guidance(), guided=True),
    "norm, cfg": Unit("geometric mean of that and the norm", lambda s: (s.norm * s.guidance()).sqrt(), guided=True),
}  # fmt: skip


@dataclass
class InUnit(Method):
    """The push of the guide's default with a strength in one unit.

    ``factor`` scales the unit; with a strength of 0 nothing moves, and ``sizes`` has the sums over the run of the fading
    unit and of the fading norm, from which :func:`factor_of` is made.
    """

    unit: str = NORM
    scale: float = 1.0
    factor: float = 1.0
    sizes: list[float] = field(default_factory=lambda: [0.0, 0.0], repr=False)

    def begin(self) -> None:
        self.last: tuple[Tensor, Tensor | None] | None = None

    def push(self, m: Moment) -> Tensor:
        """The direction in which samples are pushed, of any size."""
        g, _ = ascent_direction(RKE(), m.x0.flatten(1), None, None, seed=m.step)
        return without(g.view(m.x0.shape), m.noise)

    def move(self, m: Moment) -> Tensor | None:
        unit, fade = UNITS[self.unit], fading(m.fraction, (0.0, STOP))
        if m.fraction >= STOP - 1e-9:
            return None
        step = Step(m, *(self.last or ()))
        known = unit.first or self.last is not None
        size = unit.size(step) * self.factor if known else step.norm
        if known:
            self.sizes[0] += fade * float(size.mean())
            self.sizes[1] += fade * float(step.norm.mean())
        if not self.scale:
            self.last = m.x0, None
            return None
        g = self.push(m)
        move = self.scale * fade * size * g / (norms(g) if unit.each else norms(g).amax())
        self.last = m.x0, move
        return move


def factor_of(bed: Bed, unit: str, cases: list[Case]) -> float:
    """The factor at which a unit has the mean of the norm, over the guided steps of plain sampling as they fade."""
    method = InUnit(unit=unit, scale=0.0)
    for case in cases:
        bed.sample(method, case)
    return method.sizes[1] / method.sizes[0]


def label(unit: str, strength: float) -> str:
    return f"{unit} {strength:g}"


def measure(name: str, which: str, units: list[str], seeds: int, out: Path) -> None:
    """Figures of units at all strengths of a bed on one set of cases."""
    bed: Any = BEDS[name]()
    half, bed.fresh, first = SETS[which]
    tune = [Case(p, first) for p in bed.prompts("tune")]
    bed.cases = lambda half, n: [Case(p, first + s) for s in range(n) for p in bed.prompts(half)]
    done = json.loads(out.read_text("utf-8")) if out.exists() else {}
    factors = done.setdefault("factors", {}).setdefault(name, {})
    for unit in units:
        if unit not in factors:
            factors[unit] = float(f"{factor_of(bed, unit, tune):.4g}")
    out.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
    settings = {PLAIN: InUnit(scale=0.0)}
    settings |= {label(u, s): InUnit(unit=u, scale=s, factor=factors[u]) for u in units for s in STRENGTHS[name]}

    def measured(name: str, cases: list[Case]) -> dict[str, Any]:
        return judged(bed, [bed.sample(settings[name], case) for case in cases], cases)

    measure_settings(out, f"{name} {which}", bed, half, seeds, settings, measured)


def measure_batched(name: str, order: float, weight: float, seeds: int, out: Path) -> str:
    """Figures of the norm and of the unit ``spread`` on further prompts of a mixture; the name of their place."""
    bed: Any = BEDS[name]()
    half, bed.fresh, first = SETS["further"]
    bed.cases = lambda half, n: [Case(p, first + s) for s in range(n) for p in bed.prompts(half)]
    bed.name = f"{bed.name}, order {order:g}, CFG {weight:g}"
    about: dict[str, Any] = {"order": order, "weight": None if weight == bed.guidance_scale else weight}
    settings = {PLAIN: Setting()} | {label("norm", s): Setting(scale=s, **about) for s in SCALES["norm"]}
    settings |= {label("spread", s): Setting(variety=s, **about) for s in SCALES["spread"]}
    place = f"{name}, order {order:g}, CFG {weight:g} further"
    measure_settings(
        out, place, bed, half, seeds, settings,
        lambda label, cases: judged(bed, list(run(bed, cases, settings[label])), cases),
    )  # fmt: skip
    return place


def fronts(found: dict[str, Any]) -> tuple[dict[str, list[dict[str, np.ndarray]]], int]:
    """The changes against plain sampling of each unit's settings from weak to strong; and the number of seeds."""
    figures, w, seeds = joined(found)
    by: dict[str, list[tuple[float, str]]] = {}
    for name in figures:
        if name != PLAIN:
            unit, strength = name.rsplit(" ", 1)
            by.setdefault(unit, []).append((float(strength), name))
    return {u: [change(figures[k], figures[PLAIN], w) for _, k in sorted(points)] for u, points in by.items()}, seeds


def compared(
    title: str, found: dict[str, Any], reference: str, less: str, texts: dict[str, str], agreed: bool = False
) -> str:
    """Gains at equal quality of a bed's settings, and those less the gain of one of them.

    Args:
        title: of the table.
        found: the bed's results.
        reference: the name of that one.
        less: head of the column of differences.
        texts: of the names.
        agreed: whether gains keep agreement with the prompt too.
    """
    gains, agreement = {}, {}
    for name, points in fronts(found)[0].items():
        gain, kept, agrees = (np.stack([p[k] for p in points], 1) for k in ("modes", "kept", "agreement"))
        kept = np.minimum(kept, agrees) if agreed else kept
        gains[name] = matched(gain - 1, kept)
        agree = np.concatenate([[0.0], agrees[0]])
        agreement[name] = at_gain(gain[0] - 1, kept[0], agree, gains[name][0])
    differences, rows = against(gains, reference), []
    for name, g in gains.items():
        low, high = np.quantile(g, [0.025, 0.975])
        cells = [f"{g[0]:+.0%} [{low:+.0%}, {high:+.0%}]", ""]
        if name in differences:
            d, below, above, _ = differences[name]
            cells[1] = f"{-d:+.0%} [{-above:+.0%}, {-below:+.0%}]"
        rows.append([texts[name], *cells, f"{agreement[name]:+.3f}"])
    gained = "gain at equal quality and agreement" if agreed else "gain at equal quality"
    return pages.table([title, gained, less, "agreement there"], rows)


def heading(name: str, found: dict[str, Any]) -> str:
    """Title of a table: bed, set of prompts, and their numbers."""
    return f"{found['bed']}, {name.rsplit(' ', 1)[-1]}: {len(found['prompts'])} prompts, {fronts(found)[1]} seeds"


def table(name: str, found: dict[str, Any]) -> str:
    """Gains at equal quality of the units of one bed and set, and those less the norm's."""
    return compared(heading(name, found), found, NORM, "less the norm's", {k: u.text for k, u in UNITS.items()})


Figures = list[dict[str, np.ndarray]]  # of each setting, by block


def goal(figures: Figures, chosen: list[int]) -> tuple[float, float, float]:
    """The goal of tuning where each prompt has a setting of its own, relative modes, and the quality kept.

    The first setting is plain sampling.
    """
    rows = np.arange(len(figures[0]["modes"]))
    of_block = np.array(chosen)[rows % len(chosen)]
    mixed = {k: np.stack([f[k] for f in figures])[of_block, rows] for k in figures[0]}
    c = change(mixed, figures[0], np.full((1, len(rows)), 1 / len(rows)))
    modes, kept = float(c["modes"][0]), float(c["kept"][0])
    return modes - PENALTY * max(0.0, -FIDELITY_LOSS - kept), modes, kept


def best_for_all(figures: Figures, prompts: int) -> list[int]:
    """The one setting for all prompts of the largest goal."""
    return max(([k] * prompts for k in range(len(figures))), key=lambda c: goal(figures, c)[0])


def best_for_each(figures: Figures, prompts: int) -> list[int]:
    """The setting of each prompt of the largest goal, by coordinate ascent from each setting for all."""
    ends = []
    for begin in range(len(figures)):
        chosen, value = [begin] * prompts, -math.inf
        while goal(figures, chosen)[0] > value + 1e-12:
            value = goal(figures, chosen)[0]
            for p in range(prompts):
                tries = [[*chosen[:p], k, *chosen[p + 1 :]] for k in range(len(figures))]
                chosen = max(tries, key=lambda c: goal(figures, c)[0])
        ends.append(chosen)
    return max(ends, key=lambda c: goal(figures, c)[0])


def prompts_table(done: dict[str, Any]) -> str:
    """One strength for all prompts and the best of each, in the norm, chosen on each of two sets of seeds."""
    rows = []
    for name in NAMES:
        found = [done[k] for k in (f"{name} tune", f"{name} again") if k in done]
        if len(found) < 2:
            continue
        sets: list[Figures] = []
        for f in found:
            own = {m: v for m, v in f["settings"].items() if m == PLAIN or m.rsplit(" ", 1)[0] == NORM}
            figures, _, _ = joined({**f, "settings": own})
            sets.append([figures[PLAIN], *(v for m, v in figures.items() if m != PLAIN)])
        n = len(found[0]["prompts"])
        for text, choose in (("one for all prompts", best_for_all), ("the best of each prompt", best_for_each)):
            goals = [(goal(a, choose(a, n)), goal(b, choose(a, n))) for a, b in (sets, sets[::-1])]
            for seeds, values in zip(("the same seeds", "other seeds"), np.mean(goals, 0), strict=True):
                g, modes, kept = values
                rows.append([found[0]["bed"], text, seeds, f"{g:.2f}", f"x{modes:.2f}", f"{kept:+.3f}"])
    return pages.table(["bed", "strength", "on", "goal", "modes", "quality kept"], rows) if rows else "(not measured)"


def tables(path: Path = OUT) -> dict[str, str]:
    """The tables of what has been measured."""
    done = json.loads(path.read_text("utf-8")) if path.exists() else {}
    found = [table(k, v) for k, v in done.items() if k != "factors"]
    return {"strength units": "\n\n".join(found) or "(not measured)", "strength of each prompt": prompts_table(done)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--sets", nargs="*", default=[], choices=list(SETS))
    parser.add_argument("--units", nargs="*", default=list(UNITS), choices=list(UNITS))
    parser.add_argument("--mixtures", action="store_true", help='the unit "spread" on further prompts of three mixtures')
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in args.beds if args.sets else []:
        units = [u for u in args.units if not UNITS[u].guided or name != DISTILLED]
        for which in args.sets:
            measure(name, which, [NORM, *(u for u in units if u != NORM)], args.seeds, args.out)
            print(tables(args.out)["strength units"].split("\n\n")[-1], flush=True)
    for name, (order, weight) in itertools.product(BATCHED, GUIDES) if args.mixtures else ():
        place = measure_batched(name, order, weight, args.seeds, args.out)
        print(table(place, json.loads(args.out.read_text("utf-8"))[place]), flush=True)
    if args.sets:
        print(prompts_table(json.loads(args.out.read_text("utf-8"))))
    if args.page is not None:
        pages.fill(args.page, tables(args.out))


if __name__ == "__main__":
    main()
