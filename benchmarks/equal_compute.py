"""Group inference against guides at equal compute: more candidates than are kept, and a diverse subset of them.

    python benchmarks/equal_compute.py --beds mixture-8 mixture-32 --seeds 20
    python benchmarks/equal_compute.py --beds emoji-transformer-distilled --seeds 5
    python benchmarks/equal_compute.py --page docs/arena/ablations.md       # the tables of what has been measured

``CANDIDATES`` samples are made for each that is kept. They are kept at random, or a subset is chosen greedily so that the
smallest distance is largest, by the finished samples ("of 4, all steps") or by the predictions of a few steps ("of 4, a few
steps"): group inference, if the samples are plain. The same selection goes with guides: they act on all candidates as one
batch, or on the images whose start noises were chosen by the few steps of plain sampling. Guides have the settings that the
arena tuned for them, and multiples of their strength. Results are kept for each setting and block of five seeds, from which
an interrupted run continues.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.batched import Setting, run
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import Bed, Case
from benchmarks.arena.harness import FIDELITY_LOSS, Record
from benchmarks.arena.quality import change
from benchmarks.easing import joined, judged, measure_settings
from kspec_guidance.bench.fronts import matched
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.base import Method
from kspec_guidance.bench.methods.selection import GroupInference, varied

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "arena"
CANDIDATES = 4
ONCE, FEW, RANDOM, ALL = "one each", "of 4, a few steps", "of 4, at random", "of 4, all steps"
GUIDES = ("SPARKE, ours", "SPARKE, ours, order 0.5", "OSCAR", "DiverseFlow")
FACTORS = (0.25, 0.5, 1.0)  # of the tuned strength
SHOWN = {"modes": "modes", "on_data": "on the data", "agreement": "agreement", "coverage": "coverage",
         "frechet_distance": "Frechet distance"}  # fmt: skip
PLAIN = "plain"


def look(bed: Bed) -> int:
    """Steps after which candidates are compared: a tenth of the run."""
    return max(1, round(bed.steps / 10))


def cost(bed: Bed, guide: str, keep: str) -> float:
    """Steps of the denoiser for each image that is kept, in those of plain sampling.

    What is chosen after a few plain steps goes on from there; a guide begins anew, since it acts on the first steps too.
    """
    if keep == FEW:
        return (CANDIDATES * look(bed) + bed.steps - (look(bed) if guide == PLAIN else 0)) / bed.steps
    return 1.0 if keep == ONCE else float(CANDIDATES)


def method(bed: Bed, guide: str, factor: float) -> Method:
    """A method as the arena tuned it on a bed, with a multiple of its strength."""
    found = Record(RESULTS, bed).of(guide)["tuned"]
    strength = METHODS[guide].strength
    return METHODS[guide](**{**found, strength: factor * found[strength]})


def setting(bed: Bed, guide: str, factor: float) -> Setting:
    """The same for the mixtures in one batch; OSCAR without its noise, whose tuned weights are below 0.003."""
    if guide == PLAIN:
        return Setting()
    m: Any = method(bed, guide, factor)
    if guide == "OSCAR":
        return Setting(scale=m.weight, log_det=True, early=True, c=m.c)
    if guide == "DiverseFlow":
        return Setting(scale=m.weight, dpp=m.h)
    return Setting(scale=m.scale, order=0.5 if guide.endswith("order 0.5") else 2.0, stop=m.stop)


Make = Callable[[list[Case], list[Tensor] | None, int], list[Tensor]]


def on_mixture(bed: Analytic, guide: str, factor: float) -> Make:
    """Samples of all cases in one batch, from given start noises or a number of the bed's own."""

    def make(cases: list[Case], starts: list[Tensor] | None, n: int) -> list[Tensor]:
        starts = [bed.start(case, n).flatten(1) for case in cases] if starts is None else starts
        return list(run(bed, cases, setting(bed, guide, factor), torch.stack(starts)))

    return make


def on_bed(bed: Bed, guide: str, factor: float) -> Make:
    """The same with the pipeline of a bed."""

    def make(cases: list[Case], starts: list[Tensor] | None, n: int) -> list[Tensor]:
        found = []
        for k, case in enumerate(cases):
            m = METHODS[PLAIN]() if guide == PLAIN else method(bed, guide, factor)
            m.generator.manual_seed(case.seed)
            with m.attach(bed.pipe):
                found.append(bed.run(case, n, None if starts is None else starts[k]))
        return found

    return make


@functools.lru_cache(maxsize=1)
def candidates(bed: Bed, guide: str, factor: float, cases: tuple[Case, ...]) -> list[Tensor]:
    """Finished samples, ``CANDIDATES`` for each that is kept; the last ones are remembered for the next selection."""
    return _make(bed, guide, factor)(list(cases), None, CANDIDATES * bed.images)


def _make(bed: Bed, guide: str, factor: float) -> Make:
    return on_mixture(bed, guide, factor) if isinstance(bed, Analytic) else on_bed(bed, guide, factor)


