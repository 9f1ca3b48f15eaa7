"""Run the arena: tune every method on one half of prompts and seeds, measure fronts on the other, write the page.

python -m benchmarks.arena                                # all of it; hours, resumable
python -m benchmarks.arena --small --out outputs/arena      # a small version, minutes
python -m benchmarks.arena --beds emoji --methods plain "SPARKE, ours"
python -m benchmarks.arena --beds mixture-8 --fresh --goal quality --trials 40 --tune-seeds 3 --seeds 10    # as measured
python -m benchmarks.arena --beds digits --swap --trials 12 --strengths 3 \
    --out benchmarks/results/arena/equal/swapped    # tuned on the other half's prompts, and measured on this half's
python -m benchmarks.arena --beds mixture-32 --seeds 100 --tuned-from benchmarks/results/arena \
    --out benchmarks/results/arena/equal    # fronts of the settings that are tuned there, on more seeds
python -m benchmarks.arena --beds mixture-32 --calls 4 --strengths 4 --tuned-from benchmarks/results/arena \
    --out benchmarks/results/arena/calls    # four calls for each case, with the memories that methods have
OMP_NUM_THREADS=1 python -m benchmarks.arena --beds emoji-transformer --jobs 11    # on eleven cores; the same figures
"""

import argparse
import functools
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch

from kspec_guidance.bench.methods import METHODS

from .batched import Batch
from .beds import BEDS
from .beds.analytic import Analytic
from .harness import Record, front, mean, plain, take_tuned, tune
from .quality import quality_goal
from .workers import Workers

ROOT = Path(__file__).parents[2]
TOGETHER = 4  # methods measured at the same time with several jobs, so that few jobs wait for the last case of a trial


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=list(BEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--tune-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--strengths", type=int, default=5)
    parser.add_argument("--images", type=int, help="of a call, where they are not to be as many as a bed usually has")
    parser.add_argument("--calls", type=int, default=1, help="calls of the pipeline for each prompt and seed")
    parser.add_argument(
        "--fresh", action="store_true", help="report on prompts on which nothing was chosen, if a bed has them"
    )
    parser.add_argument("--swap", action="store_true", help="tune on the prompts of the report, report on those of tuning")
    parser.add_argument("--goal", choices=["validity", "quality"], default="validity", help="tune for modes at equal what")
    parser.add_argument("--tuned-from", type=Path, help="folder of results whose tuned settings are taken, without tuning")
    parser.add_argument("--docs", type=Path, help="write the pages and figures into this folder at the end")
    parser.add_argument("--jobs", type=int, default=1, help="processes that share the cases of a bed; 1: this one")
    parser.add_argument(
        "--batched", action="store_true", help="mixtures: images that are made one by one, of all cases in one batch"
    )
    parser.add_argument("--small", action="store_true", help="few trials, prompts and images: checks that everything works")
    args = parser.parse_args()
    if args.swap and args.fresh:
        parser.error("--swap reports on the prompts of tuning: it cannot be used with --fresh")
    if args.small:
        args.trials, args.tune_seeds, args.seeds, args.strengths = 2, 1, 1, 3
    torch.set_grad_enabled(False)
    for name in args.beds:
        bed = BEDS[name]()
        if args.small:
            bed.images, bed.prompts = 6, lambda half, every=bed.prompts: every(half)[:2]
        usual_images = bed.images
        bed.images = args.images or bed.images
        bed.calls, bed.fresh, bed.swapped = args.calls, args.fresh, args.swap
        record = Record(args.out, bed)
        for option, usual, given in (
            ("goal", "validity", args.goal), ("calls", 1, args.calls), ("fresh", False, args.fresh),
            ("swap", False, args.swap), ("images", usual_images, bed.images),
        ):  # fmt: skip
            known = record.data.get("settings", {}).get(option, usual)
            if record.data["methods"] and known != given:
                parser.error(f"the results in {record.path} have --{option} {known}; give it so, or another --out")
        record.data["settings"] = {
            "images": bed.images, "steps": bed.steps, "guidance_scale": bed.guidance_scale, "trials": args.trials,
            "diversity": bed.diversity, "fidelity": bed.fidelity, "goal": args.goal, "calls": args.calls,
            "fresh": args.fresh, "swap": args.swap, "seeds": args.seeds,
            "prompts": [c.prompt for c in bed.cases("report", args.seeds)],
        }  # fmt: skip
        if args.tuned_from is not None:
            take_tuned(record, Record(args.tuned_from, bed))
        goal = functools.partial(quality_goal, bed) if args.goal == "quality" else None
        if args.batched and isinstance(bed, Analytic):
            bed.workers = Batch(bed)
        elif args.jobs > 1:
            bed.workers = Workers(name, bed.images, bed.calls, args.jobs, bed.swapped)
        base = plain(bed, record, "report", args.seeds)
        print(f"{bed.name}: plain {mean(base[bed.diversity]):.2f} {bed.diversity}, "
              f"{mean(base[bed.fidelity]):.3f} {bed.fidelity}, {mean(base['seconds']):.2f} s", flush=True)  # fmt: skip
        methods = [m for m in args.methods if m != "plain" and bed.fits(METHODS[m])]
        if args.tuned_from is not None:
            methods = [m for m in methods if not METHODS[m].tuned or "tuned" in record.of(m)]
        measured = functools.partial(measure_method, args, bed, record, goal)
        if not isinstance(bed.workers, Workers):
            for method in methods:
                measured(method)
            continue
        if any("tuned" not in record.data["methods"].get(m, {}) for m in methods):
            plain(bed, record, "tune", args.tune_seeds)  # once, before several methods ask for it
        with ThreadPoolExecutor(TOGETHER) as threads:
            waiting = [threads.submit(measured, method) for method in methods]
        bed.workers.close()
        for done in waiting:  # a method that failed did not stop the others
            done.result()
    if args.docs is not None:
        from .page import write

        write(args.out, args.docs)


def measure_method(args: argparse.Namespace, bed: Any, record: Record, goal: Any, method: str) -> None:
    """Tune a method, measure its front, and print a line of both."""
    torch.set_grad_enabled(False)  # of this thread
    began = time.perf_counter()
    tuned = tune(bed, method, record, args.trials, args.tune_seeds, goal)
    front(bed, method, record, args.strengths, args.seeds)
    points = "  ".join(
        f"{p['strength']:.3g}: {mean(p['cases'][bed.diversity]):.2f} / {mean(p['cases'][bed.fidelity]):.3f}"
        for p in sorted(record.of(method).get("front", []), key=lambda p: p["strength"])
    )
    short = {k: round(v, 3) for k, v in tuned.items()}
    print(f"  {method:26} {points}   {short}   {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
