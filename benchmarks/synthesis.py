"""Effect of a memory over a whole run, and of the prompt kernel's bandwidth, on the embedded pipeline.

    python benchmarks/synthesis.py --plot docs/synthesis.png            # 2,000 images over 200 prompts; half an hour
    python benchmarks/synthesis.py --prompts 20 --phrased 5 --images 6  # a short run

Needs the emoji art (fetched with npm on the first run). The first table compares plain sampling, guidance within each
batch only, and guidance with a memory of the whole run. In the second, every subject has four phrasings
(``runner, woman``, ``runner woman``, ``woman runner``, ``runner, woman, woman``). The bandwidth of the prompt kernel
decides whether these count as one prompt, as they should, and whether different subjects do, as they should not.

*Modes* of a prompt are the distinct training images that its images are nearest to and that it may describe. Intervals
are 95%: bootstrap over prompts, or jackknife over prompts for scores of the whole set.
"""

import argparse
import json
import random
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from effect import KERNEL, Art, interval
from PIL import Image

from kspec_guidance import SPARKE, MemoryBank, load_demo_pipeline
from kspec_guidance import functional as F
from kspec_guidance.evaluation.embedders import efficientnet_lite
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.statistics import jackknife_interval
from kspec_guidance.synthesis import Prompt, synthesize
from kspec_guidance.synthesis.records import unpack_tensors
from kspec_guidance.synthesis.store import Store

SHOWN = ("runner", "heart", "bird", "building", "clock face")  # in the plot
PHRASES = ("{s}, {g}", "{s} {g}", "{g} {s}", "{s}, {g}, {g}")


class OwnBatchOnly(MemoryBank):
    """A memory that stays empty."""

    def add(self, x, prompt_features=None):
        pass


def subjects(entries, number, min_count, seed=0):
    """Random prompts that may describe at least ``min_count`` training images."""
    counts = Counter(name for e in entries for name in (e.subject, *e.families))
    names = sorted(name for name, n in counts.items() if n >= min_count)
    return random.Random(seed).sample(names, min(number, len(names)))


def make(pipe, prompts, guide, memory, args):
    """A synthesised set: images ``[n, 3, 64, 64]``, unit latents, prompt features, metadata, seconds, guidance seconds."""
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
        done = synthesize(
            prompts, folder, pipe, guide, images_per_prompt=args.images, batch_size=args.batch, call=call, seed=args.seed,
            memory=memory, report=False,
        )  # fmt: skip
        seconds = time.perf_counter() - began
        rows, x, t = [], [], []
        for record in Store(Path(folder)).records(tensors=True):
            tensors = unpack_tensors(record.tensors)
            rows += record.rows
            x.append(tensors.x.flatten(1))
            t.append(tensors.prompt_features)
        arrays = [np.asarray(Image.open(Path(folder, row["file_name"])).convert("RGB")) for row in rows]
    images = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() / 255
    return images, l2_normalize(torch.cat(x)), torch.cat(t), rows, seconds, done.guidance_seconds


def leave_prompts_out(score, groups, number=20):
    """The score and its interval, by a jackknife over ``number`` groups of prompts."""
    which = torch.as_tensor(groups) % number
    value = score(torch.ones(len(which), dtype=torch.bool))
    parts = torch.tensor([float(score(which != k)) for k in range(number)], dtype=torch.float64)
    found = jackknife_interval(torch.tensor(float(value)), parts)
    return [found.value, found.low, found.high]


def judge(made, base, art, embed):
    """All figures of one set; ``base`` gives the subject of each prompt."""
    images, x, t, rows, seconds, guidance = made
    names = [base[row["prompt"]] for row in rows]
    order = sorted(set(names))
    groups = [order.index(name) for name in names]
    by_prompt = []
    for name in order:
        mine = torch.tensor([k for k, n in enumerate(names) if n == name])
        by_prompt.append({"vendi": float(F.vendi_score(x[mine], KERNEL)), **art.judge(images[mine], name)})
    found = {n: interval(torch.tensor([p[n] for p in by_prompt], dtype=torch.float64)) for n in by_prompt[0]}
    features = embed([Image.fromarray((i.permute(1, 2, 0) * 255).byte().numpy()) for i in images], 64).double()
    features, texts = l2_normalize(features), l2_normalize(t.double())
    prompt_kernel = GaussianKernel(0.35)
    found["conditional_rke"] = leave_prompts_out(
        lambda m: F.conditional_rke_score(x[m].double(), texts[m], KERNEL, prompt_kernel), groups
    )
    found["scendi"] = leave_prompts_out(lambda m: F.scendi_score(features[m], texts[m]), groups)
    nearest = torch.cdist(torch.nn.functional.avg_pool2d(images, 2).flatten(1), art.rows).argmin(1)
    described = torch.tensor([any(e.answers(name) for name in order) for e in art.entries])
    covered = lambda m: len({int(i) for i in nearest[m] if described[i]}) / int(described.sum())  # noqa: E731
    found["coverage"] = leave_prompts_out(covered, groups)
    found["seconds"], found["guidance_seconds"] = seconds, guidance
    return found


COLUMNS = ("modes", "vendi", "conditional_rke", "scendi", "coverage", "agreement", "distance")


