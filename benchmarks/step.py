"""Cost of a guided step in the package's own code: files and Python calls, and the time added to the scheduler's step.

    python benchmarks/step.py                               # this checkout
    python benchmarks/step.py --package /path/to/another    # and another checkout beside it

The guide is ``SPARKE()`` with its defaults. Calls are those of Python code of the package during the third scheduler step
of the embedded pipeline (8 images of one prompt, 8 steps), with an empty memory and after an earlier call. Times are of
``DDIMScheduler.step`` for latents 8 x 4 x 64 x 64 with given model outputs and an empty memory: plain and guided 20-step
loops alternate, and each gives the median of its steps 1 to 11. Every checkout is measured in fresh processes, in turn.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from pages import table

ROOT = Path(__file__).parents[1]
COUNTED_STEP = 2
TIMED_STEPS = slice(1, 12)
MEMORIES = ("empty memory", "filled memory")


# -- in a process of its own -----------------------------------------------------------------------------------------


def count_calls() -> dict[str, dict[str, int]]:
    """Python calls of the package in one guided step, by its files, for each kind of memory."""
    import torch

    import kspec_guidance

    package = Path(kspec_guidance.__file__).parent
    pipe = kspec_guidance.load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    found = {}
    for earlier_calls, name in enumerate(MEMORIES):
        guide, counts = kspec_guidance.SPARKE(), Counter[str]()
        with guide.attach(pipe):
            for call in range(earlier_calls + 1):
                generators = [torch.Generator().manual_seed(8 * call + k) for k in range(8)]
                step = pipe.scheduler.step
                if call == earlier_calls:
                    object.__setattr__(pipe.scheduler, "step", counted(step, package, counts))
                pipe("heart", num_images_per_prompt=8, num_inference_steps=8, output_type="latent", generator=generators)
                object.__setattr__(pipe.scheduler, "step", step)
        found[name] = dict(counts.most_common())
    return found


def counted(step: Any, package: Path, counts: Counter[str]) -> Any:
    """``scheduler.step``, counting the calls of functions of the package in one of the steps."""
    steps = iter(range(10**6))

    def profile(frame: Any, event: str, arg: Any) -> None:
        if event == "call":
            path = Path(frame.f_code.co_filename)
            if path.is_relative_to(package):
                counts[path.relative_to(package).as_posix()] += 1

    def call(*args: Any, **kwargs: Any) -> Any:
        if next(steps) != COUNTED_STEP:
            return step(*args, **kwargs)
        sys.setprofile(profile)
        try:
            return step(*args, **kwargs)
        finally:
            sys.setprofile(None)

    return call


def time_steps(repeats: int, threads: int) -> dict[str, list[float]]:
    """Milliseconds of a plain and of a guided step, one of each for every repeat."""
    import torch
    from diffusers import DDIMScheduler

    from kspec_guidance import SPARKE

    torch.set_num_threads(threads)
    scheduler, g = DDIMScheduler(), torch.Generator().manual_seed(0)
    noise, *outputs = (torch.randn(8, 4, 64, 64, generator=g) for _ in range(21))

    def loop() -> float:
        scheduler.set_timesteps(20)
        x, seconds = noise, []
        for t, output in zip(scheduler.timesteps, outputs, strict=True):
            began = time.perf_counter()
            x = scheduler.step(output, t, x, return_dict=False)[0]
            seconds.append(time.perf_counter() - began)
        return statistics.median(seconds[TIMED_STEPS]) * 1e3

    times: dict[str, list[float]] = {"plain": [], "guided": []}
    for _ in range(repeats + 1):
        times["plain"].append(loop())
        with SPARKE().attach(scheduler):
            times["guided"].append(loop())
    return {name: values[1:] for name, values in times.items()}  # the first repeat warms up


def in_process(package: Path, *arguments: str, threads: int = 1) -> Any:
    """Run this script's worker on a checkout; raises RuntimeError with its output if that fails."""
    environment = {**os.environ, "PYTHONPATH": str(package), "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, __file__, "--package", str(package), "--worker", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise RuntimeError(f"measuring {package} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def work(package: Path, what: str, *numbers: str) -> None:
    import kspec_guidance

    if not Path(kspec_guidance.__file__).is_relative_to(package):
        raise SystemExit(f"kspec_guidance was imported from {kspec_guidance.__file__}, not from {package}")
    print(json.dumps(count_calls() if what == "calls" else time_steps(*map(int, numbers))))


# -- the measurement -------------------------------------------------------------------------------------------------


def summary(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"median": middle, "low": low, "high": high}


def measure(checkouts: dict[str, Path], repeats: int, rounds: int) -> dict[str, Any]:
    """Calls and times of each checkout; the checkouts alternate in every round."""
    found: dict[str, Any] = {label: {"calls": in_process(path, "calls"), "ms": {}} for label, path in checkouts.items()}
    for threads in (1, 2):
        times: dict[str, dict[str, list[float]]] = {label: {"plain": [], "guided": []} for label in checkouts}
        for _ in range(rounds):
            for label, path in checkouts.items():
                for name, values in in_process(path, "times", str(repeats), str(threads), threads=threads).items():
                    times[label][name] += values
        for label, by in times.items():
            added = [guided - plain for plain, guided in zip(by["plain"], by["guided"], strict=True)]
            parts = {**by, "added": added}
            found[label]["ms"][f"{threads} thread{'s' * (threads > 1)}"] = {k: summary(v) for k, v in parts.items()}
    return found


def report(found: dict[str, Any]) -> str:
    """Tables of all figures, one column for each checkout, and of the calls in each file."""
    rows = []
    for name in MEMORIES:
        counts = [by["calls"][name] for by in found.values()]
        rows.append([f"files, {name}", *(str(len(c)) for c in counts)])
        rows.append([f"calls, {name}", *(str(sum(c.values())) for c in counts)])
    for threads in next(iter(found.values()))["ms"]:
        for part in ("plain", "guided", "added"):
            figures = [by["ms"][threads][part] for by in found.values()]
            cells = ["{median:.2f} [{low:.2f}, {high:.2f}]".format(**f) for f in figures]
            rows.append([f"ms a step, {part}, {threads}", *cells])
    parts = [table(["a guided step", *found], rows)]
    for label, by in found.items():
        files = dict.fromkeys(file for name in MEMORIES for file in by["calls"][name])
        rows = [[file, *(str(by["calls"][name].get(file, 0)) for name in MEMORIES)] for file in files]
        parts.append(table([f"calls, {label}", *MEMORIES], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--package", type=Path, help="root of another checkout to measure as well")
    parser.add_argument("--repeats", type=int, default=15, help="pairs of loops in a process")
    parser.add_argument("--rounds", type=int, default=3, help="processes for each checkout and number of threads")
    parser.add_argument("--out", type=Path, nargs="?", const=ROOT / "benchmarks" / "results" / "step.json",
                        help="write the results as JSON, by default to benchmarks/results/step.json")  # fmt: skip
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.package.resolve(), *args.worker)
        return
    checkouts = {"this checkout": ROOT}
    if args.package is not None:
        checkouts = {"other checkout": args.package.resolve(), **checkouts}
    found = measure(checkouts, args.repeats, args.rounds)
    print(report(found))
    print("\nTimes are medians with quartiles.")
    if args.out is not None:
        args.out.write_text(json.dumps({"repeats": args.repeats * args.rounds, **found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
