"""Effect of guidance on the embedded pipeline: diversity, modes and fidelity, plain and guided, with intervals.

    python benchmarks/effect.py --out benchmarks/results/effect.json

Needs the emoji art (fetched with npm on the first run). A generated image belongs to the training image nearest to it in
32 x 32 pixels; it *agrees* if that image may have the prompt as its caption, and the modes of a prompt are the distinct
training images that agreeing images belong to. Intervals are 95%, by bootstrap over prompts.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from torch.nn import functional as nnf

sys.path.insert(0, str(Path(__file__).parents[1] / "examples" / "train_emoji"))
import data

from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance import functional as F
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, l2_normalize

PROMPTS = [
    "runner", "cat face", "man", "heart", "person", "health worker", "woman", "firefighter", "clock face", "swimmer",
    "police officer", "teacher", "farmer", "cook", "student", "person frowning", "surfer", "waving hand sign", "book",
    "building",
]  # fmt: skip
KERNEL = GaussianKernel(1.0)  # of unit-norm latents; the same for all runs, whatever kernel guidance used

# the default objective with the move of the papers: of the noisy latents, rescaled to their norm at every 10th step
NOISY = {
    "kernel": GaussianKernel(0.7), "prompt_kernel": GaussianKernel(0.35), "space": "latents", "stop": 1.0, "every": 10,
    "transforms": ("rescale",),
}  # fmt: skip


def pixel_rows(images: torch.Tensor) -> torch.Tensor:
    """Images ``[n, 3, 64, 64]`` in 0..1 as rows of 3 x 32 x 32 numbers."""
    return nnf.avg_pool2d(images, 2).flatten(1)


class Art:
    """The training images, to find the one nearest to a generated image."""

    def __init__(self, folder: Path):
        data.download(folder)
        images, self.entries = data.load(folder)
        self.rows = pixel_rows(images.float() / 255)

    def judge(self, images: torch.Tensor, prompt: str) -> dict[str, float]:
        distance = torch.cdist(pixel_rows(images), self.rows) / self.rows.shape[1] ** 0.5  # root mean squared difference
        nearest, which = distance.min(dim=1)
        agree = [self.entries[i].answers(prompt) for i in which.tolist()]
        modes = {self.entries[i].path for i, ok in zip(which.tolist(), agree, strict=True) if ok}
        return {"modes": len(modes), "agreement": sum(agree) / len(agree), "distance": float(nearest.mean())}


def run(pipe, prompt: str, guide_settings: dict | None, args) -> dict[str, float]:
    settings = {
        "num_images_per_prompt": args.images,
        "num_inference_steps": args.steps,
        "guidance_scale": args.guidance_scale,
        "output_type": "latent",
        "generator": [torch.Generator().manual_seed(args.seed + k) for k in range(args.images)],
    }
    began = time.perf_counter()
    if guide_settings is None:
        latents = pipe(prompt, **settings).images
    else:
        with SPARKE(**guide_settings).attach(pipe):
            latents = pipe(prompt, **settings).images
    with torch.no_grad():
        images = (pipe.vae.decode(latents / pipe.vae.config.scaling_factor).sample / 2 + 0.5).clamp(0, 1)
    seconds = time.perf_counter() - began
    rows = l2_normalize(latents.flatten(1))
    same = torch.ones(len(rows), 1)
    return {
        "vendi": float(F.vendi_score(rows, KERNEL)),
        "conditional_rke": float(F.conditional_rke_score(rows, same, KERNEL, GaussianKernel(PROMPT_BANDWIDTH))),
        **args.art.judge(images, prompt),
        "seconds": seconds,
    }


def interval(values: torch.Tensor, seed: int = 0) -> list[float]:
    """Mean and 95% bootstrap interval over prompts."""
    g = torch.Generator().manual_seed(seed)
    draws = values[torch.randint(len(values), (2000, len(values)), generator=g)].mean(1)
    return [float(values.mean()), float(draws.quantile(0.025)), float(draws.quantile(0.975))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/effect.json"))
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--scales", type=float, nargs="+", default=[0.5, 1.0, 1.5])
    parser.add_argument("--varieties", type=float, nargs="*", default=[50.0], help="strengths that adapt to the model")
    parser.add_argument("--noisy", type=float, nargs="*", default=[0.1], help="scales of the settings NOISY")
    parser.add_argument("--plot", type=Path, help="plot of modes against distance to the art")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS)
    parser.add_argument("--options", type=json.loads, default={}, help="further SPARKE settings as JSON")
    parser.add_argument("--variants", type=json.loads, default={}, help="named SPARKE settings, as JSON")
    parser.add_argument("--pipeline", type=Path, help="folder of another pipeline trained on the same art")
    args = parser.parse_args()
    args.art = Art(args.data)
    if args.pipeline is None:
        pipe = load_demo_pipeline()
    else:
        pipe = StableDiffusionPipeline.from_pretrained(args.pipeline, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    results, names = {}, ["vendi", "conditional_rke", "modes", "agreement", "distance", "seconds"]
    print("setting        " + "".join(f"{n:>26}" for n in names), flush=True)
    variants = args.variants or {f"SPARKE {scale:g}": {"scale": scale, **args.options} for scale in args.scales}
    if not args.variants:
        variants |= {f"variety {v:g}": {"variety": v, **args.options} for v in args.varieties}
        variants |= {f"noisy latents {s:g}": {"scale": s, **NOISY} for s in args.noisy}
    for label, settings in {"plain": None, **variants}.items():
        rows = [run(pipe, p, settings, args) for p in args.prompts]
        results[label] = {n: interval(torch.tensor([r[n] for r in rows], dtype=torch.float64)) for n in names}
        results[label]["prompts"] = dict(zip(args.prompts, rows, strict=True))
        print(f"{label:<15}" + "".join("{:>12.3f} [{:.3f}, {:.3f}]".format(*results[label][n]) for n in names), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    about = {k: v for k, v in vars(args).items() if k in ("images", "steps", "guidance_scale", "seed", "options")}
    args.out.write_text(json.dumps({"settings": about, "results": results}, indent=1) + "\n")

    if args.plot is not None:
        draw(results, args)


def draw(results: dict, args) -> None:
    """Plot modes found against distance to the nearest training image: up is more diverse, left is more faithful."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for k, (label, r) in enumerate(results.items()):
        (x, x0, x1), (y, y0, y1) = r["distance"], r["modes"]
        colour = "#667085" if label == "plain" else "#c4572e" if label.startswith("noisy") else "#2f6fb3"
        axes.errorbar(x, y, [[y - y0], [y1 - y]], [[x - x0], [x1 - x]], fmt="o", color=colour, alpha=0.9, elinewidth=0.6)
        axes.annotate(label, (x, y), xytext=(6, -12 if k % 2 else 5), textcoords="offset points", fontsize=9, color=colour)
    axes.set_title(f"{len(args.prompts)} prompts, {args.images} images each, 95% intervals over prompts", fontsize=10)
    axes.set(xlabel="distance to the nearest training image (RMS of pixels)", ylabel="distinct training images found")
    axes.spines[["top", "right"]].set_visible(False)
    args.plot.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.plot, dpi=130)


if __name__ == "__main__":
    main()
