"""Write the tables of docs/speed.md from the results of peer_times.py, floor.py, growth.py and profiling.py.

    python -m benchmarks.speed_page

A part whose results are not there is left as it is.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.interleaved import markdown
from benchmarks.pages import fill, table

__all__ = ["exponents", "parts_of_the_page", "shares"]

PAGE = Path(__file__).parents[1] / "docs" / "speed.md"
RESULTS = Path(__file__).parent / "results"


def where(data: dict[str, Any]) -> str:
    """The machine that was measured, in one line."""
    m = data["machine"]
    return f"{m['processor']}, {m['cores']} cores, torch {m['torch']}" + (f", {m['gpu']}" if "gpu" in m else "")


def comparisons(data: dict[str, Any]) -> str:
    return f"{where(data)}:\n\n{markdown(data['rows'])}"


def exponents(data: dict[str, Any]) -> str:
    """Fitted exponents beside the theory's, with the longest time of each."""
    rows = [
        [r["work"], r["against"], f"{r['sizes'][0]:,} to {r['sizes'][-1]:,}", f"{r['ms'][-1]:,.1f}", f"{r['exponent']:.2f}",
         f"{r['theory']:g}"]
        for r in data["rows"]
    ]  # fmt: skip
    return f"{where(data)}:\n\n{table(['work', 'against', 'sizes', 'ms at the largest', 'exponent', 'theory'], rows)}"


def shares(data: dict[str, Any]) -> str:
    """Share of each part in each program."""
    programs = data["parts"]
    totals = {program: sum(seconds.values()) for program, seconds in programs.items()}
    names = sorted(
        {name for seconds in programs.values() for name in seconds},
        key=lambda name: -max(seconds.get(name, 0.0) / totals[program] for program, seconds in programs.items()),
    )
    rows = [[n, *(f"{s[n] / totals[p]:.1%}" if n in s else "-" for p, s in programs.items())] for n in names]
    rows.append(["all", *(f"{total:.1f} s" for total in totals.values())])
    return f"{where(data)}, one thread:\n\n{table(['part', *programs], rows)}"


MAKERS: dict[str, tuple[str, Callable[[dict[str, Any]], str]]] = {
    "peers": ("peer_times.json", comparisons),
    "floor": ("floor.json", comparisons),
    "growth": ("growth.json", exponents),
    "profile": ("profile.json", shares),
}


def parts_of_the_page(folder: Path = RESULTS) -> dict[str, str]:
    """Each part of the page whose results are in the folder."""
    return {
        name: make(json.loads((folder / file).read_text()))
        for name, (file, make) in MAKERS.items()
        if (folder / file).is_file()
    }


if __name__ == "__main__":
    fill(PAGE, parts_of_the_page())