def chosen_starts(bed: Bed, cases: list[Case]) -> list[Tensor]:
    """Start noises whose plain predictions after a few steps differ most."""
    starts = [bed.start(case, CANDIDATES * bed.images) for case in cases]
    if isinstance(bed, Analytic):
        starts = [z.flatten(1) for z in starts]
        found = list(run(bed, cases, Setting(), torch.stack(starts), until=look(bed)))
    else:
        found = [GroupInference().predictions(bed, c, z, look(bed)) for c, z in zip(cases, starts, strict=True)]
    return [z[varied(x0.flatten(1), bed.images)] for z, x0 in zip(starts, found, strict=True)]


def samples(bed: Bed, guide: str, factor: float, keep: str, cases: list[Case]) -> list[Tensor]:
    """The samples that are kept of each case."""
    if keep == ONCE:
        return _make(bed, guide, factor)(cases, None, bed.images)
    if keep == FEW:
        return _make(bed, guide, factor)(cases, chosen_starts(bed, cases), bed.images)
    found = candidates(bed, guide, factor, tuple(cases))
    if keep == ALL:
        return [x[varied(x.flatten(1), bed.images)] for x in found]
    orders = [
        torch.randperm(len(x), generator=torch.Generator().manual_seed(c.seed)) for x, c in zip(found, cases, strict=True)
    ]
    return [x[order[: bed.images]] for x, order in zip(found, orders, strict=True)]


def labels(guides: tuple[str, ...], factors: tuple[float, ...]) -> dict[str, tuple[str, float, str]]:
    """Guide, factor of its strength and selection, by label."""
    rows = [(PLAIN, 1.0, keep) for keep in (ONCE, FEW, RANDOM, ALL)]
    rows += [(guide, f, keep) for guide in guides for f in factors for keep in (ONCE, FEW, RANDOM, ALL)]
    return {f"{guide} x{f:g}, {keep}": (guide, f, keep) for guide, f, keep in rows}


BASE = f"{PLAIN} x1, {ONCE}"


def gain(found: list[dict[str, np.ndarray]]) -> np.ndarray:
    """The gain in modes at equal quality of a front of settings, weakest first, for each draw of the bootstrap."""
    g, kept = (np.stack([f[k] for f in found], 1) for k in ("modes", "kept"))
    return matched(g - 1, kept)


def interval(values: np.ndarray) -> str:
    low, high = np.quantile(values, [0.025, 0.975])
    return f"{100 * values[0]:+.0f}% [{100 * low:+.0f}, {100 * high:+.0f}]"


def table(name: str, found: dict[str, Any]) -> str:
    """A row for each guide and selection, by cost.

    Figures are those at the strength that gains most at equal quality, else at the weakest.
    """
    bed = BEDS[name]()
    measured, w, seeds = joined(found)
    base = measured[BASE]
    fronts: dict[tuple[str, str], list[tuple[float, dict[str, np.ndarray]]]] = {}
    for label, (guide, factor, keep) in labels(GUIDES, FACTORS).items():
        if label in measured:
            fronts.setdefault((keep, guide), []).append((factor, change(measured[label], base, w)))
    rows = [[PLAIN, ONCE, "1", "", *(f"{base[k].mean():.3g}" for k in SHOWN), "", ""]]
    for (keep, guide), front in sorted(fronts.items(), key=lambda item: cost(bed, item[0][1], item[0][0])):
        if (keep, guide) == (ONCE, PLAIN):
            continue
        equal = [p for p in front if p[1]["kept"][0] >= -FIDELITY_LOSS]
        factor, shown = max(equal, key=lambda p: p[1]["modes"][0]) if equal else front[0]
        cells = [f"x{shown[k][0]:.2f}" if k in ("modes", "frechet_distance") else f"{shown[k][0]:+.3f}" for k in SHOWN]
        strength = "" if guide == PLAIN else f"x{factor:g}"
        best, ours = (gain([p[1] for p in f]) if f else None for f in (front, fronts.get((keep, GUIDES[0]))))
        assert best is not None
        behind = "" if ours is None or guide == GUIDES[0] else interval(best - ours)
        rows.append([guide, keep, f"{cost(bed, guide, keep):.3g}", strength, *cells, interval(best), behind])
    title = f"{found['bed']}, {found['steps']} steps, {seeds} seeds"
    return pages.table(
        [title, "kept", "compute", "strength", *SHOWN.values(), "gain at equal quality", "less that of ours"], rows
    )


def tables(path: Path) -> str:
    """The tables of all beds in a file of results."""
    if not path.exists():
        return "(not measured)"
    return "\n\n".join(table(name, found) for name, found in json.loads(path.read_text("utf-8")).items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=[])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--guides", nargs="*", default=list(GUIDES), choices=GUIDES)
    parser.add_argument("--factors", nargs="*", type=float, default=list(FACTORS), help="of the tuned strength")
    parser.add_argument("--out", type=Path, default=RESULTS / "equal_compute.json")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in args.beds:
        bed, known = BEDS[name](), labels(tuple(args.guides), tuple(args.factors))
        found = measure_settings(
            args.out, name, bed, "report", args.seeds, known,
            lambda label, cases, bed=bed, known=known: judged(bed, samples(bed, *known[label], cases), cases),
        )  # fmt: skip
        print(table(name, found), flush=True)
    if args.page is not None:
        pages.fill(args.page, {"equal compute": tables(args.out)})


if __name__ == "__main__":
    main()
