"""Toward a style by few large early moves, with all and with half of classifier-free guidance.

    python benchmarks/style_early.py    # measures what is missing
    python benchmarks/style_early.py --seeds 0 --page docs/toward-style.md    # only the table
    python benchmarks/style_early.py --seeds 0 --pictures docs                # grids, to look at

Figures and seeds as in benchmarks/toward_style.py, with its prompts and with seven others. The settings were chosen on its
prompts with another seed (50). Settings are measured in the order of the list, each seed of all that share their number in
turn.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arena.beds.base import Case
from benchmarks.arena.beds.emoji import Emoji
from benchmarks.pages import fill, table
from benchmarks.toward_style import CALL, PROMPTS, clear, figures, references, samples, with_seed
from kspec_guidance import MMDGuidance, load_demo_pipeline, make_baseline
from kspec_guidance.plotting import side_by_side

RESULTS = Path(__file__).parent / "results" / "style_early.json"
STYLES = ("noto style", "twemoji style")
OTHER_PROMPTS = (  # nothing was chosen on these
    "scientist", "construction worker", "vampire", "office worker", "factory worker", "technologist", "superhero",
)  # fmt: skip
OTHERS, LONGER = "other prompts", "20 steps"  # parts; without one, PROMPTS in 8 steps
EARLY, LARGE, HALF = {"scale": 3.0, "stop": 0.2}, {"scale": 6.0, "stop": 0.2}, {"cfg_share": 0.5}
FIRST, USUAL, LATER = {"scale": 3.0, "stop": 0.1}, {"scale": 1.0}, {"scale": 2.0}
# part, name, settings of the guide, references, baseline, seeds
SETTINGS: list[tuple[str | None, str, dict[str, Any] | None, int, int, int]] = [
    (None, "large, half of CFG", LARGE | HALF, 96, 200, 2),
    (None, "large, half of CFG", LARGE | HALF, 16, 100, 2),
    (None, "large, half of CFG", LARGE | HALF, 96, 100, 2),
    (None, "plain, half of CFG", None, 0, 0, 2),
    (None, "plain", None, 0, 0, 2),
    (None, "large", LARGE, 96, 100, 1),
    (None, "half of CFG", LATER | HALF, 96, 100, 1),
    (None, "early", EARLY, 16, 100, 2),
    (None, "early", EARLY, 96, 100, 2),
    (None, "early", EARLY, 96, 200, 2),
    (None, "first step", FIRST, 16, 100, 2),
    (None, "first step", FIRST, 96, 200, 2),
    (OTHERS, "plain", None, 0, 0, 2),
    (OTHERS, "early", EARLY, 16, 100, 2),
    (OTHERS, "early", EARLY, 96, 100, 2),
    (OTHERS, "usual", USUAL, 16, 100, 2),
    (OTHERS, "usual", USUAL, 96, 100, 2),
    (OTHERS, "large, half of CFG", LARGE | HALF, 16, 100, 2),
    (OTHERS, "large, half of CFG", LARGE | HALF, 96, 100, 2),
    (LONGER, "plain", None, 0, 0, 1),
    (LONGER, "early", EARLY, 16, 100, 1),
    (LONGER, "early", EARLY, 96, 100, 1),
    (LONGER, "usual", USUAL, 96, 100, 1),
]
LABELS = {  # in the order of the table
    "plain": "plain",
    "plain, half of CFG": "plain, `guidance_scale=3`",
    "usual": "with a baseline",
    "half of CFG": "with a baseline, `cfg_share=0.5`",
    "early": "with a baseline, `stop=0.2`",
    "first step": "with a baseline, `stop=0.1`",
    "large": "with a baseline, `stop=0.2`",
    "large, half of CFG": "with a baseline, `stop=0.2, cfg_share=0.5`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="at most, of each setting")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write the grids into this folder")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    if options.seeds:
        measure(rows, options.seeds, options.json)
    if options.pictures:
        pictures(options.pictures)
    if options.page:
        fill(options.page, {"style_early": early_table(rows)})


@torch.no_grad()
def measure(rows: list[dict[str, Any]], seeds: int, path: Path) -> None:
    """Add the seeds that rows lack, one row a setting and style; written after each."""
    pipe = load_demo_pipeline()
    beds = {part: Emoji(20 if part == LONGER else 8, pipe) for part in (None, OTHERS, LONGER)}
    latents = {style: references(beds[None], style) for style in STYLES}
    turns = [(s, *setting) for s in range(seeds) for setting in SETTINGS if s < setting[-1]]
    for seed, part, name, settings, m, b, _ in sorted(turns, key=lambda turn: (-turn[-1], turn[0])):
        bed, prompts = beds[part], OTHER_PROMPTS if part == OTHERS else PROMPTS
        made: list[torch.Tensor] = []
        for style in STYLES:
            about = {"part": part, "name": name, "style": style, "references": m, "baseline": b}
            row = next((row for row in rows if about == {k: row.get(k) for k in about}), None)
            if row is None:
                about = {k: v for k, v in about.items() if v is not None}
                rows.append(row := about | {"scale": (settings or {}).get("scale"), "seeds": 0})
            if row["seeds"] > seed:
                continue
            guide = None
            if settings is not None:
                own = make_baseline(pipe, n=200, batch_size=8, call=CALL | {"num_inference_steps": bed.steps})
                guide = MMDGuidance(latents[style][:m], baseline=own[:b], **settings)
            clear(guide)
            if guide is not None or not made:  # without a guide the samples are the same for both styles
                bed.guidance_scale = 3.0 if name == "plain, half of CFG" else 5.0
                made = [samples(bed, guide, Case(prompt, 100 * seed + k), 8) for k, prompt in enumerate(prompts)]
            row |= with_seed(row, figures(bed, style, made, prompts))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


@torch.no_grad()
def pictures(folder: Path) -> None:
    """A grid for each style: four images of four prompts from the same noises, plain and toward it in three ways."""
    bed = Emoji(pipe=load_demo_pipeline())
    baseline = make_baseline(bed.pipe, n=200, batch_size=8, call=CALL)
    for style in STYLES:
        latents, name = references(bed, style), style.split()[0]
        guides: dict[str, MMDGuidance | None] = {"plain": None} | {
            label: MMDGuidance(latents, baseline=baseline, **settings)
            for label, settings in (("scale 1", USUAL), ("early", EARLY), ("early, scale 6, less CFG", LARGE | HALF))
        }
        panels = {}
        for label, guide in guides.items():
            made = [bed.decode(samples(bed, guide, Case(prompt, k), 4)) for k, prompt in enumerate(PROMPTS[:4])]
            panels[label] = [bed.pipe.image_processor.postprocess(x) for x in made]
        grid = side_by_side(panels, PROMPTS[:4], f"embedded model, toward {name.capitalize()}")
        grid.quantize(128).save(folder / f"toward-emoji-early-{name}.png", optimize=True)


def early_table(rows: list[dict[str, Any]]) -> str:
    """A line for each setting, with a column for each style; a table for each part."""
    order, parts = list(LABELS), (None, OTHERS, LONGER)
    heads = [f"toward {style.split()[0].capitalize()}: other style, valid, different" for style in STYLES]
    tables = []
    for part in parts:
        lines: dict[tuple[Any, ...], list[str]] = {}
        own = [row for row in rows if row.get("part") == part and row["seeds"]]
        for row in sorted(own, key=lambda r: (order.index(r["name"]), r["references"], r["baseline"], r["style"])):
            error = f" ± {row['other_se']:.2f}" if row["seeds"] > 1 else ""
            cell = f"{row['other']:.2f}{error}, {row['valid']:.2f}, {row['different']:.1f}"
            numbers = (f"{row[k]:g}" if row[k] else "-" for k in ("scale", "references", "baseline"))
            lines.setdefault((LABELS[row["name"]], *numbers, str(row["seeds"])), []).append(cell)
        if lines:
            found = table(
                ["", "scale", "references", "baseline", "seeds", *heads], [[*key, *cells] for key, cells in lines.items()]
            )
            tables.append(f"*{part}*:\n\n{found}" if part else found)
    return "\n\n".join(tables)


if __name__ == "__main__":
    main()
