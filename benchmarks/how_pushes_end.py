"""How should a push end? On a fixed schedule, or image by image, once it is far enough from the others.

    python benchmarks/how_pushes_end.py --beds emoji-transformer-distilled --sets tune further
    python benchmarks/how_pushes_end.py --page docs/arena/ablations.md   # the tables of what has been measured

One direction, conditional entropy of order 0.5, with three sizes. *Until apart*: 0.8 of what is missing to a distance
(``apart=``), in the first 35% of the run, as the preset ``faithful``. *Constant*: as large for all images, in the same
steps. *Fading*: the largest bounded, and fading to 65% of the run, as the preset ``vivid``. Sets: the prompts of tuning;
further ones, on which nothing was chosen. Results are kept for each setting and block of five seeds.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Case
from benchmarks.easing import PLAIN, judged, measure_settings
from benchmarks.strength_units import compared, heading, label
from kspec_guidance import SPARKE, KernelGuidance, VendiGuidance
from kspec_guidance.bench.methods.guides import Guided

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "arena" / "how_pushes_end.json"
NAMES = ("emoji-transformer-distilled", "emoji-transformer", "emoji")
SETS = {"tune": ("tune", False, 60_000), "further": ("report", True, 70_000)}  # seeds that no other result has
APART = "until apart"
STRENGTHS = {APART: (0.6, 0.9, 1.3), "constant": (0.2, 0.4, 0.7), "fading": (0.5, 1.0, 1.5)}


@dataclass
class Ending(Guided):
    """The push of order 0.5 with one of the sizes; with a strength of 0 plain sampling."""

    size: str = "fading"
    amount: float = 0.0

    def guide(self, pipe: Any) -> KernelGuidance:
        if self.size == APART and self.amount:
            return SPARKE.preset("faithful", apart=self.amount)
        if self.size == "constant":
            stop = SPARKE.PRESETS["faithful"]["stop"]
            return VendiGuidance(self.amount, stop=stop, order=0.5, transforms=("tangent", "off_score", "rescale"))
        return VendiGuidance(self.amount, order=0.5)


def measure(name: str, which: str, seeds: int, out: Path) -> None:
    """Figures of all sizes and strengths on one set of prompts of a bed."""
    bed: Any = BEDS[name]()
    half, bed.fresh, first = SETS[which]
    bed.cases = lambda half, n: [Case(p, first + s) for s in range(n) for p in bed.prompts(half)]
    settings = {PLAIN: Ending()} | {
        label(k, s): Ending(size=k, amount=s) for k, values in STRENGTHS.items() for s in values
    }

    def measured(name: str, cases: list[Case]) -> dict[str, Any]:
        return judged(bed, [bed.sample(settings[name], case) for case in cases], cases)

    measure_settings(out, f"{name} {which}", bed, half, seeds, settings, measured)


def tables(path: Path = OUT) -> str:
    """The tables of what has been measured: gains at equal quality, and those that keep agreement too."""
    done, texts = json.loads(path.read_text("utf-8")) if path.exists() else {}, {size: size for size in STRENGTHS}
    found = [
        compared(heading(k, v), v, APART, f"less {APART}", texts, agreed)
        for k, v in done.items()
        for agreed in (False, True)
    ]
    return "\n\n".join(found) or "(not measured)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=[], choices=NAMES)
    parser.add_argument("--sets", nargs="*", default=["further"], choices=list(SETS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in args.beds:
        for which in args.sets:
            measure(name, which, args.seeds, args.out)
    print(tables(args.out))
    if args.page is not None:
        pages.fill(args.page, {"how pushes end": tables(args.out)})


if __name__ == "__main__":
    main()