def line(name, found):
    return f"{name:<28}" + "".join("{:>9.3f} [{:.3f}, {:.3f}]".format(*found[c]) for c in COLUMNS)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=["memory", "phrases"], help="memory, phrases; plot for --plot alone")
    parser.add_argument("--data", type=Path, default=Path(".cache_data"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/synthesis.json"))
    parser.add_argument("--prompts", type=int, default=200)
    parser.add_argument("--phrased", type=int, default=12, help="subjects with four phrasings each")
    parser.add_argument("--images", type=int, default=10, help="for each prompt")
    parser.add_argument("--batch", type=int, default=5)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance-scale", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bandwidths", type=float, nargs="+", default=[0.1, 0.35, 0.7, 2.0])
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    art, pipe, embed = Art(args.data), load_demo_pipeline(), efficientnet_lite()
    pipe.set_progress_bar_config(disable=True)
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    print("set".ljust(28) + "".join(f"{c:>23}" for c in COLUMNS), flush=True)
    for name in (part for part in args.parts if part in PARTS):
        settings = {k: v for k, v in vars(args).items() if k not in ("data", "out", "plot", "parts")}
        results[name] = {"settings": settings, **PARTS[name](pipe, art, embed, args)}
        args.out.write_text(json.dumps(results, indent=1) + "\n")
    if args.plot is not None:
        draw(pipe, args.plot, args)


def over_a_run(pipe, art, embed, args):
    """Plain, guided within each batch only, guided with a memory of the whole run."""
    names = subjects(art.entries, args.prompts, 4)
    base = {name: name for name in names}
    runs = {
        "plain": (SPARKE(0.0), "exact"),
        "own batch only": (SPARKE(1.0, memory=OwnBatchOnly()), "guide"),
        "memory of the whole run": (SPARKE(1.0), "exact"),
    }
    results = {}
    for label, (guide, memory) in runs.items():
        made = make(pipe, [Prompt(n) for n in names], guide, memory, args)
        results[label] = found = judge(made, base, art, embed)
        print(line(label, found), f"  {found['seconds']:.0f} s, guidance {found['guidance_seconds']:.1f} s", flush=True)
    return results


def phrases(pipe, art, embed, args):
    """The same subjects in four phrasings, for several bandwidths of the prompt kernel."""
    counts = Counter((e.subject, e.gender) for e in art.entries if e.gender in ("woman", "man"))
    pairs = random.Random(1).sample(sorted(pair for pair, n in counts.items() if n >= 12), 2 * args.phrased)
    pairs = list({s: (s, g) for s, g in pairs}.values())[: args.phrased]
    base = {phrase.format(s=s, g=g): f"{s}, {g}" for s, g in pairs for phrase in PHRASES}
    prompts = [Prompt(phrase.format(s=s, g=g)) for phrase in PHRASES for s, g in pairs]
    results = {}
    for b in [None, *args.bandwidths]:
        label = "plain" if b is None else f"prompt bandwidth {b:g}"
        guide = SPARKE(0.0) if b is None else SPARKE(1.0, prompt_kernel=GaussianKernel(b))
        made = make(pipe, prompts, guide, "exact", args)
        results[label] = found = judge(made, base, art, embed)
        print(line(label, found), flush=True)
        if b is not None:
            found["weight_of_phrases"], found["weight_of_others"] = weights(made[2], made[3], base, b)
            print(f"    weight of an image of another phrase of the subject {found['weight_of_phrases']:.3f}, "
                  f"of another subject {found['weight_of_others']:.4f}", flush=True)  # fmt: skip
    return results


PARTS = {"memory": over_a_run, "phrases": phrases}


def weights(t, rows, base, bandwidth):
    """Mean squared prompt kernel of different phrasings of one subject, and of different subjects."""
    texts = {row["prompt"]: t[k] for k, row in enumerate(rows)}
    prompts = list(texts)
    k = GaussianKernel(bandwidth)(l2_normalize(torch.stack([texts[p] for p in prompts]))).square()
    same = torch.tensor([[base[a] == base[b] and a != b for b in prompts] for a in prompts])
    other = torch.tensor([[base[a] != base[b] for b in prompts] for a in prompts])
    return float(k[same].mean()), float(k[other].mean())


def draw(pipe, path, args):
    """Plot eight images each of some prompts, made two at a time: plain, and with a memory of the run."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    from kspec_guidance.plotting import image_grid

    args = argparse.Namespace(**{**vars(args), "images": 8, "batch": 2})
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    FigureCanvasAgg(figure)
    sides = {"plain": SPARKE(0.0), "repelled by all earlier images of similar prompts": SPARKE(1.0)}
    for axes, (label, guide) in zip(figure.subplots(1, 2), sides.items(), strict=True):
        images, _, _, rows, _, _ = make(pipe, [Prompt(n) for n in SHOWN], guide, "exact", args)
        tiles = [Image.fromarray((i.permute(1, 2, 0) * 255).byte().numpy()) for i in images]
        grid = [[tiles[k] for k, row in enumerate(rows) if row["prompt"] == name] for name in SHOWN]
        axes.imshow(image_grid(grid, gap=3))
        axes.set(xticks=[], yticks=[34 + 67 * k for k in range(len(SHOWN))], yticklabels=SHOWN)
        axes.tick_params(length=0, labelsize=9)
        axes.spines[:].set_visible(False)
        axes.set_title(label, fontsize=11)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130, bbox_inches="tight", pad_inches=0.1)


if __name__ == "__main__":
    main()
