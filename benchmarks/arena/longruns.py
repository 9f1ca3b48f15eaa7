"""Long runs: batches of 1, 4 and 16 with memories of several kinds.

    python -m benchmarks.arena.longruns

On the mixture of 32 dimensions, whose occupancy is exact: 1,024 samples of one prompt, 256 in batches of one.
*Evenness* is the effective number of the prompt's modes among valid samples (exp of the entropy of their shares); *rare*
is how many of the prompt's modes hold at least half of an even share.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kspec_guidance import SPARKE, CentroidMemory, KernelGuidance, VendiGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel

from .beds.analytic import COUNTS, Analytic
from .beds.base import Case
from .harness import mean

ROOT = Path(__file__).parents[2]
TOTAL, RUNS = 1024, 256


def random_features(scale: float) -> KernelGuidance:
    kernel, prompts = GaussianKernel(0.7), GaussianKernel(0.35)
    phi, psi = RandomFourierFeatures(kernel, 32, 2048), RandomFourierFeatures(prompts, 12, 64)
    return SPARKE(scale, kernel, feature_map=phi, prompt_feature_map=psi)


GUIDES: dict[str, Callable[[float], KernelGuidance] | None] = {
    "plain": None,
    "SPARKE, all rows": lambda s: SPARKE(s),
    "SPARKE, 64 weighted means": lambda s: SPARKE(s, memory=CentroidMemory(64)),
    "SPARKE, 2,048 random features, bandwidth 0.7": random_features,
    "order 0.5, 128 nearest rows": lambda s: VendiGuidance(s, order=0.5),
    "order 0.5, 64 weighted means": lambda s: VendiGuidance(s, order=0.5, memory=CentroidMemory(64)),
    "SPARKE, authors' code": lambda s: SPARKE.published(s),
}
SCALES = {"SPARKE, authors' code": (0.05, 0.15)}


def long_run(make: Callable[[float], KernelGuidance] | None, scale: float, batch: int, prompt: str, seed: int) -> dict:
    bed = Analytic(32, skewed=True)
    guide = None if make is None else make(scale)
    found = []
    for k in range(min(RUNS, TOTAL // batch)):
        case = Case(prompt, seed + k)
        if guide is None:
            found.append(bed.run(case, batch))
        else:
            with guide.attach(bed.pipe):
                found.append(bed.run(case, batch))
    x = torch.nan_to_num(torch.cat(found), 0.0, 1e3, -1e3)
    shares = bed.shares(prompt)
    which, inside = bed.assign(bed.rows(x))
    inside = inside & (shares[which] >= COUNTS)
    counts = torch.bincount(which[inside], minlength=len(shares)).double()
    p = counts[counts > 0] / counts.sum().clamp_min(1)
    modes = int((shares >= COUNTS).sum())
    return {
        "evenness": float(torch.exp(-(p * p.log()).sum())), "of": float(modes),
        "rare": float((counts >= 0.5 * len(x) / modes).sum()), "valid": float(inside.float().mean()),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "longruns.json")
    parser.add_argument("--guides", nargs="+", default=list(GUIDES), choices=list(GUIDES))
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    names = Analytic(32, skewed=True).prompts("report")[: args.prompts]
    results = json.loads(args.out.read_text()) if args.out.exists() else {}
    for batch in (16, 4, 1):
        for label in args.guides:
            make = GUIDES[label]
            by: dict[str, Any] = {}
            for scale in (0.0,) if make is None else SCALES.get(label, (1.0, 4.0)):
                runs = [long_run(make, scale, batch, p, 50_000) for p in names]
                by[str(scale)] = {k: mean([r[k] for r in runs]) for k in runs[0]}
            # the highest evenness among scales that lose at most 0.02 of validity
            plain = results.get(f"batch {batch}", {}).get("plain", {}).get("valid", 0.0)
            keep = {s: r for s, r in by.items() if r["valid"] >= plain - 0.02} or by
            best = max(keep, key=lambda s: keep[s]["evenness"])
            results.setdefault(f"batch {batch}", {})[label] = {"scale": float(best), **by[best]}
            print(batch, label, best, {k: round(v, 3) for k, v in by[best].items()}, flush=True)
            args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
