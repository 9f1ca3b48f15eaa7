"""A picture of the preset ``vivid`` and of a lower ``guidance_scale``, apart and together: the same prompts and seeds.

python benchmarks/settings_picture.py --out docs/settings.png
"""

import argparse
import sys
from contextlib import nullcontext
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.plotting import side_by_side

PROMPTS = ["health worker", "cat face", "cook", "heart"]
USUAL, LOWER = 5.0, 2.5
PANELS = {  # preset and guidance scale
    f"plain, guidance_scale {USUAL:g}": (None, USUAL),
    "vivid": ("vivid", USUAL),
    f"guidance_scale {LOWER:g}": (None, LOWER),
    f"vivid, guidance_scale {LOWER:g}": ("vivid", LOWER),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=4, help="of each prompt")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "docs" / "settings.png")
    args = parser.parse_args()
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    panels = {}
    for name, (preset, guidance_scale) in PANELS.items():
        panels[name] = []
        for prompt in PROMPTS:
            generators = [torch.Generator().manual_seed(k) for k in range(args.images)]
            call = {"num_images_per_prompt": args.images, "num_inference_steps": args.steps, "generator": generators}
            with nullcontext() if preset is None else SPARKE.preset(preset).attach(pipe):
                panels[name].append(pipe(prompt, guidance_scale=guidance_scale, **call).images)
    grid = side_by_side(panels, PROMPTS, "Same prompts, same seeds: a preset and a lower guidance scale")
    grid.quantize(128).save(args.out, optimize=True)


if __name__ == "__main__":
    main()
