"""What brings digits without a prompt nearer to ten classes in equal shares: scale, steps, kernel, memory, a baseline.

    python benchmarks/digits_target.py    # then python -m benchmarks.arena.page
    python benchmarks/digits_target.py --trials 12 --only "random references" plain "Gaussian kernel, fading moves"

Total variation of class shares to the target, as in benchmarks/arena/matching.py: of the 64 images of a run, which even
draws from the target miss by chance, and of the images of all runs together, where chance is less. Rows that are in the
file of results are not measured again.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arena.beds.base import Case
from benchmarks.arena.matching import BATCHES, digits, samples
from benchmarks.pages import table
from kspec_guidance import MMDGuidance
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, PolynomialKernel

REFERENCES = 512
RESULTS = Path(__file__).parent / "results" / "digits_target.json"
FADING = ("off_score", "rescale", "fade")
Make = Callable[[Tensor, float], Any]


def random_features(reference: Tensor, scale: float) -> MMDGuidance:
    """The default with 4,096 random Fourier features in place of the references."""
    rows = reference.flatten(1)
    kernel = GaussianKernel(float(GaussianKernel().fit(rows).bandwidth or 0))
    return MMDGuidance(reference, scale, feature_map=RandomFourierFeatures(kernel, rows.shape[1], 4096))


def narrow(share: float) -> Make:
    """Fading moves by a Gaussian kernel at this share of the median distance."""

    def make(reference: Tensor, scale: float) -> MMDGuidance:
        median = float(GaussianKernel().fit(reference.flatten(1)).bandwidth or 0)
        return MMDGuidance(reference, scale, GaussianKernel(share * median), transforms=FADING)

    return make


def settings(plain: Tensor) -> list[tuple[str, int, Make | None, tuple[float, ...]]]:
    """Name, steps, guide and scales. ``plain`` are samples of the model, for a baseline."""
    return [
        ("plain", 8, None, (0.0,)),
        ("cubic kernel", 8, lambda r, s: MMDGuidance(r, s, PolynomialKernel()), (0.3, 0.7, 1.5)),
        ("Gaussian kernel", 8, lambda r, s: MMDGuidance(r, s), (0.3, 0.7, 1.5)),
        ("cubic kernel, fading moves", 8, lambda r, s: MMDGuidance(r, s, PolynomialKernel(), transforms=FADING), (1.5, 3)),
        ("Gaussian kernel, fading moves", 8, lambda r, s: MMDGuidance(r, s, transforms=FADING), (1.0, 1.5, 2.0, 3.0)),
        ("Gaussian kernel at 0.45 of the median distance, fading moves", 8, narrow(0.45), (2.5,)),
        ("cubic kernel, to 90% of the run", 8, lambda r, s: MMDGuidance(r, s, PolynomialKernel(), stop=0.9), (0.3,)),
        ("random features", 8, random_features, (0.7,)),
        ("a baseline in place of batch and memory", 8, lambda r, s: MMDGuidance(r, s, baseline=plain), (0.3, 1.0)),
        ("cubic kernel, 24 steps", 24, lambda r, s: MMDGuidance(r, s, PolynomialKernel()), (0.1, 0.3)),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--only", nargs="+", help="settings by their names; all by default")
    parser.add_argument("--json", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    rows: list[dict[str, Any]] = json.loads(options.json.read_text())["rows"] if options.json.exists() else []
    target = digits()  # one for all rows: its references take minutes
    bed = target.bed
    plain = torch.cat([bed.run(Case("", 5000 + k), bed.images) for k in range(8)])

    def add(name: str, scale: float, found: list[Tensor], valid: list[float], distance: Callable[[Tensor], float]) -> None:
        each = [distance(x) for x in found]
        error = stdev(each) / len(each) ** 0.5 if len(each) > 1 else 0.0
        rows.append({
            "name": name, "scale": scale, "runs": options.trials, "distance": mean(each), "distance_se": error,
            "together": distance(torch.cat(found)), "valid": mean(valid),
        })  # fmt: skip
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
        options.json.write_text(json.dumps({"rows": rows}, indent=1) + "\n")

    def known(name: str, scale: float) -> bool:
        wanted = options.only is None or name in options.only
        return not wanted or any((row["name"], row["scale"], row["runs"]) == (name, scale, options.trials) for row in rows)

    if not known("random references", 0.0):  # with replacement, as an even model would draw
        pool, g = target.reference(REFERENCES, 0), torch.Generator().manual_seed(777)
        n = BATCHES * bed.images
        drawn = [pool[torch.randint(len(pool), (n,), generator=g)] for _ in range(options.trials)]
        add("random references", 0.0, drawn, [target.valid(x) for x in drawn], target.distance)
    for name, steps, make, scales in settings(plain):
        bed.steps = steps
        for scale in scales:
            if not known(name, scale):
                guide: Make = (lambda r, s: None) if make is None else make
                runs = [samples(target, guide, REFERENCES, scale, 100 + k) for k in range(options.trials)]
                add(name, scale, [x for x, _ in runs], [valid for _, valid in runs], target.distance)


def tables(rows: list[dict[str, Any]]) -> str:
    """A line for each setting."""
    lines = [
        [row["name"], f"{row['scale']:g}" if row["scale"] else "-", f"{row['runs']}",
         f"{row['distance']:.2f} ± {row['distance_se']:.2f}", f"{row['together']:.2f}", f"{row['valid']:.2f}"]
        for row in rows
    ]  # fmt: skip
    return table(["", "scale", "runs", "a run's 64 images", "all runs together", "valid"], lines)


if __name__ == "__main__":
    main()
