"""Less classifier-free guidance while a guide pushes: what it gains at equal quality, on mixtures and the emoji model.

    python benchmarks/easing.py --beds mixture-2 mixture-8 mixture-32 mixture-64 --seeds 100
    python benchmarks/easing.py --beds emoji emoji-24 --seeds 25      # 80 seconds of a core a seed at 8 steps
    python benchmarks/easing.py --page docs/arena/ablations.md       # the tables of what has been measured

Results are kept for each setting and block of five seeds, from which an interrupted run continues.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.batched import Setting, run
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import BLOCK_SEEDS, Bed, Case
from benchmarks.arena.beds.emoji import Emoji
from benchmarks.arena.harness import FIDELITY_LOSS
from benchmarks.arena.quality import FIGURES, by_block, change
from kspec_guidance import SPARKE
from kspec_guidance.bench.fronts import weights
from kspec_guidance.guidance.term import DEFAULT_TRANSFORMS
from kspec_guidance.utils.atomic_io import replacing

ROOT = Path(__file__).parents[1]
# of each bed's own weight w: through the whole run
LESS = {"mixture": 1.5, "emoji": 2.0}
GUARDED = ("tangent", "off_score", "keep_prompt", "bound", "fade")
assert set(GUARDED) - {"keep_prompt"} == set(DEFAULT_TRANSFORMS)

PLAIN = "plain"
SETTINGS = {
    PLAIN: Setting(),
    "variety 50": Setting(50),
    "ease to 1, no push": Setting(ease=1.0),
    "less CFG to the end, no push": Setting(weight=-1),
    "variety 50, ease to 1.5": Setting(50, ease=1.5),
    "variety 50, ease to 1.5, guard": Setting(50, ease=1.5, guard=True),
    "variety 50, ease to 1": Setting(50, ease=1.0),
    "variety 50, ease to 1, guard": Setting(50, ease=1.0, guard=True),
    "variety 50, less CFG to the end": Setting(50, weight=-1),
    "variety 50, less CFG to the end, guard": Setting(50, weight=-1, guard=True),
    "variety 100": Setting(100),
    "variety 100, ease to 1.5": Setting(100, ease=1.5),
    "variety 100, ease to 1, guard": Setting(100, ease=1.0, guard=True),
    "`vivid`": Setting(scale=1.5, order=0.5),
    "`explore`: `vivid`, half of the CFG": Setting(scale=1.5, order=0.5, share=0.5),
    "`vivid`, a quarter of the CFG": Setting(scale=1.5, order=0.5, share=0.25),
}
# in two dimensions a projection leaves at most one direction; the package takes the settings of predictions as they are
# where no transforms are given
FEW = Setting(scale=3.0, order=0.5, stop=0.9, weight=1.2)
IN_TWO = {
    "scale 3 to 90%, CFG 1.2": FEW,
    "the same, not off the score": replace(FEW, off_score=False),
    "the same, of predictions as they are": replace(FEW, off_score=False, unit=False),
    "`explore`, not off the score": Setting(scale=1.5, order=0.5, share=0.5, off_score=False),
    "`explore`, of predictions as they are": Setting(scale=1.5, order=0.5, share=0.5, off_score=False, unit=False),
    "`vivid`, not off the score": Setting(scale=1.5, order=0.5, off_score=False),
    "`vivid`, of predictions as they are": Setting(scale=1.5, order=0.5, off_score=False, unit=False),
}
ON_EMOJI = [PLAIN, "variety 50", "variety 50, ease to 1", "variety 50, less CFG to the end", "less CFG to the end, no push",
            "variety 50, ease to 1, guard", "ease to 1, no push"]  # fmt: skip
NAMES = {"modes": "modes", "on_data": "on the data", "agreement": "agreement", "coverage": "coverage", "recall": "recall",
         "frechet_distance": "Frechet distance", "mmd": "MMD"}  # fmt: skip


def make_bed(name: str) -> Bed:
    """A bed of the arena, or the emoji model with another number of steps."""
    return BEDS[name]() if name in BEDS else Emoji(int(name.removeprefix("emoji-")))


def labels(name: str, bed: Bed) -> list[str]:
    """The settings that are measured on a bed."""
    if not isinstance(bed, Analytic):
        return ON_EMOJI
    return [*SETTINGS, *(IN_TWO if name == "mixture-2" else ())]


def guided(bed: Bed, cases: list[Case], setting: Setting) -> list[Tensor]:
    """Samples of each case by the package."""
    own, found = bed.guidance_scale, []
    bed.guidance_scale = own if setting.weight is None else setting.weight
    transforms = GUARDED if setting.guard else DEFAULT_TRANSFORMS
    for case in cases:
        if not setting.variety and setting.ease is None:
            found.append(bed.run(case, bed.images))
            continue
        variety = setting.variety or 1e-9  # the fade of a guide that moves nothing of note
        guide = SPARKE(variety=variety, ease_cfg=setting.ease, transforms=transforms)
        guide.calibration = 1.0
        with guide.attach(bed.pipe):
            found.append(bed.run(case, bed.images))
    bed.guidance_scale = own
    return found


def measure(bed: Bed, name: str, setting: Setting, cases: list[Case]) -> dict[str, Any]:
    """The judge's figures of the cases of one block of seeds, by prompt."""
    if setting.weight == -1:
        setting = replace(setting, weight=LESS[name.split("-")[0]])
    samples = list(run(bed, cases, setting)) if isinstance(bed, Analytic) else guided(bed, cases, setting)
    return judged(bed, samples, cases)


