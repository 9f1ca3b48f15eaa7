"""A grid of images of the same prompts and seeds by several methods.

python -m benchmarks.arena.images
python -m benchmarks.arena.images --bed emoji-transformer-distilled --out docs/arena-pictures-distilled.png \
    --methods plain SPELL DiverseFlow "group inference" "SPARKE, ours" "SPARKE, ours, order 0.5"
"""

import argparse
import json
from pathlib import Path

import torch
from PIL import Image

from kspec_guidance.bench.methods import METHODS
from kspec_guidance.plotting import side_by_side

from .beds import BEDS
from .beds.base import Case
from .harness import slug

ROOT = Path(__file__).parents[2]
EMOJI = ["firefighter", "student", "smiling face", "vehicle"]
SHOWN = {  # prompts, and images of each
    "emoji": (EMOJI, 6), "emoji-transformer": (EMOJI, 4), "emoji-transformer-distilled": (EMOJI, 4),
    "digits-4": (["digit 2", "digit 5", "digit 7"], 6),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bed", default="emoji", choices=list(SHOWN))
    parser.add_argument(
        "--methods",
        nargs="+",
        default=["plain", "interval CFG", "OSCAR", "SPARKE, ours, order 0.5", "SPARKE, ours, order 0.5, lower CFG"],
    )
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "arena")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "arena-pictures.png")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    bed, (prompts, columns) = BEDS[args.bed](), SHOWN[args.bed]
    path = args.results / f"{slug(bed.name)}.json"
    tuned = json.loads(path.read_text())["methods"] if path.exists() else {}
    panels = {}
    for name in args.methods:
        settings, grid = tuned.get(name, {}).get("tuned", {}), []
        for prompt in prompts:
            x = bed.decode(bed.sample(METHODS[name](**settings), Case(prompt, 10_000)))
            x = x.expand(-1, 3, -1, -1) if x.shape[1] == 1 else x
            images = [Image.fromarray(((i.permute(1, 2, 0) / 2 + 0.5) * 255).byte().numpy()) for i in x]
            grid.append(images[:columns])
        panels[name] = grid
    side_by_side(panels, prompts, f"{bed.name}: the same prompts and seeds, each method as tuned", tile=72).save(args.out)


if __name__ == "__main__":
    main()
