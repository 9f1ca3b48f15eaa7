"""Why methods tie: how much room a bed leaves, and whether methods push in the same directions.

    python benchmarks/why_ties.py --seeds 4
    python benchmarks/why_ties.py --page docs/arena/ablations.md       # the tables of what has been measured

*Room*: modes in as many true samples as a run has, and in those of four plain runs that the judge itself would choose.
*Directions*: each method's displacement of finished samples, from the same start noises, against that of ``vivid``: the
cosine, over all samples of a run at once. At its tuned strength, and at a fiftieth, where the response is linear.
Results are kept bed by bed, from which an interrupted run continues.
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
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Bed, Case
from benchmarks.arena.harness import Record
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.utils.atomic_io import replacing

ROOT = Path(__file__).parents[1]
NAMES = ("mixture-8", "mixture-32", "mixture-64", "digits", "emoji-transformer", "emoji-transformer-distilled")
REFERENCE = "SPARKE, ours, order 0.5"
OTHERS = ("SPARKE, ours", "OSCAR", "DiverseFlow, no backward", "SPELL", "particle guidance, pooled")
CANDIDATES = 4  # plain runs from which the judge chooses
SMALL = 1 / 50  # of the tuned strength
Figures = dict[str, list[float]]


def best_of(bed: Bed, rows: Tensor, case: Case) -> dict[str, float]:
    """The judge's figures of as many of the rows as a run has, chosen one by one for modes and then validity."""
    chosen: list[int] = []
    for _ in range(bed.images):
        left = [k for k in range(len(rows)) if k not in chosen]

        def gain(k: int) -> tuple[float, float]:
            found = bed.figures(rows[[*chosen, k]], case)
            return found[bed.diversity], found[bed.fidelity]

        chosen.append(max(left, key=gain))
    return bed.figures(rows[chosen], case)


def room(bed: Bed, cases: list[Case]) -> dict[str, Figures]:
    """Modes and validity of plain runs, of true samples, and of the best of several plain runs, by case."""
    found: dict[str, Figures] = {}

    def add(name: str, figures: dict[str, float]) -> None:
        for key, figure in (("modes", bed.diversity), ("valid", bed.fidelity)):
            found.setdefault(name, {}).setdefault(key, []).append(figures[figure])

    for case in cases:
        truth = bed.truth(case.prompt)
        drawn = torch.randperm(len(truth), generator=torch.Generator().manual_seed(case.seed))[: bed.images]
        runs = [bed.rows(bed.run(Case(case.prompt, case.seed + 1000 * k), bed.images)) for k in range(CANDIDATES)]
        add("plain", bed.figures(runs[0], case))
        add("true samples", bed.figures(truth[drawn], case))
        add("chosen", best_of(bed, torch.cat(runs), case))
    return found


def directions(bed: Bed, cases: list[Case], tuned: dict[str, dict[str, Any]]) -> dict[str, Figures]:
    """Cosines of the displacement by each method with that by the reference, by case."""
    found: dict[str, Figures] = {}
    for name, share in (("tuned", 1.0), ("small", SMALL)):
        for case in cases:
            plain = bed.run(case, bed.images)

            def moved(method: str, share: float = share, case: Case = case, plain: Tensor = plain) -> Tensor:
                cls = METHODS[method]
                about = dict(tuned[method]) | {cls.strength: tuned[method][cls.strength] * share}
                if "noise_weight" in about:
                    about["noise_weight"] = 0.0  # its noise has no direction
                return (bed.sample(cls(**about), case) - plain).flatten().double()

            reference = moved(REFERENCE)
            for method in OTHERS:
                if method in tuned:
                    cosine = cosine_similarity(reference, moved(method), dim=0)
                    found.setdefault(method, {}).setdefault(name, []).append(float(cosine))
    return found


def tables(path: Path) -> str:
    """Both tables of what has been measured."""
    if not path.exists():
        return "(not measured)"
    results = json.loads(path.read_text("utf-8"))

    def shown(values: list[float], digits: int = 2) -> str:
        error = stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
        return f"{mean(values):.{digits}f} ± {error:.{digits}f}"

    names = {"plain": "plain", "true samples": "true samples", "chosen": f"the best of {CANDIDATES} plain runs"}
    rooms = [
        [about["bed"], str(about["images"]), *(
            f"{mean(about['room'][k]['modes']):.2f}, {mean(about['room'][k]['valid']):.2f}" for k in names
        )]
        for about in results.values()
    ]  # fmt: skip
    cosines = [
        [about["bed"], *(
            f"{shown(about['directions'][m]['tuned'])}, {mean(about['directions'][m]['small']):.2f}"
            if m in about["directions"] else "-" for m in OTHERS
        )]
        for about in results.values()
    ]  # fmt: skip
    label: Callable[[str], str] = lambda m: "`default`" if m == "SPARKE, ours" else m  # noqa: E731
    return "\n\n".join([
        pages.table(["modes, valid", "images", *names.values()], rooms),
        pages.table(["cosine with `vivid`: tuned, small", *map(label, OTHERS)], cosines),
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=list(NAMES), choices=NAMES)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--prompts", type=int, default=5)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "why_ties.json")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    results: dict[str, Any] = json.loads(args.out.read_text("utf-8")) if args.out.exists() else {}
    for name in args.beds if args.seeds else []:
        if name in results:
            continue
        bed = BEDS[name]()
        prompts = bed.prompts("report")[: args.prompts]
        cases = [case for case in bed.cases("report", args.seeds) if case.prompt in prompts]
        record = Record(ROOT / "benchmarks" / "results" / "arena", bed).data["methods"]
        tuned = {m: record[m]["tuned"] for m in (REFERENCE, *OTHERS) if "tuned" in record.get(m, {})}
        results[name] = {"bed": bed.name, "images": bed.images, "seeds": args.seeds, "prompts": prompts,
                         "room": room(bed, cases), "directions": directions(bed, cases, tuned)}  # fmt: skip
        rounded = json.loads(json.dumps(results), parse_float=lambda s: float(f"{float(s):.5g}"))
        with replacing(args.out) as fresh:
            fresh.write_text(json.dumps(rounded, separators=(",", ":")) + "\n", encoding="utf-8")
        print(name, "done", flush=True)
    if args.seeds:
        print(tables(args.out))
    if args.page is not None:
        pages.fill(args.page, {"why ties": tables(args.out)})


if __name__ == "__main__":
    main()
