"""Growth of time with rows, their width, batch, memory, prompts and processes, against the exponents of the theory.

    OMP_NUM_THREADS=1 python -m benchmarks.growth          # a minute on one core
    OMP_NUM_THREADS=1 python -m benchmarks.growth --plot   # the figure from the results

Processor time on one thread, medians of interleaved repeats. An exponent is the slope of a line through the logarithms of
time and size over the larger half of the sizes, where the leading term counts most. Writes results/growth.json and
docs/growth.png.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.interleaved import machine, time_calls
from kspec_guidance import functional as F
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.run import ascent_direction
from kspec_guidance.kernels import CosineKernel, GaussianKernel, l2_normalize
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.metrics import VendiScore
from kspec_guidance.objectives import ConditionalRKE
from kspec_guidance.synthesis.distributed import add_message, encode_message

RESULTS = Path(__file__).parent / "results" / "growth.json"
FIGURE = Path(__file__).parents[1] / "docs" / "growth.png"
KERNEL = GaussianKernel(1.0)
LATENT, PROMPT = 4096, 64  # numbers of a latent and of a prompt


class Work(NamedTuple):
    """Something that is timed at several sizes: exponent of its leading term, and the call at a size."""

    against: str
    theory: float
    sizes: tuple[int, ...]
    make: Callable[[int], Callable[[], Any]]


def rows(n: int, d: int, seed: int = 0) -> torch.Tensor:
    return l2_normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)))


def of_sets(score: Callable[..., Any]) -> Callable[[int], Callable[[], Any]]:
    """A score of two sets of n rows of 64 numbers."""

    def make(n: int) -> Callable[[], Any]:
        x, y = rows(n, 64), rows(n, 64, 1)
        return lambda: score(x, y)

    return make


def of_width(score: Callable[..., Any], n: int) -> Callable[[int], Callable[[], Any]]:
    """A score of n rows of d numbers."""

    def make(d: int) -> Callable[[], Any]:
        x = rows(n, d)
        return lambda: score(x)

    return make


def streamed(n: int) -> Callable[[], Any]:
    x = rows(n, 64)

    def call() -> None:
        metric = VendiScore(KERNEL, num_features=256)
        for block in x.split(1024):
            metric.update(block)

    return call


def direction(entries: int = 1000, batch: int = 1, width: int = LATENT, prompts: int = 1, means: bool = False) -> Callable:
    """The direction of a guided step: ``batch`` samples of one prompt, and a memory of rows of several prompts."""
    memory = CentroidMemory(256) if means else MemoryBank()
    texts = rows(max(prompts, 1), PROMPT, 2)
    memory.add(rows(entries, width), texts[torch.arange(entries) * prompts // entries])
    x, t, objective = rows(batch, width, 1), texts[:1].expand(batch, -1), ConditionalRKE(KERNEL)
    return lambda: ascent_direction(objective, x, t, memory)


def exchange(processes: int) -> Callable[[], Any]:
    """Rows of one batch of each process, added to the memory of one."""
    message = encode_message(MemoryBank(), rows(8, LATENT), rows(8, PROMPT, 2))

    def call() -> None:
        memory = MemoryBank()
        for _ in range(processes):
            add_message(memory, message, (LATENT,), PROMPT)

    return call


SCORES: dict[str, Work] = {
    "Vendi": Work("rows", 3, (125, 250, 500, 1000), of_sets(lambda x, y: F.vendi_score(x, KERNEL))),
    "Vendi, cosine": Work("rows", 1, (1000, 4000, 16000), of_sets(lambda x, y: F.vendi_score(x, CosineKernel()))),
    "Vendi, streamed": Work("rows", 1, (1024, 4096, 16384), streamed),
    "RKE": Work("rows", 2, (500, 1000, 2000, 4000), of_sets(lambda x, y: F.rke_score(x, KERNEL))),
    "conditional RKE": Work("rows", 2, (500, 1000, 2000), of_sets(lambda x, y: F.conditional_rke_score(x, y, KERNEL))),
    "MMD": Work("rows", 2, (500, 1000, 2000, 4000), of_sets(lambda x, y: F.mmd(x, y, KERNEL))),
    "KID, one subset": Work(
        "rows", 2, (500, 1000, 2000), lambda n: of_sets(lambda x, y: F.kid(x, y, subsets=1, subset_size=n // 2))(n)
    ),
    "KEN": Work("rows", 3, (125, 250, 500, 1000), of_sets(lambda x, y: F.ken_score(x, y, KERNEL))),
    "Scendi": Work("rows", 1, (2000, 8000, 16000), of_sets(lambda x, y: F.scendi_score(x, y))),
    "precision to coverage": Work("rows", 2, (500, 1000, 2000), of_sets(F.neighbour_scores)),
}
WIDTHS: dict[str, Work] = {
    "Vendi, 500 rows": Work(
        "numbers of a row", 1, (1024, 4096, 16384), of_width(lambda x: F.vendi_score(x, KERNEL), 500)
    ),
    "RKE, 2,000 rows": Work("numbers of a row", 1, (256, 1024, 4096), of_width(lambda x: F.rke_score(x, KERNEL), 2000)),
    "Vendi, cosine, 4,000 rows": Work(
        "numbers of a row", 3, (128, 256, 512), of_width(lambda x: F.vendi_score(x, CosineKernel()), 4000)
    ),
    "random features of 500 rows": Work(
        "numbers of a row", 1, (256, 1024, 4096),
        lambda d: (lambda phi, x: lambda: phi(x))(RandomFourierFeatures(KERNEL, d, 512), rows(500, d)),
    ),
}  # fmt: skip
STEPS: dict[str, Work] = {
    "step: rows of the prompt": Work("rows of the memory", 1, (250, 1000, 4000), lambda n: direction(entries=n)),
    "step: entries, 256 means": Work(
        "entries of the memory", 0, (500, 2000, 4000), lambda n: direction(entries=n, means=True)
    ),
    "step: numbers of a latent": Work(
        "numbers of a latent", 1, (1024, 4096, 16384), lambda d: direction(width=d)
    ),
    "step: batch": Work("batch", 1, (1, 4, 16, 64), lambda b: direction(batch=b)),
    "step: prompts, 100 rows each": Work(
        "prompts", 0, (10, 40, 80), lambda p: direction(entries=100 * p, prompts=p, width=1024)
    ),
    "exchange of a synthesis": Work("processes", 1, (2, 8, 32, 128), exchange),
}  # fmt: skip
PANELS = {"Scores against rows": SCORES, "Scores against width": WIDTHS, "The direction of a guided step": STEPS}


def exponent(sizes: list[int], seconds: list[float]) -> float:
    """Slope through the logarithms over the larger half of the sizes."""
    half = len(sizes) // 2
    slope, _ = np.polyfit(np.log(sizes[half:]), np.log(seconds[half:]), 1)
    return float(slope)


def measured(repeats: int) -> Iterator[dict[str, Any]]:
    for panel, works in PANELS.items():
        for name, work in works.items():
            calls = {str(size): work.make(size) for size in work.sizes}
            timed = time_calls(calls, to=str(work.sizes[0]), repeats=repeats, cpu=True)
            seconds = [timed[str(size)].seconds for size in work.sizes]
            row = {
                "panel": panel, "work": name, "against": work.against, "theory": work.theory, "sizes": list(work.sizes),
                "ms": [1e3 * s for s in seconds], "exponent": exponent(list(work.sizes), seconds),
            }  # fmt: skip
            print(f"{name}: {row['exponent']:.2f} (theory {work.theory:g})", [f"{ms:.3g}" for ms in row["ms"]], flush=True)
            yield row


def plot(data: dict[str, Any]) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(PANELS), figsize=(13, 6), layout="constrained")
    for panel, axis in zip(PANELS, axes, strict=True):
        for row in (row for row in data["rows"] if row["panel"] == panel):
            relative = [size / row["sizes"][0] for size in row["sizes"]]
            label = f"{row['work']}: {row['exponent']:.1f} ({row['theory']:g})"
            axis.loglog(relative, row["ms"], "o-", ms=3, lw=1, label=label)
        axis.set(title=panel, xlabel="size over the smallest", ylabel="time, ms")
        axis.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(0, -0.12))
    figure.savefig(FIGURE, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plot", action="store_true", help="only draw the results that are there")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    if not options.plot:
        torch.set_num_threads(1)
        data = {"machine": machine(), "threads": 1, "rows": list(measured(options.repeats))}
        RESULTS.write_text(json.dumps(data, indent=1) + "\n")
    plot(json.loads(RESULTS.read_text()))


if __name__ == "__main__":
    main()
