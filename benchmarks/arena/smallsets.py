"""Sets of 4, 8 and 16 images, with the settings that were tuned for 16.

python -m benchmarks.arena.smallsets
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kspec_guidance.bench.fronts import weights
from kspec_guidance.bench.methods import METHODS

from .beds import BEDS
from .harness import measure, slug

ROOT = Path(__file__).parents[2]
SHOWN = ["SPARKE, ours, order 0.5", "SPARKE, ours", "OSCAR", "DiverseFlow", "interval CFG", "SPARKE, authors' code",
         "particle guidance", "CADS", "group inference"]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=["mixture-8", "mixture-32"])
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--methods", nargs="+", default=["plain", *SHOWN], choices=["plain", *SHOWN])
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results" / "arena")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    out = args.results / "smallsets.json"
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    for name in args.beds:
        bed = BEDS[name]()
        tuned = json.loads((args.results / f"{slug(bed.name)}.json").read_text())["methods"]
        cases = bed.cases("report", args.seeds)
        w = weights([c.prompt for c in cases])
        for images in (4, 8, 16):
            bed.images = images
            base = measure(bed, METHODS["plain"], cases)
            for method in args.methods:
                found = measure(bed, lambda m=method, t=tuned: METHODS[m](**t[m].get("tuned", {})), cases)
                modes, plain = w @ np.array(found["modes"]), w @ np.array(base["modes"])
                low, high = np.quantile(modes / plain - 1, [0.025, 0.975])
                results.setdefault(bed.name, {}).setdefault(method, {})[str(images)] = {
                    "modes": float(modes[0]), "gain": float(modes[0] / plain[0] - 1), "low": float(low),
                    "high": float(high), "valid": float(np.mean(found["valid"])),
                }  # fmt: skip
                r = results[bed.name][method][str(images)]
                print(f"{bed.name:34}{images:4}  {method:26}{r['modes']:.2f} {r['gain']:+.0%} {r['valid']:.3f}", flush=True)
    out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
