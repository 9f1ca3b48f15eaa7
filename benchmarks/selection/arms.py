"""Arms of the embedded pipeline whose truth is known: kinds of image for a second of denoising, by each way to choose.

    python -m benchmarks.selection.arms --results benchmarks/results/selection_arms.json --page docs/selection.md

Each way makes images of the embedded prompts that describe at least eight training images, 8 of each, in an order that
depends on the seed, until the same seconds of denoising are spent, dropped images included. A classifier drops images that
do not show their prompt, and says which of the training images that the prompt describes each one is: the kinds. What an
image of each arm costs is measured first, in processor time of one core. Figures that the file of results lacks are
measured and added to it; about ten minutes on a core for six seeds.
"""

import argparse
import json
import random
import tempfile
from contextlib import nullcontext, suppress
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from benchmarks import pages
from benchmarks.selection.regret import mean_and_half
from kspec_guidance import SPARKE, load_demo_pipeline
from kspec_guidance.demo.judge import load_demo_judge
from kspec_guidance.demo.pipeline import DEMO_PROMPTS
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.selection import MixtureGreedy, OneArm
from kspec_guidance.synthesis import Arm, synthesize
from kspec_guidance.synthesis.store import Store

STEPS, BATCH, IMAGES, BUDGET = 8, 2, 8, 8.0  # steps of an image; images of a batch and of a prompt; seconds of denoising
LEAST_KINDS = 8  # training images that a prompt describes
ROUNDS = 5  # of the measurement of costs, of which the least counts
SETTINGS: dict[str, dict[str, Any]] = {
    "CFG 1, guided": {"call": {"guidance_scale": 1.0}},
    "CFG 3, guided": {"call": {"guidance_scale": 3.0}},
    "CFG 8, no guide": {"call": {"guidance_scale": 8.0}, "guide": 0},
    "one start noise, no guide": {"call": {"guidance_scale": 3.0, "same_start": True}, "guide": 0},
}


class Pipeline(StableDiffusionPipeline):
    """The pipeline, with an argument that makes it collapse: all images of a prompt start from the same noise."""

    def __call__(self, prompt: Any, generator: Any, same_start: bool = False, **kwargs: Any) -> Any:
        if same_start:
            generator = [torch.Generator().manual_seed(0) for _ in generator]
        return super().__call__(prompt, generator=generator, **kwargs)


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


def load_pipeline() -> Pipeline:
    pipe = Pipeline(**load_demo_pipeline().components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def measure_costs(pipe: Pipeline) -> dict[str, float]:
    """Seconds of processor time for an image of each arm: the arms in turn, several times, the least of each."""
    found: dict[str, float] = {}
    for _ in range(ROUNDS):
        for name, arm in SETTINGS.items():
            call = {"num_inference_steps": STEPS, "num_images_per_prompt": BATCH, **arm["call"]}
            start = process_time()
            with nullcontext() if arm.get("guide") == 0 else SPARKE().attach(pipe):
                pipe("cook", [torch.Generator().manual_seed(k) for k in range(BATCH)], **call)
            found[name] = min(found.get(name, float("inf")), (process_time() - start) / BATCH)
    return found


def ways(costs: dict[str, float]) -> dict[str, Any]:
    """The ways to choose, by name."""
    k = len(costs)
    found: dict[str, Any] = {name: OneArm(k, i) for i, name in enumerate(costs)}
    found["uniform"] = "uniform"
    found["mixture-greedy"] = "mixture-greedy"
    found["mixture-greedy with costs"] = MixtureGreedy(
        k, "rke", kernel=GaussianKernel(0.5), costs=list(costs.values()), cost_weight=1 / BUDGET
    )
    return found


def run(pipe: Pipeline, judge: Judge, select: Any, costs: dict[str, float], seed: int) -> dict[str, Any]:
    """Kinds, images and seconds of denoising of one run, which stops when the budget is spent."""
    prompts = [prompt for prompt in DEMO_PROMPTS if int(judge.judge.described(prompt).sum()) >= LEAST_KINDS]
    random.Random(seed).shuffle(prompts)
    kinds: dict[str, int | None] = {}  # by file name
    spent, batches = 0.0, 0

    class Spent(Exception):
        pass

    def keep(image: Image.Image, row: dict[str, Any]) -> bool:
        kinds[row["file_name"]] = judge.kind(image, row["prompt"])
        return kinds[row["file_name"]] is not None

    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))

        def stop(_: Any) -> None:
            nonlocal spent, batches
            for record in store.process_records(0, batches):
                assert record.arm is not None
                spent += record.arm["cost"] * (len(record.rows) + len(record.rejected))
                batches += 1
            if spent >= BUDGET:
                raise Spent

        with suppress(Spent):
            synthesize(
                prompts, folder, pipe, SPARKE(), IMAGES, BATCH, call={"num_inference_steps": STEPS}, seed=seed,
                arms=[Arm(name, **arm, cost=costs[name]) for name, arm in SETTINGS.items()], select=select, filter=keep,
                report=False, progress_callback=stop,
            )  # fmt: skip
        rows = store.rows()
    different = {(row["prompt"], kinds[row["file_name"]]) for row in rows}
    shares = {name: sum(row["arm"] == name for row in rows) / max(1, len(rows)) for name in SETTINGS}
    return {"kinds": len(different), "images": len(rows), "made": len(kinds), "seconds": spent, "shares": shares}


