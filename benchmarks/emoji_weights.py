"""The embedded model before and after it was trained on by a GPU: the same prompts and seeds, without guidance.

python -m benchmarks.emoji_weights --out docs/emoji-weights.png
python -m benchmarks.emoji_weights --scales      what the arena's judge says at several classifier-free guidance scales
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from benchmarks.arena.beds.base import Case
from benchmarks.arena.beds.emoji import REPORT, Emoji
from benchmarks.arena.networks import emoji_pipeline
from kspec_guidance import load_demo_pipeline
from kspec_guidance.plotting import side_by_side

PROMPTS = ["heart", "cat face", "health worker", "man", "bird"]
IMAGES = 6


def rows(pipe) -> list[list[Image.Image]]:
    """A row of images for each prompt, of the seeds from 0 on."""
    pipe.set_progress_bar_config(disable=True)
    found = []
    for prompt in PROMPTS:
        seeds = [torch.Generator().manual_seed(k) for k in range(IMAGES)]
        call = {"num_images_per_prompt": IMAGES, "num_inference_steps": 20, "guidance_scale": 5.0, "generator": seeds}
        found.append(pipe(prompt, **call).images)
    return found


@torch.no_grad()
def scales() -> None:
    """Print means over a batch of eight of each of ten prompts: modes, validity, agreement."""
    for name, bed in (("1.0.0rc1", Emoji()), ("now", Emoji(pipe=load_demo_pipeline()))):
        for bed.steps in (8, 15):
            for bed.guidance_scale in (1.5, 2.5, 3.5, 5.0):
                cases = [Case(prompt, 0) for prompt in REPORT]
                found = [bed.figures(bed.rows(bed.run(case, bed.images)), case) for case in cases]
                means = {k: sum(f[k] for f in found) / len(found) for k in ("modes", "valid", "agreement")}
                print(name, bed.steps, bed.guidance_scale, {k: round(v, 3) for k, v in means.items()}, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-weights.png"))
    parser.add_argument("--scales", action="store_true", help="print figures instead")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.scales:
        scales()
        return
    panels = {"1.0.0rc1": rows(emoji_pipeline()), "now": rows(load_demo_pipeline())}
    sheet = side_by_side(panels, PROMPTS, "Same prompts, same seeds, without guidance")
    sheet.quantize(128, dither=Image.Dither.NONE).save(args.out, optimize=True)  # a palette: a third of the size


if __name__ == "__main__":
    main()
