"""Seconds until `import kspec_guidance` and the helps of the command line are done, beside `import torch`.

    python benchmarks/import_time.py

Each in fresh processes, in turn: time of the clock, and processor time, from the start of Python to its end.
"""

import argparse
import os
import statistics
import subprocess
import sys
import time

COMMANDS = ("", "demo", "generate", "calibrate", "tune", "evaluate", "compare", "embeddings", "bench")


def seconds(*words: str) -> tuple[float, float]:
    """Wall and processor seconds of a Python process."""
    before, began = os.times(), time.perf_counter()
    subprocess.run([sys.executable, *words], capture_output=True, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return time.perf_counter() - began, spent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    runs = {f"import {name}": ("-c", f"import {name}") for name in ("torch", "kspec_guidance")}
    for command in COMMANDS:
        words = (*filter(None, (command,)), "--help")
        runs["kspec-guidance " + " ".join(words)] = ("-m", "kspec_guidance", *words)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for _ in range(args.times + 1):  # the first run fills the disk cache
        for name, words in runs.items():
            found[name].append(seconds(*words))
    for name, times in found.items():
        wall, processor = (statistics.median(values) for values in zip(*times[1:], strict=True))
        print(f"{name}: {wall:.2f} s, of the processor {processor:.2f} s; median of {args.times}")


if __name__ == "__main__":
    main()