def measure(seeds: int, found: dict[str, Any], save: Any) -> None:
    """Add the costs, and the figures of each way and seed, that ``found`` lacks."""
    pipe, judge = load_pipeline(), Judge()
    if "costs" not in found:
        found |= {"costs": measure_costs(pipe), "ways": {}}
        save(found)
    for seed in range(seeds):
        for name in ways(found["costs"]):
            figures = found["ways"].setdefault(name, [])
            if len(figures) <= seed:
                figures.append(run(pipe, judge, ways(found["costs"])[name], found["costs"], seed))
                save(found)
                print(seed, name, figures[-1], flush=True)


def table(found: dict[str, Any]) -> str:
    """Kinds for a second of denoising, also less those of an even share, what was kept, and shares of the arms."""
    rows, even = [], [f["kinds"] / f["seconds"] for f in found["ways"]["uniform"]]
    for name, figures in found["ways"].items():
        rate, half = mean_and_half([f["kinds"] / f["seconds"] for f in figures])
        pairs = zip(figures, even, strict=True)
        more, spread = mean_and_half([f["kinds"] / f["seconds"] - other for f, other in pairs])
        made, _ = mean_and_half([f["made"] for f in figures])
        kept, _ = mean_and_half([f["images"] / f["made"] for f in figures])
        different, _ = mean_and_half([f["kinds"] / max(1, f["images"]) for f in figures])
        shares = ", ".join(f"{100 * sum(f['shares'][a] for f in figures) / len(figures):.0f}%" for a in SETTINGS)
        cost = f"{1000 * found['costs'][name]:.0f} ms" if name in found["costs"] else "-"
        rows.append([
            name, cost, f"{rate:.2f} ± {half:.2f}", "-" if name == "uniform" else f"{more:+.2f} ± {spread:.2f}",
            f"{made:.0f}", f"{100 * kept:.0f}%", f"{100 * different:.0f}%", shares,
        ])  # fmt: skip
    head = [
        "way to choose", "cost of an image", f"kinds for a second ({len(even)} seeds)", "less uniform's", "images made",
        "kept", "kinds of those kept", "shares of the four arms",
    ]  # fmt: skip
    return pages.table(head, rows)


def main() -> None:
    """Measure, or take the figures of a file, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=6)
    parser.add_argument("--results", type=Path, help="file of the figures, to which missing ones are added")
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    file: Path | None = arguments.results

    def save(found: dict[str, Any]) -> None:
        if file is not None:
            file.write_text(json.dumps(found) + "\n")

    found = json.loads(file.read_text()) if file is not None and file.exists() else {}
    measure(arguments.seeds, found, save)
    if arguments.page is None:
        print(table(found))
    else:
        pages.fill(arguments.page, {"arms": table(found)})


if __name__ == "__main__":
    main()
