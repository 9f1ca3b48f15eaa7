"""Run the arena: tune every method on one half of prompts and seeds, measure fronts on the other, write the page.

python -m benchmarks.arena                                # all of it; hours, resumable
python -m benchmarks.arena --small --out outputs/arena      # a small version, minutes
python -m benchmarks.arena --beds emoji --methods plain "SPARKE, ours"
python -m benchmarks.arena --beds mixture-32 --seeds 100 --tuned-from benchmarks/results/arena \
    --out benchmarks/results/arena/equal    # fronts of the settings that are tuned there, on more seeds
"""

import argparse
import functools
import time
from pathlib import Path

import torch

from kspec_guidance.bench.methods import METHODS

from .beds import BEDS
from .harness import Record, front, mean, plain, take_tuned, tune
from .quality import quality_goal

ROOT = Path(__file__).parents[2]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=list(BEDS), choices=list(BEDS))
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena")
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--tune-seeds", type=int, default=2)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--strengths", type=int, default=5)
    parser.add_argument("--goal", choices=["validity", "quality"], default="validity", help="tune for modes at equal what")
    parser.add_argument("--tuned-from", type=Path, help="folder of results whose tuned settings are taken, without tuning")
    parser.add_argument("--docs", type=Path, help="write the pages and figures into this folder at the end")
    parser.add_argument("--small", action="store_true", help="few trials, prompts and images: checks that everything works")
    args = parser.parse_args()
    if args.small:
        args.trials, args.tune_seeds, args.seeds, args.strengths = 2, 1, 1, 3
    torch.set_grad_enabled(False)
    for name in args.beds:
        bed = BEDS[name]()
        if args.small:
            bed.images, bed.prompts = 6, lambda half, every=bed.prompts: every(half)[:2]
        record = Record(args.out, bed)
        known = record.data.get("settings", {}).get("goal", "validity")
        if record.data["methods"] and known != args.goal:
            parser.error(f"the results in {record.path} are tuned for {known}; give --goal {known}, or another --out")
        record.data["settings"] = {
            "images": bed.images, "steps": bed.steps, "guidance_scale": bed.guidance_scale, "trials": args.trials,
            "diversity": bed.diversity, "fidelity": bed.fidelity, "goal": args.goal,
            "prompts": [c.prompt for c in bed.cases("report", args.seeds)], "seeds": args.seeds,
        }  # fmt: skip
        if args.tuned_from is not None:
            take_tuned(record, Record(args.tuned_from, bed))
        goal = functools.partial(quality_goal, bed) if args.goal == "quality" else None
        base = plain(bed, record, "report", args.seeds)
        print(f"{bed.name}: plain {mean(base[bed.diversity]):.2f} {bed.diversity}, "
              f"{mean(base[bed.fidelity]):.3f} {bed.fidelity}, {mean(base['seconds']):.2f} s", flush=True)  # fmt: skip
        for method in args.methods:
            if method == "plain" or not bed.fits(METHODS[method]):
                continue
            began = time.perf_counter()
            if args.tuned_from is not None and METHODS[method].tuned and "tuned" not in record.of(method):
                continue
            tuned = tune(bed, method, record, args.trials, args.tune_seeds, goal)
            front(bed, method, record, args.strengths, args.seeds)
            points = "  ".join(
                f"{p['strength']:.3g}: {mean(p['cases'][bed.diversity]):.2f} / {mean(p['cases'][bed.fidelity]):.3f}"
                for p in sorted(record.of(method)["front"], key=lambda p: p["strength"])
            )
            short = {k: round(v, 3) for k, v in tuned.items()}
            print(f"  {method:26} {points}   {short}   {time.perf_counter() - began:.0f} s", flush=True)
    if args.docs is not None:
        from .page import write

        write(args.out, args.docs)


if __name__ == "__main__":
    main()
