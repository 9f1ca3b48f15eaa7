"""Why methods tie: the judge's own choice is no worse than a plain run, and directions are compared run by run."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.arena.beds.analytic import Analytic
from benchmarks.why_ties import REFERENCE, best_of, directions, room, tables

TUNED = {REFERENCE: {"scale": 1.0, "stop": 0.65}, "SPARKE, ours": {"scale": 1.0, "stop": 0.65},
         "OSCAR": {"weight": 0.3, "noise_weight": 0.2, "c": 4.0}}  # fmt: skip


@pytest.fixture
def bed() -> Analytic:
    bed = Analytic(8, skewed=False)
    bed.images = 6
    return bed


def test_the_best_of_several_runs_has_all_modes_that_fit(bed: Analytic) -> None:
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        rows = torch.cat([bed.rows(bed.run(case, 6)), bed.truth(case.prompt)[:12]])
        every, found = bed.figures(rows, case)["modes"], best_of(bed, rows, case)
    assert found["modes"] == min(6, every)


def test_true_samples_and_the_best_of_runs_bound_a_plain_one(bed: Analytic) -> None:
    with torch.no_grad():
        found = room(bed, bed.cases("report", 1)[:2])
    assert all(b >= a for a, b in zip(found["plain"]["modes"], found["chosen"]["modes"], strict=True))
    assert len(found["true samples"]["valid"]) == 2


def test_cosines_are_of_displacements_from_the_same_noises(bed: Analytic) -> None:
    with torch.no_grad():
        found = directions(bed, bed.cases("report", 1)[:1], TUNED)
    assert set(found) == {"SPARKE, ours", "OSCAR"}
    assert all(-1 <= c <= 1 for by in found.values() for values in by.values() for c in values)
    assert found["OSCAR"]["small"][0] > 0.3  # both push predictions apart on the sphere


def test_the_page_has_the_tables_of_the_results(tmp_path: Path) -> None:
    assert tables(tmp_path / "none.json") == "(not measured)"
    root = Path(__file__).parents[2]
    path = root / "benchmarks" / "results" / "arena" / "why_ties.json"
    assert json.loads(path.read_text("utf-8"))
    assert tables(path) in (root / "docs" / "arena" / "ablations.md").read_text("utf-8")
