"""Toward a style by few large early moves, at half of classifier-free guidance.

    python benchmarks/style_early.py    # measures what is missing
    python benchmarks/style_early.py --seeds 0 --page docs/toward-style.md    # only the table
    python benchmarks/style_early.py --seeds 0 --pictures docs                # a grid, to look at

Prompts, figures and seeds as in benchmarks/toward_style.py. The setting was chosen on the same prompts with four images of
another seed (50). Settings are measured in the order of the list, each seed of all that share a number of seeds in turn.
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
EARLY, HALF = {"scale": 6.0, "stop": 0.2}, {"cfg_share": 0.5}
LATER = {"scale": 2.0}
# name, settings of the guide, references, baseline, seeds
SETTINGS: list[tuple[str, dict[str, Any] | None, int, int, int]] = [
    ("early, half of CFG", EARLY | HALF, 96, 200, 2),
    ("early, half of CFG", EARLY | HALF, 16, 100, 2),
    ("early, half of CFG", EARLY | HALF, 96, 100, 2),
    ("plain, half of CFG", None, 0, 0, 2),
    ("plain", None, 0, 0, 2),
    ("early", EARLY, 96, 100, 1),
    ("half of CFG", LATER | HALF, 96, 100, 1),
]
LABELS = {  # in the order of the table
    "plain": "plain",
    "plain, half of CFG": "plain, `guidance_scale=3`",
    "half of CFG": "with a baseline, `cfg_share=0.5`",
    "early": "with a baseline, `stop=0.2`",
    "early, half of CFG": "with a baseline, `stop=0.2, cfg_share=0.5`",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2, help="at most, of each setting")
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--pictures", type=Path, metavar="FOLDER", help="write a grid into this folder")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    if options.seeds:
        measure(rows, options.seeds, options.json)
    if options.pictures:
        picture(options.pictures / "toward-emoji-early.png")
    if options.page:
        fill(options.page, {"style_early": early_table(rows)})


@torch.no_grad()
def measure(rows: list[dict[str, Any]], seeds: int, path: Path) -> None:
    """Add the seeds that rows lack, one row a setting and style; written after each."""
    bed = Emoji(pipe=load_demo_pipeline())
    everything = make_baseline(bed.pipe, n=200, batch_size=8, call=CALL)
    latents = {style: references(bed, style) for style in STYLES}
    turns = [(s, *setting) for s in range(seeds) for setting in SETTINGS if s < setting[-1]]
    for seed, name, settings, m, b, _ in sorted(turns, key=lambda turn: (-turn[-1], turn[0])):
        made: list[torch.Tensor] = []
        for style in STYLES:
            about = {"name": name, "style": style, "references": m, "baseline": b}
            row = next((row for row in rows if about == {k: row[k] for k in about}), None)
            if row is None:
                rows.append(row := about | {"scale": (settings or {}).get("scale"), "seeds": 0})
            if row["seeds"] > seed:
                continue
            guide = None if settings is None else MMDGuidance(latents[style][:m], baseline=everything[:b], **settings)
            clear(guide)
            if guide is not None or not made:  # without a guide the samples are the same for both styles
                bed.guidance_scale = 3.0 if name == "plain, half of CFG" else 5.0
                made = [samples(bed, guide, Case(prompt, 100 * seed + k), 8) for k, prompt in enumerate(PROMPTS)]
            row |= with_seed(row, figures(bed, style, made))
            print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
            path.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


@torch.no_grad()
def picture(path: Path) -> None:
    """Four images of four prompts from the same noises: plain, and toward both styles at scale 1 and by early moves."""
    bed = Emoji(pipe=load_demo_pipeline())
    baseline = make_baseline(bed.pipe, n=200, batch_size=8, call=CALL)
    guides: dict[str, MMDGuidance | None] = {"plain": None}
    for style in STYLES:
        latents, name = references(bed, style), style.split()[0].capitalize()
        guides[f"{name}, scale 1"] = MMDGuidance(latents, baseline=baseline)
        guides[f"{name}, early moves"] = MMDGuidance(latents, baseline=baseline, **EARLY, **HALF)
    panels = {}
    for label, guide in guides.items():
        made = [bed.decode(samples(bed, guide, Case(prompt, k), 4)) for k, prompt in enumerate(PROMPTS[:4])]
        panels[label] = [bed.pipe.image_processor.postprocess(x) for x in made]
    side_by_side(panels, PROMPTS[:4], "embedded model, toward two styles").quantize(128).save(path, optimize=True)


def early_table(rows: list[dict[str, Any]]) -> str:
    """A line for each setting, with a column for each style."""
    lines: dict[tuple[Any, ...], list[str]] = {}
    order = list(LABELS)
    for row in sorted(rows, key=lambda r: (order.index(r["name"]), r["references"], r["baseline"], r["style"])):
        if not row["seeds"]:
            continue
        error = f" ± {row['other_se']:.2f}" if row["seeds"] > 1 else ""
        cell = f"{row['other']:.2f}{error}, {row['valid']:.2f}, {row['different']:.1f}"
        numbers = (f"{row[k]:g}" if row[k] else "-" for k in ("scale", "references", "baseline"))
        lines.setdefault((LABELS[row["name"]], *numbers, str(row["seeds"])), []).append(cell)
    heads = [f"toward {style.split()[0].capitalize()}: other style, valid, different" for style in STYLES]
    return table(["", "scale", "references", "baseline", "seeds", *heads], [[*key, *cells] for key, cells in lines.items()])


if __name__ == "__main__":
    main()
