"""Sizes of moves, and where they show and where pictures break: what the words of ``guide.report()`` are taken from.

    python benchmarks/moves.py            # three beds of the arena, five prompts each; minutes
    python benchmarks/moves.py mixture-32

Prints, by scale: the mean relative move, modes and validity by the bed's judge, and the number of different images by the
report.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.arena.beds import BEDS
from kspec_guidance import SPARKE, VendiGuidance

SCALES = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0)
GUIDES = {"order 2": SPARKE, "order 0.5": VendiGuidance}


def main(names: list[str]) -> None:
    for name in names:
        bed = BEDS[name]()
        cases = bed.cases("report", 1)[:5]
        for kind, make in GUIDES.items():
            for scale in SCALES:
                found = []
                for case in cases:
                    guide = make(scale)
                    with guide.attach(bed.pipe):
                        figures = bed.judge(bed.run(case, bed.images), case)
                    report = guide.report()
                    found.append((report.mean_relative_move, figures[bed.diversity], figures[bed.fidelity], report.guided))
                move, modes, valid, different = (sum(column) / len(found) for column in zip(*found, strict=True))
                print(
                    f"{bed.name}, {kind}, scale {scale:g}: move {move:.3f}, modes {modes:.2f}, valid {valid:.3f}, "
                    f"different images {different:.2f} of {bed.images}",
                    flush=True,
                )


if __name__ == "__main__":
    main(sys.argv[1:] or ["mixture-32", "digits", "emoji"])
