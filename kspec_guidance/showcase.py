"""The demo: one pipeline, the same prompts and seeds, plain, with SPARKE, and drawn to a style with MMD."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table

from kspec_guidance import functional as F
from kspec_guidance.demo import encode_reference, load_demo_pipeline, load_demo_reference
from kspec_guidance.embedders import pipeline_embedder
from kspec_guidance.kernels import PolynomialKernel
from kspec_guidance.plotting import plot_scores, side_by_side
from kspec_guidance.presets import SPARKE, MMDGuidance

__all__ = ["DemoResult", "run_demo"]

PROMPTS = ["heart", "runner", "health worker", "cat face", "person"]
STYLE_PROMPTS = ["health worker", "man", "runner"]
GUIDANCE_SCALE = 5.0
Rows = list[list[Image.Image]]


@dataclass
class DemoResult:
    """Scores ``[prompt][plain or guided]``, MMD to the style, seconds, and the files written."""

    vendi: dict[str, dict[str, float]]
    rke: dict[str, dict[str, float]]
    style: dict[str, float]
    seconds: dict[str, float] = field(default_factory=dict)
    files: list[Path] = field(default_factory=list)

    def tables(self) -> list[Table]:
        table = Table(title="Different images among those of one prompt (effective number)")
        table.add_column("prompt")
        for name in ("Vendi plain", "Vendi SPARKE", "RKE plain", "RKE SPARKE"):
            table.add_column(name, justify="right")
        for prompt in self.vendi:
            v, r = self.vendi[prompt], self.rke[prompt]
            table.add_row(prompt, *(f"{s:.2f}" for s in (v["plain"], v["SPARKE"], r["plain"], r["SPARKE"])))
        style = Table(title="Distance of the latents to the Twemoji style (squared MMD, cubic kernel)")
        for name in self.style:
            style.add_column(name, justify="right")
        style.add_row(*(f"{s:.4f}" for s in self.style.values()))
        return [table, style]


def run_demo(
    out: Path, images: int, scale: float, style_scale: float, steps: int, seed: int, tick: Callable[[int, int], None]
) -> DemoResult:
    """Generate all rows, score them, write ``sparke.png``, ``style.png``, ``scores.png``, ``scores.json`` into ``out``."""
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    embed = pipeline_embedder(pipe)
    reference = encode_reference(pipe, load_demo_reference("twemoji"))
    total, done = 2 * len(PROMPTS) + 2 * len(STYLE_PROMPTS), 0
    tick(0, total)

    def rows(prompts: list[str], guide: Any = None) -> Rows:
        nonlocal done
        result = []
        for prompt in prompts:
            generators = [torch.Generator().manual_seed(seed + k) for k in range(images)]
            settings = {"num_images_per_prompt": images, "num_inference_steps": steps, "guidance_scale": GUIDANCE_SCALE}
            if guide is None:
                made = pipe(prompt, generator=generators, **settings).images
            else:
                with guide.attach(pipe):
                    made = pipe(prompt, generator=generators, **settings).images
            result.append(made)
            done += 1
            tick(done, total)
        return result

    plain, varied = rows(PROMPTS), rows(PROMPTS, SPARKE(scale))
    style_plain, style_guided = rows(STYLE_PROMPTS), rows(STYLE_PROMPTS, MMDGuidance(reference, style_scale))

    both = {"plain": plain, "SPARKE": varied}
    features = {name: [embed(row) for row in panel] for name, panel in both.items()}
    vendi = {p: {n: float(F.vendi_score(f[i])) for n, f in features.items()} for i, p in enumerate(PROMPTS)}
    rke = {p: {n: float(F.rke_score(f[i])) for n, f in features.items()} for i, p in enumerate(PROMPTS)}
    kernel, target = PolynomialKernel(), reference.flatten(1)
    target = target / target.norm(dim=1, keepdim=True) * target.shape[1] ** 0.5

    def distance(panel: Rows) -> float:
        x = torch.cat([embed(row) for row in panel])
        x = x / x.norm(dim=1, keepdim=True) * x.shape[1] ** 0.5
        return float(F.mmd(x, target, kernel))

    style = {"plain": distance(style_plain), "MMD guidance": distance(style_guided)}
    result = DemoResult(vendi, rke, style)

    out.mkdir(parents=True, exist_ok=True)
    mean = {n: sum(v[n] for v in vendi.values()) / len(vendi) for n in both}
    notes = {n: f"mean Vendi score {mean[n]:.2f} of {images}" for n in both}
    grid = side_by_side(both, PROMPTS, "Same prompts, same seeds: plain sampling and SPARKE guidance", notes)
    styles = {"plain": style_plain, "MMD guidance toward Twemoji": style_guided}
    style_notes = dict(zip(styles, (f"squared MMD to the style {d:.4f}" for d in style.values()), strict=True))
    result.files = [out / name for name in ("sparke.png", "style.png", "scores.png", "scores.json")]
    grid.save(result.files[0])
    side_by_side(styles, STYLE_PROMPTS, "Same prompts, same seeds: toward a style", style_notes).save(result.files[1])
    plot_scores(vendi, result.files[2], f"Variety of {images} images of one prompt", "Vendi score (effective number)")
    result.files[3].write_text(json.dumps({"vendi": vendi, "rke": rke, "style_mmd2": style}, indent=1) + "\n")
    return result
