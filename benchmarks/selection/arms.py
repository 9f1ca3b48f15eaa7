"""Arms of the embedded pipeline whose truth is known: kinds of image found for the same denoising, by each way to choose.

    python -m benchmarks.selection.arms --results benchmarks/results/selection_arms.json --page docs/selection.md

For each prompt every way makes images until the same number of denoiser evaluations is spent, dropped images included (an
image of 8 steps takes 16 with guidance, 8 with a guidance scale of 1). A classifier drops images that do not show their
prompt, and says which of the training images that the prompt describes each one is: the kinds. About ten minutes on a core.
"""

import argparse
import json
import tempfile
from contextlib import suppress
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import pages
from benchmarks.selection.regret import mean_and_half
from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.demo.judge import load_demo_judge
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.selection import MixtureGreedy, OneArm
from kspec_guidance.synthesis import Arm, synthesize
from kspec_guidance.synthesis.records import Store

PROMPTS = ["flower", "smiling face", "cat face"]  # that describe 20 to 28 training images
STEPS, BUDGET, BATCH = 8, 640, 4  # evaluations of the denoiser for each prompt
ARMS = [
    Arm("CFG 1, guided", {"guidance_scale": 1.0}, cost=STEPS),
    Arm("CFG 3, guided", {"guidance_scale": 3.0}, cost=2 * STEPS),
    Arm("CFG 8, no guide", {"guidance_scale": 8.0}, guide=0, cost=2 * STEPS),
    Arm("collapsed (CFG 20, no guide)", {"guidance_scale": 20.0}, guide=0, cost=2 * STEPS),
]


class Judge:
    """Which kind an image shows; None if it does not show its prompt."""

    def __init__(self) -> None:
        self.judge = load_demo_judge()

    @torch.no_grad()
    def kind(self, image: Image.Image, prompt: str) -> int | None:
        x = torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 127.5 - 1).permute(2, 0, 1)[None]
        joint = self.judge.probabilities(self.judge.network.features(x))[0]
        described: Tensor = self.judge.described(prompt)
        if not bool(described[joint.argmax()]):
            return None
        return int(torch.where(described, joint, 0).argmax())


def ways(seed: int) -> dict[str, Any]:
    """The ways to choose, by name."""
    k, kernel = len(ARMS), GaussianKernel(0.5)
    found: dict[str, Any] = {arm.name: OneArm(k, i) for i, arm in enumerate(ARMS)}
    found["uniform"] = "uniform"
    found["mixture-greedy"] = "mixture-greedy"
    found["mixture-greedy with costs"] = MixtureGreedy(
        k, "rke", kernel=kernel, costs=[arm.cost for arm in ARMS], cost_weight=1 / BUDGET
    )
    return found


def run(pipe: Any, judge: Judge, prompt: str, select: Any, seed: int) -> dict[str, Any]:
    """Kinds, images, and denoising of one prompt, up to the budget."""
    with tempfile.TemporaryDirectory() as folder:
        start = perf_counter()
        images = BUDGET // STEPS

        class Spent(Exception):
            pass

        spent = 0.0
        store = Store(Path(folder))

        def stop(_: Any) -> None:
            nonlocal spent
            spent = sum(r.arm["cost"] * (len(r.rows) + len(r.rejected)) for r in store.records() if r.arm is not None)
            if spent >= BUDGET:
                raise Spent

        with suppress(Spent):
            synthesize(
                [prompt], folder, pipe, SPARKE(), images, BATCH, call={"num_inference_steps": STEPS}, seed=seed, arms=ARMS,
                select=select, filter=lambda image, row: judge.kind(image, row["prompt"]) is not None, report=False,
                progress_callback=stop,
            )  # fmt: skip
        seconds = perf_counter() - start
        rows = store.rows()
        kinds = {judge.kind(Image.open(Path(folder) / row["file_name"]), prompt) for row in rows}
        shares = {arm.name: sum(row["arm"] == arm.name for row in rows) / max(1, len(rows)) for arm in ARMS}
        return {"kinds": len(kinds), "images": len(rows), "evaluations": spent, "seconds": seconds, "shares": shares}


def measure(prompts: list[str], seeds: int) -> dict[str, list[dict[str, Any]]]:
    """Figures of each way, one for each prompt and seed."""
    pipe, judge = load_demo_pipeline(), Judge()
    pipe.set_progress_bar_config(disable=True)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in ways(0):
        for prompt in prompts:
            for seed in range(seeds):
                found.setdefault(name, []).append({"prompt": prompt, **run(pipe, judge, prompt, ways(seed)[name], seed)})
        print(name, round(sum(f["kinds"] for f in found[name]) / len(found[name]), 2), flush=True)
    return found


def table(found: dict[str, list[dict[str, Any]]]) -> str:
    """Kinds for each prompt and for each 100 evaluations, images kept, and shares of the arms."""
    lines = [
        "| way to choose | kinds of a prompt | kinds for 100 evaluations | images kept | shares of the four arms |",
        "|---|---|---|---|---|",
    ]
    for name, figures in found.items():
        kinds, half = mean_and_half([f["kinds"] for f in figures])
        rate, _ = mean_and_half([100 * f["kinds"] / f["evaluations"] for f in figures])
        kept, _ = mean_and_half([f["images"] for f in figures])
        shares = [sum(f["shares"][arm.name] for f in figures) / len(figures) for arm in ARMS]
        cells = ", ".join(f"{100 * s:.0f}%" for s in shares)
        lines.append(f"| {name} | {kinds:.1f} ± {half:.1f} | {rate:.2f} | {kept:.0f} | {cells} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, or take the figures of a file, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=len(PROMPTS))
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--results", type=Path, help="file of the figures; read if it exists, else written")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.results is not None and arguments.results.exists():
        found = json.loads(arguments.results.read_text())
    else:
        found = measure(PROMPTS[: arguments.prompts], arguments.seeds)
        if arguments.results is not None:
            arguments.results.write_text(json.dumps(found, indent=1) + "\n")
    if arguments.page is None:
        print(table(found))
        return
    pages.fill(arguments.page, {"arms": table(found)})


if __name__ == "__main__":
    main()
