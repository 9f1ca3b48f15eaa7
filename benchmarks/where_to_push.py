"""What to move and how far, on a Gaussian mixture whose modes and likelihood are known.

    python benchmarks/where_to_push.py

32 dimensions, 16 modes, weights from 0.2 to 0.006 sharpened as by classifier-free guidance, exact denoiser, 50 DDIM
steps, 16 samples. Prints modes found and the share of samples inside a mode, means of 10 seeds.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from kspec_guidance import SPARKE, MMDGuidance
from kspec_guidance.kernels import GaussianKernel, PolynomialKernel
from tests import schedulers
from tests.mixture import GaussianMixture, denoise

MODEL = GaussianMixture()


def sample(guide, seed: int) -> torch.Tensor:
    scheduler = schedulers.make("DDIM")
    if guide is None:
        return denoise(MODEL, scheduler, 16, 50, seed)
    with guide.attach(scheduler):
        return denoise(MODEL, scheduler, 16, 50, seed)


def variety(make, seeds: int) -> tuple[float, float]:
    modes = valid = 0.0
    for seed in range(seeds):
        k, ok = MODEL.modes(sample(make(), seed))
        modes, valid = modes + len(set(k[ok].tolist())) / seeds, valid + float(ok.float().mean()) / seeds
    return modes, valid


def matching(make, seeds: int) -> tuple[float, float]:
    """Total variation between the mode shares of 4 batches and the reversed weights, and the share inside a mode."""
    target, total, valid = MODEL.weights.flip(0), 0.0, 0.0
    for trial in range(seeds):
        guide, shares = make(trial), torch.zeros(16)
        for batch in range(4):
            k, ok = MODEL.modes(sample(guide, 100 * trial + batch))
            shares += torch.bincount(k[ok], minlength=16) / 64
            valid += float(ok.float().mean()) / 4 / seeds
        total += float((shares - target).abs().sum() / 2) / seeds
    return total, valid


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/where_to_push.json"))
    args = parser.parse_args()
    scales = [0.1, 0.3, 0.6, 1.0, 2.0, 4.0, 8.0]
    narrow = GaussianKernel(0.7)
    guides = {
        "default transforms": lambda s: SPARKE(s),
        "papers' step on x0, every step": lambda s: SPARKE(s, narrow, stop=1.0, transforms=("rescale",)),
        "papers' step, first 60%": lambda s: SPARKE(s, narrow, transforms=("rescale",)),
        "papers' step on latents, every 10th": lambda s: SPARKE(
            s, narrow, space="latents", stop=1.0, every=10, transforms=("rescale",)
        ),
    }
    found = {"plain": variety(lambda: None, args.seeds)}
    print("plain: {:.1f} modes, {:.2f} valid".format(*found["plain"]))
    for name, make in guides.items():
        found[name] = {s: variety(lambda make=make, s=s: make(s), args.seeds) for s in scales}
        print(f"{name:40}" + "  ".join(f"{s:g}: {m:.1f} / {v:.2f}" for s, (m, v) in found[name].items()), flush=True)

    def reference(trial: int) -> torch.Tensor:
        g = torch.Generator().manual_seed(trial)
        return MODEL.sample(64, g, MODEL.weights.flip(0)).view(64, 1, 1, -1)

    matchers = {
        "plain": lambda trial, s: None,
        "MMD, default": lambda trial, s: MMDGuidance(reference(trial), s),
        "MMD, cubic kernel": lambda trial, s: MMDGuidance(reference(trial), s, PolynomialKernel()),
    }
    for name, make in matchers.items():
        strengths = [0.0] if name == "plain" else [0.3, 0.6, 1.0, 3.0]
        row = {s: matching(lambda trial, make=make, s=s: make(trial, s), max(2, args.seeds // 3)) for s in strengths}
        found[f"matching, {name}"] = row
        print(f"{name:40}" + "  ".join(f"{s:g}: {d:.2f} / {v:.2f}" for s, (d, v) in row.items()), flush=True)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
