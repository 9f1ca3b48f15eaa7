"""Times of several calls in interleaved repeats: a slow period of the machine affects all of them.

Other benchmarks import it. By itself it compares a product of matrices in float32 with the one in float64:

    python -m benchmarks.interleaved
"""

import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import threadpool_limits

from benchmarks.pages import table

__all__ = ["HEADER", "Timing", "machine", "markdown", "one_row", "threads_set", "time_calls"]

HEADER = ["work", "ours, ms", "peer", "its, ms", "ratio (range)", "difference", "threads"]


@dataclass(frozen=True)
class Timing:
    """Time of one call, and its ratio to the call that the others are compared with.

    Attributes:
        seconds: median over the repeats.
        fastest, slowest: range over the repeats, in seconds.
        ratio: median of the time of this call divided by that of the named call in the same repeat.
        low, high: range of that ratio over the repeats.
        value: what the call returned last.
    """

    seconds: float
    fastest: float
    slowest: float
    ratio: float
    low: float
    high: float
    value: Any


@contextmanager
def threads_set(threads: int) -> Iterator[None]:
    """torch, and the BLAS of numpy and scipy, use this many threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with threadpool_limits(threads):
            yield
    finally:
        torch.set_num_threads(before)


def time_calls(
    calls: Mapping[str, Callable[[], Any]], to: str, repeats: int = 7, warmup: int = 1, threads: int = 1, cpu: bool = False
) -> dict[str, Timing]:
    """Times of named calls without arguments. Each repeat runs all of them once, beginning with another one each time.

    Args:
        calls: by name.
        to: name of the call that the others are divided by: with ours here, a ratio of 2 says that we are twice as fast.
        repeats: after the warm-up.
        warmup: calls of each that are not counted.
        threads: of torch and its BLAS while the calls run.
        cpu: processor time of this process instead of the time of the clock, for a core that other programs use too; only
            with one thread.

    Raises:
        ValueError: if ``to`` is none of the names, for no repeats, or for processor time of several threads.

    >>> found = time_calls({"a": lambda: 1, "b": lambda: 2}, to="a", repeats=3)
    >>> found["a"].ratio, found["b"].value
    (1.0, 2)
    """
    if to not in calls or repeats < 1:
        raise ValueError(f"to must be one of {list(calls)} and repeats at least 1, got {to!r} and {repeats}")
    if cpu and threads != 1:
        raise ValueError(f"processor time adds up over threads: use one thread, got {threads}")
    now, names = time.process_time if cpu else time.perf_counter, list(calls)
    spent: dict[str, list[float]] = {name: [] for name in names}
    value: dict[str, Any] = {}
    with threads_set(threads):
        for k in range(-warmup, repeats):
            for name in names[k % len(names) :] + names[: k % len(names)]:
                began = now()
                value[name] = calls[name]()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                if k >= 0:
                    spent[name].append(now() - began)
    found: dict[str, Timing] = {}
    for name, s in spent.items():
        ratio = [a / b for a, b in zip(s, spent[to], strict=True)]
        found[name] = Timing(
            statistics.median(s), min(s), max(s), statistics.median(ratio), min(ratio), max(ratio), value[name]
        )
    return found


def machine() -> dict[str, Any]:
    """Processor, cores, versions and the commit that is measured, with a ``+`` if files differ from it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    here = Path(__file__).parent
    git = ["git", "-C", str(here), "describe", "--always", "--dirty=+", "--abbrev=8", "--exclude=*"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or "unknown"
    found = {"processor": model, "cores": os.cpu_count(), "torch": torch.__version__, "commit": commit}
    return found | ({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {})


def one_row(
    work: str, peer: str, ours: Timing, theirs: Timing, difference: float | None = None, threads: int = 1
) -> dict[str, Any]:
    """A comparison as it is kept in a file of results; ``ratio`` is their time divided by ours.

    ``theirs`` must have been timed with ``to`` naming ours. ``difference`` is that of the values, relative to theirs.
    """
    return {
        "work": work, "ours_ms": 1e3 * ours.seconds, "peer": peer, "peer_ms": 1e3 * theirs.seconds, "ratio": theirs.ratio,
        "low": theirs.low, "high": theirs.high, "difference": difference, "threads": threads,
    }  # fmt: skip


def _milliseconds(ms: float) -> str:
    """Three digits, or all before the point."""
    return f"{ms:,.0f}" if ms >= 100 else f"{ms:.3g}"


def markdown(rows: list[dict[str, Any]], header: bool = True) -> str:
    """Rows of :func:`one_row` as a table in Markdown; without the header, its lines alone."""
    cells = [
        [
            r["work"],
            _milliseconds(r["ours_ms"]),
            r["peer"],
            _milliseconds(r["peer_ms"]),
            f"{r['ratio']:.2f} ({r['low']:.2f} to {r['high']:.2f})",
            "-" if r["difference"] is None else f"{r['difference']:.0e}" if r["difference"] else "0",
            str(r["threads"]),
        ]
        for r in rows
    ]
    text = table(HEADER, cells)
    return text if header else "\n".join(text.splitlines()[2:])


if __name__ == "__main__":
    single = torch.randn(500, 500)
    double = single.double()
    timed = time_calls({"float32": lambda: single @ single, "float64": lambda: double @ double}, to="float32", cpu=True)
    print(markdown([one_row("product of 500 x 500", "float64", timed["float32"], timed["float64"])]))
    print(machine())
