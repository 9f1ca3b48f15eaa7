"""Do a model's own samples over many prompts shape pushes for the better? On the arena's distilled transformer.

    python benchmarks/own_samples.py --sets tune further
    python benchmarks/own_samples.py --page docs/arena/ablations.md   # the table of what has been measured

The push of the guide's default, changed by a baseline: about 300 samples without guidance of other prompts than the one
that is sampled. *Along what varies*: its principal directions are weighed by the root of the standard deviation of the
baseline along them. *Not toward others*: the part that leads from the prompt's mean prediction toward the ten nearest
samples of the baseline is taken out. Sets: the prompts of tuning; further ones. Results are kept for each setting and
block of five seeds.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Bed, Case
from benchmarks.arena.beds.emoji import REPORT, TUNE
from benchmarks.easing import PLAIN, judged, measure_settings
from benchmarks.strength_units import DISTILLED, InUnit, compared, heading, label
from kspec_guidance.bench.methods.base import Moment
from kspec_guidance.demo.pipeline import DEMO_PROMPTS

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "arena" / "own_samples.json"
STRENGTHS = (0.6, 1.0, 1.6)
SETS = {"tune": ("tune", False, 40_000), "further": ("report", True, 50_000)}  # seeds that no other result has
OWN_SEED, EACH, NEAREST = 90_000, 8, 10
PARTS = {  # whether directions are weighed, and samples of others avoided
    "as it is": (False, False), "along what varies": (True, False), "not toward others": (False, True),
    "both": (True, True),
}  # fmt: skip
OF_SET = {"tune": tuple(PARTS), "further": ("as it is", "both")}


class Baseline:
    """Samples without guidance ``[b, d]``.

    Args:
        rows: ``[b, d]``.
    """

    def __init__(self, rows: Tensor):
        self.rows = rows
        _, deviations, directions = torch.linalg.svd(rows - rows.mean(0), full_matrices=False)
        self.directions, self.weights = directions, (deviations / deviations[0]).sqrt()

    def weighed(self, g: Tensor) -> Tensor:
        """Rows ``[n, d]`` with their principal directions weighed."""
        return g @ self.directions.mT * self.weights @ self.directions

    def not_toward(self, move: Tensor, mean: Tensor) -> Tensor:
        """Moves ``[n, d]`` of samples with this mean ``[d]`` less what leads to the samples nearest to it, one by one."""
        for k in (self.rows - mean).norm(dim=1).topk(NEAREST, largest=False).indices:
            away = torch.nn.functional.normalize(mean - self.rows[k], dim=0)
            move = move - (move @ away).clamp_max(0)[:, None] * away
        return move


@dataclass
class Shaped(InUnit):
    """The push of the guide's default, shaped by a baseline; with a strength of 0 plain sampling."""

    weigh: bool = False
    avoid: bool = False
    baseline: Baseline | None = None

    def push(self, m: Moment) -> Tensor:
        g = super().push(m)
        if not self.weigh:
            return g
        assert self.baseline is not None
        return self.baseline.weighed(g.flatten(1)).view(g.shape)

    def move(self, m: Moment) -> Tensor | None:
        move = super().move(m)
        if move is None or not self.avoid:
            return move
        assert self.baseline is not None
        return self.baseline.not_toward(move.flatten(1), m.x0.flatten(1).mean(0)).view(move.shape)


def own_samples(bed: Bed) -> dict[str, Tensor]:
    """Rows ``[8, d]`` of plain sampling for each prompt that a baseline may have."""
    prompts = dict.fromkeys([*DEMO_PROMPTS, *TUNE, *REPORT])
    return {p: bed.run(Case(p, OWN_SEED), EACH).flatten(1) for p in prompts}


def measure(which: str, seeds: int, out: Path) -> None:
    """Figures of the parts at all strengths on one set of prompts."""
    bed: Any = BEDS[DISTILLED]()
    half, bed.fresh, first = SETS[which]
    bed.cases = lambda half, n: [Case(p, first + s) for s in range(n) for p in bed.prompts(half)]
    own = own_samples(bed)
    baselines = {p: Baseline(torch.cat([x for q, x in own.items() if q != p])) for p in bed.prompts(half)}
    settings = {PLAIN: (0.0, False, False)} | {label(p, s): (s, *PARTS[p]) for p in OF_SET[which] for s in STRENGTHS}

    def measured(name: str, cases: list[Case]) -> dict[str, Any]:
        scale, weigh, avoid = settings[name]
        made = [bed.sample(Shaped(scale=scale, weigh=weigh, avoid=avoid, baseline=baselines[c.prompt]), c) for c in cases]
        return judged(bed, made, cases)

    measure_settings(out, which, bed, half, seeds, settings, measured)


def tables(path: Path = OUT) -> str:
    """The tables of what has been measured."""
    done = json.loads(path.read_text("utf-8")) if path.exists() else {}
    texts = {part: part for part in PARTS}
    found = [compared(heading(k, v), v, "as it is", "less the push as it is", texts) for k, v in done.items()]
    return "\n\n".join(found) or "(not measured)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", nargs="*", default=[], choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for which in args.sets:
        measure(which, args.seeds, args.out)
    print(tables(args.out))
    if args.page is not None:
        pages.fill(args.page, {"own samples": tables(args.out)})


if __name__ == "__main__":
    main()
