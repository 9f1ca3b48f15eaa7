"""The embedded model before and after it was trained on by a GPU: the same prompts and seeds, without guidance.

python -m benchmarks.emoji_weights --out docs/emoji-weights.png
"""

import argparse
from pathlib import Path

import torch
from PIL import Image

from benchmarks.arena.networks import emoji_pipeline
from kspec_guidance import load_demo_pipeline
from kspec_guidance.plotting import side_by_side

PROMPTS = ["heart", "cat face", "health worker", "man", "bird"]
IMAGES = 6


def rows(pipe) -> list[list[Image.Image]]:
    """A row of images for each prompt, of the seeds from 0 on."""
    found = []
    for prompt in PROMPTS:
        seeds = [torch.Generator().manual_seed(k) for k in range(IMAGES)]
        call = {"num_images_per_prompt": IMAGES, "num_inference_steps": 20, "guidance_scale": 5.0, "generator": seeds}
        found.append(pipe(prompt, **call).images)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/emoji-weights.png"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    after = load_demo_pipeline()
    after.set_progress_bar_config(disable=True)
    panels = {"1.0.0rc1": rows(emoji_pipeline()), "now": rows(after)}
    sheet = side_by_side(panels, PROMPTS, "Same prompts, same seeds, without guidance")
    sheet.quantize(128, dither=Image.Dither.NONE).save(args.out, optimize=True)  # a palette: a third of the size


if __name__ == "__main__":
    main()
