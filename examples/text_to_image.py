"""Plain and guided images of the same prompts and seeds, from any text-to-image model.

    python examples/text_to_image.py "heart" "runner"                        # the embedded emoji pipeline
    python examples/text_to_image.py "a photo of a dog" --model sdxl
    python examples/text_to_image.py "a photo of a dog" --model path/or/hub-id --steps 30 --cfg 5
    python examples/text_to_image.py "a dog" "a cat" --model sdxl --reference folder/of/images   # toward these

Writes OUT/grid.png and OUT/scores.json.
"""

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline

from kspec_guidance import SPARKE, load_demo_pipeline, toward_reference
from kspec_guidance.plotting import side_by_side


@dataclass
class Recipe:
    """A model's hub id, its usual number of steps, guidance scale and dtype, and the preset that suits it."""

    model: str
    steps: int
    cfg: float
    preset: str = "default"
    dtype: str = "float16"


RECIPES = {
    "demo": Recipe("demo", 20, 5.0, dtype="float32"),
    "sd15": Recipe("stable-diffusion-v1-5/stable-diffusion-v1-5", 30, 7.5),
    "sdxl": Recipe("stabilityai/stable-diffusion-xl-base-1.0", 30, 5.0),
    "sd3": Recipe("stabilityai/stable-diffusion-3.5-medium", 28, 4.5, dtype="bfloat16"),
    "flux": Recipe("black-forest-labs/FLUX.1-dev", 28, 3.5, dtype="bfloat16"),
    "flux-schnell": Recipe("black-forest-labs/FLUX.1-schnell", 4, 0.0, "few-step", "bfloat16"),
    "z-image-turbo": Recipe("Tongyi-MAI/Z-Image-Turbo", 9, 0.0, "few-step", "bfloat16"),
    "qwen-image": Recipe("Qwen/Qwen-Image", 30, 4.0, dtype="bfloat16"),
}


def load(recipe: Recipe, device: str, offload: bool = False) -> Any:
    """Load the pipeline onto its device; ``offload`` keeps only the component in use there."""
    if recipe.model == "demo":
        pipe: Any = load_demo_pipeline()
    else:
        pipe = DiffusionPipeline.from_pretrained(recipe.model, dtype=getattr(torch, recipe.dtype), use_safetensors=True)
    if offload:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(device)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--model", default="demo", help=f"{', '.join(RECIPES)}, or a folder or hub id")
    parser.add_argument("--images-per-prompt", "--images", type=int, default=4, help="generated in one batch")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--cfg", type=float, help="guidance_scale")
    parser.add_argument("--preset", help="default, safe, vivid, explore, faithful, few-step or published")
    parser.add_argument("--variety", type=float, help="strength from 0 to 100; 50 by default")
    parser.add_argument("--scale", type=float, help="a fixed strength; overrides the preset's")
    parser.add_argument("--reference", type=Path, help="folder of 20 to 50 images, whose style or domain to match")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--offload", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("outputs/text_to_image"))
    args = parser.parse_args(argv)

    recipe = RECIPES.get(args.model) or Recipe(args.model, 30, 5.0)
    kwargs = {name: value for name, value in (("scale", args.scale), ("variety", args.variety)) if value is not None}
    call = {
        "num_inference_steps": args.steps or recipe.steps,
        "guidance_scale": recipe.cfg if args.cfg is None else args.cfg,
    }
    pipe = load(recipe, args.device, args.offload)
    if args.reference is None:
        guide = SPARKE.preset(args.preset or recipe.preset, **kwargs)
    else:
        guide = toward_reference(pipe, args.reference, batch_size=args.images_per_prompt, call=call, **kwargs)
    plain, guided, reports = [], [], {}
    for prompt in args.prompts:
        seeds = [torch.Generator().manual_seed(args.seed + k) for k in range(args.images_per_prompt)]
        found = guide.compare(pipe, prompt, num_images_per_prompt=args.images_per_prompt, generator=seeds, **call)
        plain.append(found.plain)
        guided.append(found.guided)
        reports[prompt] = found.report.to_dict()
        print(f"{prompt}: {found.report}")
    args.out.mkdir(parents=True, exist_ok=True)
    tile = 64 if recipe.model == "demo" else 192
    grid = side_by_side({"plain": plain, "guided": guided}, args.prompts, "Same prompts, same seeds", tile=tile)
    grid.save(args.out / "grid.png")
    (args.out / "scores.json").write_text(json.dumps(reports, indent=1) + "\n")
    print(f"wrote {args.out / 'grid.png'} and scores.json")


if __name__ == "__main__":
    main()
