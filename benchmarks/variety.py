"""What one variety does on different models, without and with a calibration, beside one scale relative to the norm.

    python benchmarks/variety.py --out benchmarks/results/variety.json --page docs/variety.md
    python benchmarks/variety.py --picture docs/variety.png    # only the picture, of the embedded pipeline
    python benchmarks/variety.py --targets --page docs/variety.md    # only the targets, on the embedded pipeline
    python benchmarks/variety.py --windows    # only variety 50 with shorter guided intervals
    python benchmarks/variety.py --families    # only moves of tiny pipelines of random weights

On every bed of the arena: the effective number of different images of a prompt (RKE of the finished samples, Gaussian
kernel of bandwidth 0.5), the modes and the share of valid samples, against plain sampling of the same noise. Prompts are
those of the report half; calibrations use two prompts of the tuning half.

Targets: batches of one prompt with one guide, and after each its strength; the share of valid images is that of the judge
of the emoji bed, which is also the guard of one of the columns.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.beds import BEDS, Bed, Case
from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance import functional as F
from kspec_guidance.calibration import search_factor
from kspec_guidance.evaluation.judges import demo_judge
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel, l2_normalize
from kspec_guidance.plotting import image_grid

KERNEL = GaussianKernel(IMAGE_BANDWIDTH)
VARIETIES = (25, 50, 75, 100)
TARGET, BATCHES, LAST = "5 of 8", 6, 3
TARGET_PROMPTS = ("person", "farmer", "building", "heart", "flower", "vehicle", "qwxz blorp")  # the last one is unknown
WINDOWS = (0.65, 0.5, 0.35)  # ends of the guided interval
FAMILIES = ("StableDiffusion", "StableDiffusionXL", "StableDiffusion3", "Flux", "PixArtAlpha")


def unit_rows(x: Tensor) -> Tensor:
    return l2_normalize(x.flatten(1).double())


def sample(bed: Bed, case: Case, guide: SPARKE) -> Tensor:
    with guide.attach(bed.pipe):
        return bed.run(case, bed.images)


def measure(bed: Bed, cases: list[Case], make: Callable[[], SPARKE]) -> dict[str, float]:
    """Means over the cases, each with a new guide."""
    found = []
    for case in cases:
        x = sample(bed, case, make())
        figures = bed.judge(x, case)
        found.append([float(F.rke_score(unit_rows(x), KERNEL)), figures[bed.diversity], figures[bed.fidelity]])
    different, modes, valid = torch.tensor(found, dtype=torch.float64).mean(0).tolist()
    return {"different": different, "modes": modes, "valid": valid}


def factor_of(bed: Bed) -> float:
    """The factor of a calibration with two prompts of the tuning half."""
    cases = bed.cases("tune", 1)[:2]

    def alike(factor: float) -> float:
        total = 0.0
        for case in cases:
            guide = SPARKE(variety=50 if factor else 0)
            guide.calibration = factor
            total += 1 / float(F.rke_score(unit_rows(sample(bed, case, guide)), KERNEL, unbiased=True))
        return total / len(cases)

    return search_factor(alike)[0]


def guide_with(variety: float, factor: float = 1.0) -> SPARKE:
    guide = SPARKE(variety=variety)
    guide.calibration = factor
    return guide


def run_bed(name: str, prompts: int) -> dict[str, Any]:
    bed = BEDS[name]()
    cases, factor = bed.cases("report", 1)[:prompts], factor_of(bed)
    rows = {"plain": measure(bed, cases, lambda: guide_with(0))}
    rows["scale 1"] = measure(bed, cases, lambda: SPARKE(1.0))
    for variety in VARIETIES:
        rows[f"variety {variety}"] = measure(bed, cases, lambda v=variety: guide_with(v))
    rows["variety 50, calibrated"] = measure(bed, cases, lambda: guide_with(50, factor))
    return {"bed": bed.name, "factor": factor, "prompts": len(cases), "rows": rows}


def table(results: list[dict[str, Any]]) -> str:
    shown = ["scale 1", *(f"variety {v}" for v in VARIETIES), "variety 50, calibrated"]
    lines = ["| bed | plain | " + " | ".join(shown) + " | factor |", "|---|" + "---|" * (len(shown) + 2)]
    for result in results:
        plain = result["rows"]["plain"]
        cells = [f"{plain['different']:.1f} / {plain['modes']:.1f} / {plain['valid']:.2f}"]
        for name in shown:
            row = result["rows"][name]
            gains = (f"x{row[key] / plain[key]:.2f}" for key in ("different", "modes"))
            cells.append(" / ".join([*gains, f"{row['valid'] - plain['valid']:+.3f}"]))
        lines.append(f"| {result['bed']} | " + " | ".join(cells) + f" | {result['factor']:.2f} |")
    return "\n".join(lines)


def run_targets() -> str:
    """A table of what a target does on the embedded pipeline, with guards and without."""
    bed: Any = BEDS["emoji"]()
    guards = {"no guard": False, "the default guard": None, "the judge as guard": demo_judge()}
    lines = [
        f"| prompt | guard | variety of each batch | different of 8 | valid: first batch, last {LAST} | |",
        "|---|---|---|---|---|---|",
    ]
    for prompt in TARGET_PROMPTS:
        for name, fidelity in guards.items():
            guide, varieties, valid = SPARKE(target=TARGET, fidelity=fidelity), [], []
            guide.calibration = 1.0
            for batch in range(BATCHES):
                x = sample(bed, Case(prompt, batch), guide)
                varieties.append(guide.target.used[0])
                valid.append(bed.figures(bed.rows(x), Case(prompt, 0))["valid"])
            (found,) = guide.target.prompts
            reason = f"{found.status}{f': {found.reason}' if found.reason else ''}"
            strengths = ", ".join(f"{v:.3g}" for v in varieties)
            cells = [
                prompt,
                name,
                strengths,
                f"{found.different:.1f}",
                f"{valid[0]:.2f}, {sum(valid[-LAST:]) / LAST:.2f}",
                reason,
            ]
            lines.append("| " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines)


def run_windows(names: list[str], prompts: int) -> None:
    """Print the effect of variety 50 with a guided interval that ends earlier, whatever the number of steps."""
    for name in names:
        bed = BEDS[name]()
        cases = bed.cases("report", 1)[:prompts]
        plain, cells = measure(bed, cases, lambda: guide_with(0)), []
        for stop in WINDOWS:

            def make(stop: float = stop) -> SPARKE:
                guide = guide_with(50)
                guide.terms[0].interval = lambda total: (0.0, stop)
                return guide

            row = measure(bed, cases, make)
            gains = (f"x{row[key] / plain[key]:.2f}" for key in ("different", "modes"))
            cells.append(f"to {stop:g}: {' / '.join(gains)} / {row['valid'] - plain['valid']:+.3f}")
        print(f"{bed.name}, {bed.steps} steps: {'; '.join(cells)}", flush=True)


def run_families() -> None:
    """Print mean moves and gains of tiny pipelines of random weights, whose images are noise: only the unit is tested."""
    from tests.tiny import build, call_kwargs

    for family in FAMILIES:
        pipe, cells = build(f"{family}Pipeline"), []
        pipe.set_progress_bar_config(disable=True)
        plain = 0.0
        for variety in (0, *VARIETIES[:3]):
            guide = guide_with(variety)
            with guide.attach(pipe):
                pipe(**call_kwargs(pipe, num_images_per_prompt=6, num_inference_steps=12, output_type="latent"))
            report = guide.report()
            plain, move, found = plain or report.guided, report.mean_relative_move, report.guided
            cells.append(f"{variety}: move {move:.3f}, different {found:.2f} (x{found / plain:.2f})")
        print(f"{family}: {'; '.join(cells)}", flush=True)


def draw_picture(path: Path, prompts: list[str]) -> None:
    """Write a column of images for each variety and a row for each of four seeds of each prompt."""
    pipe, varieties, tile, gap, top = load_demo_pipeline(), (0, *VARIETIES), 96, 8, 32
    pipe.set_progress_bar_config(disable=True)
    rows: list[tuple[Image.Image, ...]] = []
    for prompt in prompts:
        columns = []
        for variety in varieties:
            seeds = [torch.Generator().manual_seed(k) for k in range(4)]
            with guide_with(variety).attach(pipe):
                found = pipe(prompt, num_images_per_prompt=4, num_inference_steps=20, guidance_scale=5.0, generator=seeds)
            columns.append(found.images)
        rows += zip(*columns, strict=True)
    grid = image_grid(rows, tile, gap)
    sheet = Image.new("RGB", (grid.width, grid.height + top), "white")
    sheet.paste(grid, (0, top))
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=18)
    for k, variety in enumerate(varieties):
        draw.text((k * (tile + gap) + tile // 2, top // 2), f"variety {variety}", "black", font, anchor="mm")
    sheet.save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=list(BEDS))
    parser.add_argument("--prompts", type=int, default=6, help="prompts of the report half, at most")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="write the table into this page")
    parser.add_argument("--picture", type=Path, help="draw images of the embedded pipeline here, and measure nothing")
    parser.add_argument("--picture-prompts", nargs="+", default=["person", "heart"])
    parser.add_argument("--targets", action="store_true", help="measure targets on the embedded pipeline, and nothing else")
    parser.add_argument("--windows", action="store_true", help="measure shorter guided intervals, and nothing else")
    parser.add_argument("--families", action="store_true", help="measure tiny random pipelines, and nothing else")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.picture is not None:
        draw_picture(args.picture, args.picture_prompts)
        return
    if args.targets:
        lines = run_targets()
        if args.page is not None:
            pages.fill(args.page, {"target": lines})
        return
    if args.windows:
        run_windows(args.beds, args.prompts)
        return
    if args.families:
        run_families()
        return
    results = []
    for name in args.beds:
        results.append(run_bed(name, args.prompts))
        print(table(results[-1:]).splitlines()[-1], flush=True)
        if args.out is not None:
            args.out.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    if args.page is not None:
        pages.fill(args.page, {"variety": table(results)})


if __name__ == "__main__":
    main()
