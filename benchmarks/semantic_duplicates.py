"""Time, memory and recall of `semantic_duplicates` on made rows with planted repetitions.

    python -m benchmarks.semantic_duplicates --rows 1000000 --width 256

Prints one line of JSON. Memory is the largest resident set of the process, less that before the first row.
"""

import argparse
import json
import resource
import time

import torch

from kspec_guidance.evaluation.semantic import semantic_duplicates
from kspec_guidance.kernels import l2_normalize

BLOCK, CENTRES, EVERY = 10_000, 5000, 20


def made(rows, width):
    """Rows about 5,000 centres; each twentieth repeats, at a cosine near 0.97, one at a random place before it."""
    centres = l2_normalize(torch.randn(CENTRES, width, generator=torch.Generator().manual_seed(0)))

    def block(start, count):
        g = torch.Generator().manual_seed(1 + start)
        return l2_normalize(centres[torch.randint(CENTRES, (count,), generator=g)] +
                            1.2 * l2_normalize(torch.randn(count, width, generator=g)))  # fmt: skip

    for start in range(0, rows, BLOCK):
        x = block(start, min(BLOCK, rows - start))
        g = torch.Generator().manual_seed(7 + start)
        source = block(int(torch.randint(start // BLOCK + 1, (1,), generator=g)) * BLOCK, len(x))[: len(x)]
        k = torch.arange(EVERY - 1, len(x), EVERY)
        x[k] = l2_normalize(source[k - 1] + 0.25 * l2_normalize(torch.randn(len(k), width, generator=g)))
        yield x


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--width", type=int, default=256)
    options = parser.parse_args()
    import faiss  # noqa: F401, so that it counts as before

    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    found = {i for i, _, _ in semantic_duplicates(made(options.rows, options.width), options.rows, 0.95)}
    planted = {s + k for s in range(0, options.rows, BLOCK)
               for k in range(EVERY - 1, min(BLOCK, options.rows - s), EVERY)}  # fmt: skip
    print(json.dumps({
        "rows": options.rows, "width": options.width, "planted": len(planted), "found": len(found),
        "recall": round(len(found & planted) / len(planted), 4), "wrong": len(found - planted),
        "seconds": round(time.perf_counter() - start, 1), "threads": torch.get_num_threads(),
        "memory_mb": round((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024),
        "rows_as_float32_mb": round(options.rows * options.width * 4 / 2**20),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
