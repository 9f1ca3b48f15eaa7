"""Pushes shaped by own samples: unshaped they are the package's, and a baseline does what its formulas say."""

import json
from pathlib import Path

import torch

from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Case
from benchmarks.own_samples import NEAREST, Baseline, Shaped, tables
from benchmarks.strength_units import DISTILLED, STOP
from kspec_guidance import SPARKE


def test_without_its_parts_the_push_is_that_of_the_package(g):
    bed, case = BEDS[DISTILLED](), Case("bird", 3)
    rows = torch.randn(20, 576, generator=g)
    with torch.no_grad():
        mine = bed.sample(Shaped(scale=0.6), case)
        shaped = [bed.sample(Shaped(scale=0.6, weigh=w, avoid=not w, baseline=Baseline(rows)), case) for w in (True, False)]
        with SPARKE(0.6, stop=STOP).attach(bed.pipe):
            theirs = bed.run(case, bed.images)
        assert torch.allclose(mine, theirs, atol=1e-4)
        assert torch.equal(bed.sample(Shaped(scale=0.0), case), bed.run(case, bed.images))
    assert not any(torch.allclose(mine, other, atol=1e-3) for other in shaped)


def test_directions_are_weighed_by_the_root_of_their_deviation(g):
    directions = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64, generator=g))[0].T
    signs = torch.tensor([[a, b, c] for a in (-1, 1) for b in (-1, 1) for c in (-1, 1)], dtype=torch.float64)
    baseline = Baseline(5.0 + signs * torch.tensor([4.0, 1.0, 0.25]) @ directions)
    move = torch.randn(5, 12, dtype=torch.float64, generator=g)
    wanted = move @ directions.T * torch.tensor([1.0, 0.5, 0.25], dtype=torch.float64) @ directions
    torch.testing.assert_close(baseline.weighed(move), wanted)


def test_moves_do_not_lead_to_samples_of_others():
    rows = torch.cat([torch.eye(NEAREST), 90 * torch.ones(1, NEAREST)])  # the nearest in all directions, and one far off
    move = torch.tensor([[1.0, -1.0] + [0.0] * (NEAREST - 2)])
    wanted = torch.tensor([[0.0, -1.0] + [0.0] * (NEAREST - 2)])
    torch.testing.assert_close(Baseline(rows).not_toward(move, torch.zeros(NEAREST)), wanted)


def test_without_results_there_is_no_table(tmp_path: Path):
    assert tables(tmp_path / "none.json") == "(not measured)"
    (tmp_path / "empty.json").write_text(json.dumps({}))
    assert tables(tmp_path / "empty.json") == "(not measured)"