def judged(bed: Bed, samples: list[Tensor], cases: list[Case]) -> dict[str, Any]:
    """The judge's figures of the samples of one block of seeds, by prompt."""
    rows, figures = [bed.rows(x) for x in samples], {}
    for x, case in zip(rows, cases, strict=True):
        for k, v in bed.figures(x, case).items():
            figures.setdefault(k, []).append(v)
    found = by_block(figures, bed.distances(rows, cases), [c.prompt for c in cases])
    about = {"seeds": len({case.seed for case in cases})}
    return about | {k: [float(f"{v:.5g}") for v in found[k]] for k in FIGURES}


def joined(found: dict[str, Any]) -> tuple[dict[str, dict[str, np.ndarray]], np.ndarray, int]:
    """A bed's figures by setting, over the blocks that all settings have; weights of the bootstrap; the number of seeds."""
    settings = {label: list(by.values()) for label, by in found["settings"].items() if by}
    number = min(map(len, settings.values()))
    figures = {k: {f: np.concatenate([block[f] for block in v[:number]]) for f in FIGURES} for k, v in settings.items()}
    seeds = sum(block["seeds"] for block in next(iter(settings.values()))[:number])
    return figures, weights(found["prompts"] * number), seeds


def table(name: str, found: dict[str, Any]) -> str:
    """Changes against plain sampling with 95% intervals over prompts and seeds, of the blocks that all settings have."""
    figures, w, seeds = joined(found)
    base, rows = figures[PLAIN], []
    rows.append([PLAIN, *(f"{base[k].mean():.3g}" for k in NAMES), ""])
    for label in list(figures)[1:]:
        c, cells = change(figures[label], base, w), []
        for k in NAMES:
            low, high = np.quantile(c[k], [0.025, 0.975])
            if k in ("modes", "frechet_distance"):
                cells.append(f"x{c[k][0]:.2f} [{low:.2f}, {high:.2f}]")
            else:
                cells.append(f"{c[k][0]:+.3f}" + (f" [{low:+.3f}, {high:+.3f}]" if k in ("agreement", "coverage") else ""))
        equal = c["kept"][0] >= -FIDELITY_LOSS
        agrees = c["agreement"][0] >= -FIDELITY_LOSS
        rows.append([label, *cells, ("yes" if agrees else "but agreement") if equal else "no"])
    title = f"{found['bed']}, CFG {found['guidance_scale']:g}, {found['steps']} steps, {seeds} seeds"
    return pages.table([title, *NAMES.values(), "equal quality"], rows)


def tables(path: Path) -> str:
    """The tables of all beds in a file of results."""
    if not path.exists():
        return "(not measured)"
    return "\n\n".join(table(name, found) for name, found in json.loads(path.read_text("utf-8")).items())


def measure_settings(
    out: Path, name: str, bed: Bed, half: str, seeds: int, labels: Iterable[str],
    measured: Callable[[str, list[Case]], dict[str, Any]], steps: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Figures of settings on a bed, for each block of five seeds; those that the file has are not measured again.

    Args:
        out: the file of results, written after each setting.
        name: of the bed in the file.
        bed: the bed; ``steps`` stands for its own in the file, if given.
        half: of its prompts.
        seeds: of each prompt.
        labels: of the settings.
        measured: the figures of a setting on a block of cases.
    """
    done: dict[str, Any] = json.loads(out.read_text("utf-8")) if out.exists() else {}
    prompts, cases = bed.prompts(half), bed.cases(half, seeds)
    steps = bed.steps if steps is None else steps
    about = {"bed": bed.name, "steps": steps, "guidance_scale": bed.guidance_scale, "prompts": prompts}
    found: dict[str, Any] = done.setdefault(name, {**about, "settings": {}})
    size = BLOCK_SEEDS * len(prompts)
    for begin in range(0, len(cases), size):
        for label in labels:
            by, seed = found["settings"].setdefault(label, {}), str(cases[begin].seed)
            if seed not in by:
                by[seed] = measured(label, cases[begin : begin + size])
                with replacing(out) as fresh:
                    fresh.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=[], help="beds of the arena, or emoji-24 for 24 steps")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--half", default="report", choices=["tune", "report"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "easing.json")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in args.beds:
        bed = make_bed(name)
        found = measure_settings(
            args.out, name, bed, args.half, args.seeds, labels(name, bed),
            lambda label, cases, bed=bed, name=name: measure(bed, name, (SETTINGS | IN_TWO)[label], cases),
        )  # fmt: skip
        print(table(name, found), flush=True)
    if args.page is not None:
        pages.fill(args.page, {"easing": tables(args.out)})


if __name__ == "__main__":
    main()
