"""Time of `import kspec_guidance` and of `import torch`, alternating, each in a fresh process.

python benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys

CODE = "import time; began = time.perf_counter(); import {}; print(time.perf_counter() - began)"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    names = ("torch", "kspec_guidance")
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(args.times + 1):  # the first run fills the disk cache
        for name in names:
            found = subprocess.run([sys.executable, "-c", CODE.format(name)], capture_output=True, text=True, check=True)
            seconds[name].append(float(found.stdout))
    medians = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    for name, value in medians.items():
        print(f"import {name}: {value:.2f} s, median of {args.times}")
    print(f"ratio: {medians['kspec_guidance'] / medians['torch']:.2f}")


if __name__ == "__main__":
    main()
