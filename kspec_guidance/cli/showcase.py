"""The run of `kspec-guidance demo`: plain images, SPARKE, and MMD guidance toward two reference sets, with scores."""

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.baseline import make_baseline
from kspec_guidance.demo import load_demo_pipeline, load_demo_reference
from kspec_guidance.evaluation.embedders import pipeline_embedder
from kspec_guidance.guidance.presets import SPARKE, MMDGuidance
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.loop.latents import encode_reference
from kspec_guidance.plotting import plot_scores, side_by_side

__all__ = ["DemoResult", "run_demo"]

PROMPTS = ["heart", "runner", "health worker", "cat face", "man", "building"]
PEOPLE = ["health worker", "man", "farmer", "student", "cook", "runner"]
TONES = {"dark skin tones": "dark-skin-tone", "light skin tones": "light-skin-tone"}
GUIDANCE_SCALE = 5.0
BASELINE, BASELINE_BATCH = 50, 10  # samples; of 8 steps, since a baseline need not be sharp
Rows = list[list[Image.Image]]


@dataclass
class DemoResult:
    """The result of :func:`run_demo`.

    Attributes:
        vendi, rke: scores ``[prompt][plain or SPARKE]``.
        tones: squared MMD ``[panel][reference set]``.
        files: written files.
    """

    vendi: dict[str, dict[str, float]]
    rke: dict[str, dict[str, float]]
    tones: dict[str, dict[str, float]]
    files: list[Path] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"vendi": self.vendi, "rke": self.rke, "mmd2": self.tones, "files": [str(file) for file in self.files]}

    def tables(self) -> list[Table]:
        """Tables for the terminal."""
        table = Table(title="Different images among those of one prompt (effective number)")
        table.add_column("prompt")
        for name in ("Vendi plain", "Vendi SPARKE", "RKE plain", "RKE SPARKE"):
            table.add_column(name, justify="right")
        for prompt in self.vendi:
            v, r = self.vendi[prompt], self.rke[prompt]
            table.add_row(prompt, *(f"{s:.2f}" for s in (v["plain"], v["SPARKE"], r["plain"], r["SPARKE"])))
        distances = Table(title="Squared MMD of people's latents to true art (Gaussian kernel)")
        distances.add_column("images")
        for name in TONES:
            distances.add_column(f"to {name}", justify="right")
        for panel, row in self.tones.items():
            distances.add_row(panel, *(f"{row[name]:.4f}" for name in TONES))
        return [table, distances]


def run_demo(
    out: Path,
    images_per_prompt: int,
    guide: SPARKE,
    mmd_scale: float,
    steps: int,
    seed: int,
    progress_callback: Callable[[int, int], None],
) -> DemoResult:
    """Generate and score all images; write ``sparke.png``, ``mmd.png``, ``scores.png``, ``scores.json`` into ``out``.

    Args:
        out: the folder.
        images_per_prompt: images per prompt with SPARKE; half as many with MMD.
        guide: the guide of diversity; its memory is shared by all prompts: only images of similar prompts repel.
        mmd_scale: scale of MMD guidance, which has a baseline.
        steps: number of denoising steps.
        seed: image k of every prompt uses ``seed + k``.
        progress_callback: called with the number of finished pipeline calls and their total.
    """
    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    embed = pipeline_embedder(pipe)
    references = {name: encode_reference(pipe, load_demo_reference(key)) for name, key in TONES.items()}
    total, done = 2 * len(PROMPTS) + 1 + len(TONES) + BASELINE // BASELINE_BATCH, 0
    progress_callback(0, total)

    def generate(prompt: str | list[str], each: int, guide: Any) -> list[Image.Image]:
        nonlocal done
        n = each if isinstance(prompt, str) else each * len(prompt)
        settings = {
            "num_images_per_prompt": each,
            "num_inference_steps": steps,
            "guidance_scale": GUIDANCE_SCALE,
            "generator": [torch.Generator().manual_seed(seed + k % each) for k in range(n)],
        }
        if guide is None:
            made = pipe(prompt, **settings).images
        else:
            with guide.attach(pipe):
                made = pipe(prompt, **settings).images
        done += 1
        progress_callback(done, total)
        return made

    varied = {
        "plain": [generate(p, images_per_prompt, None) for p in PROMPTS],
        "SPARKE": [generate(p, images_per_prompt, guide) for p in PROMPTS],
    }
    each = max(2, images_per_prompt // 2)
    call = {"num_inference_steps": min(steps, 8), "guidance_scale": GUIDANCE_SCALE}
    first = done

    def of_baseline(samples: int, _: int) -> None:
        nonlocal done
        done = first + samples // BASELINE_BATCH
        progress_callback(done, total)

    baseline = make_baseline(pipe, n=BASELINE, batch_size=BASELINE_BATCH, call=call, progress_callback=of_baseline)
    done = first + BASELINE // BASELINE_BATCH  # also if it was there already
    guides = {"plain": None} | {
        f"toward {name}": MMDGuidance(r, mmd_scale, baseline=baseline) for name, r in references.items()
    }
    people = {name: generate(PEOPLE, each, g) for name, g in guides.items()}

    features = {name: [embed(row) for row in panel] for name, panel in varied.items()}
    vendi = {p: {n: float(F.vendi_score(f[i])) for n, f in features.items()} for i, p in enumerate(PROMPTS)}
    rke = {p: {n: float(F.rke_score(f[i])) for n, f in features.items()} for i, p in enumerate(PROMPTS)}
    tones = {panel: distances(embed(row), references) for panel, row in people.items()}

    out.mkdir(parents=True, exist_ok=True)
    result = DemoResult(vendi, rke, tones, [out / f for f in ("sparke.png", "mmd.png", "scores.png", "scores.json")])
    mean = {n: sum(v[n] for v in vendi.values()) / len(vendi) for n in varied}
    notes = {n: f"mean Vendi score {mean[n]:.2f} of {images_per_prompt}" for n in varied}
    title = "Same prompts, same seeds: plain sampling and SPARKE guidance"
    side_by_side(varied, PROMPTS, title, notes).save(result.files[0])
    panels: dict[str, Rows] = {
        name: [row[i * each : (i + 1) * each] for i in range(len(PEOPLE))] for name, row in people.items()
    }
    nearer = {panel: ", ".join(f"{n.split()[0]} {d:.3f}" for n, d in row.items()) for panel, row in tones.items()}
    title = "Same prompts, same seeds: plain sampling and MMD guidance toward a reference set"
    side_by_side(panels, PEOPLE, title, {p: f"squared MMD to {text}" for p, text in nearer.items()}).save(result.files[1])
    plot_scores(
        vendi, result.files[2], f"Diversity of {images_per_prompt} images of one prompt", "Vendi score (effective number)"
    )
    result.files[3].write_text(json.dumps({"vendi": vendi, "rke": rke, "mmd2": tones}, indent=1) + "\n")
    return result


def distances(x: Tensor, references: dict[str, Tensor]) -> dict[str, float]:
    """Squared MMD of latents ``[n, d]`` to each reference set, by one Gaussian kernel for all sets."""
    all_rows = torch.cat([r.flatten(1) for r in references.values()])
    kernel = GaussianKernel().fit(all_rows)
    return {name: float(F.mmd(x, r.flatten(1), kernel)) for name, r in references.items()}
