"""Means for transformers and few steps, on the arena's two transformers: other spaces, and other start noises.

    python benchmarks/transformer_means.py --seeds 5
    python benchmarks/transformer_means.py --page docs/arena/ablations.md       # the tables of what has been measured

The same objective in the hidden states of a block and in its text tokens, alone and beside the guide of predictions; start
noises chosen by first predictions, CNO and pink noise, alone and below the guide. Figures and equal quality are those of
``easing.py``; the last column is the number of denoiser calls of a run relative to plain sampling.
Results are kept for each setting and block of five seeds, from which an interrupted run continues.
"""

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Case
from benchmarks.arena.beds.transformer import EmojiTransformer
from benchmarks.easing import PLAIN, judged, measure_settings, table
from kspec_guidance import SPARKE
from kspec_guidance.bench.methods.cno import CNO
from kspec_guidance.bench.methods.pink import PinkNoise

ROOT = Path(__file__).parents[1]
NAMES = ("emoji-transformer", "emoji-transformer-distilled")
CANDIDATES = 4
PRESET = "preset"  # few-step on the distilled transformer, else vivid


def preset(bed: EmojiTransformer) -> Any:
    return SPARKE.preset("few-step" if bed.steps <= 4 else "vivid")


def default(bed: EmojiTransformer) -> Any:
    guide = SPARKE()
    guide.calibration = 1.0
    return guide


def inside(space: str, scale: float) -> Callable[[EmojiTransformer], Any]:
    """A guide of hidden states; in few steps its interval is that of the preset."""
    return lambda bed: SPARKE(scale, space=space, stop=0.6 if bed.steps <= 4 else 0.65)


def beside(space: str, scale: float) -> Callable[[EmojiTransformer], Any]:
    return lambda bed: preset(bed) + inside(space, scale)(bed)


# label: guide, and how the start noises are made
SETTINGS: dict[str, tuple[Callable[[EmojiTransformer], Any] | None, str | None]] = {
    PLAIN: (None, None),
    "default": (default, None),
    PRESET: (preset, None),
    **{f"{space}, scale {s:g}": (inside(space, s), None) for space in ("block", "context") for s in (0.3, 1, 3)},
    **{f"{PRESET}, {space} 1 beside": (beside(space, 1.0), None) for space in ("block", "context")},
    "pink noise": (None, "pink"),
    f"{PRESET}, pink noise": (preset, "pink"),
    "CNO": (None, "cno"),
    f"{PRESET}, CNO": (preset, "cno"),
    f"chosen of {CANDIDATES}": (lambda bed: SPARKE(0.0), "chosen"),
    f"{PRESET}, chosen of {CANDIDATES}": (preset, "chosen"),
}


def samples(bed: EmojiTransformer, case: Case, label: str) -> Tensor:
    """Samples ``[n, ...]`` of one call, whose memory is empty."""
    make, start = SETTINGS[label]
    guide, latents = None if make is None else make(bed), None
    if start == "chosen":
        assert guide is not None
        about: dict[str, Any] = {
            "sigmas": [1 - k / bed.steps for k in range(bed.steps)], "num_inference_steps": bed.steps,
            "guidance_scale": bed.guidance_scale, "max_sequence_length": 0, "output_type": "latent",
            "num_images_per_prompt": bed.images, "generator": bed.noise(case, bed.images),
        }  # fmt: skip
        found = guide.choose_start(bed.pipe, case.prompt, candidates=CANDIDATES, **about)
        return found.result.images
    if start is not None:
        latents = (PinkNoise() if start == "pink" else CNO()).choose(bed, case)
    with nullcontext() if guide is None else guide.attach(bed.pipe):
        return bed.run(case, bed.images, latents)


def calls(steps: int, label: str) -> float:
    """Denoiser calls of a run of so many steps, relative to plain sampling."""
    further = {"cno": CNO().rounds, "chosen": CANDIDATES}.get(SETTINGS[label][1] or "", 0)
    return 1 + further / steps


def tables(path: Path) -> str:
    """The tables of all beds in a file of results."""
    if not path.exists():
        return "(not measured)"
    found = []
    for name, about in json.loads(path.read_text("utf-8")).items():
        steps, lines = about["steps"], table(name, about).splitlines()
        for k, line in enumerate(lines):
            if line.startswith("|"):
                label = line.split("|")[1].strip()
                cell = f"x{calls(steps, label):.2f}" if label in SETTINGS else "---" if k and "---" in line else "calls"
                lines[k] = f"{line} {cell} |" if cell != "---" else f"{line}---|"
        found.append("\n".join(lines))
    return "\n\n".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="labels, beside plain sampling")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "transformer_means.json")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    labels = [label for label in SETTINGS if not args.only or label in (PLAIN, *args.only)]
    for name in args.beds if args.seeds else []:
        bed = BEDS[name]()
        assert isinstance(bed, EmojiTransformer)
        measure_settings(
            args.out, name, bed, "report", args.seeds, labels,
            lambda label, cases, bed=bed: judged(bed, [samples(bed, case, label) for case in cases], cases),
        )  # fmt: skip
    if args.seeds:
        print(tables(args.out))
    if args.page is not None:
        pages.fill(args.page, {"transformer means": tables(args.out)})


if __name__ == "__main__":
    main()
