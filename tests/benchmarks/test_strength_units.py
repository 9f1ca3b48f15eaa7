"""Units of strength: the norm's is the package's guide, and a choice for each prompt is at least as good as one for all."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Case
from benchmarks.strength_units import DISTILLED, STOP, UNITS, InUnit, best_for_all, best_for_each, factor_of, goal, tables
from kspec_guidance import SPARKE


@pytest.fixture(scope="module")
def mixture():
    return BEDS["mixture-8"]()


def test_the_norm_is_the_guide_of_the_package():
    bed, case = BEDS[DISTILLED](), Case("bird", 3)
    with torch.no_grad():
        mine = bed.sample(InUnit(scale=0.6), case)
        with SPARKE(0.6, stop=STOP).attach(bed.pipe):
            theirs = bed.run(case, bed.images)
        assert torch.allclose(mine, theirs, atol=1e-4)
        assert torch.equal(bed.sample(InUnit(scale=0.0), case), bed.run(case, bed.images))


@pytest.mark.parametrize("unit", UNITS)
def test_a_unit_times_its_factor_has_the_mean_of_the_norm(mixture, unit):
    case = mixture.cases("tune", 1)[0]
    with torch.no_grad():
        factor = factor_of(mixture, unit, [case])
        scaled = InUnit(unit=unit, scale=0.0, factor=factor)
        mixture.sample(scaled, case)
        moved = mixture.sample(InUnit(unit=unit, scale=2.0, factor=factor), case)
        plain = mixture.run(case, mixture.images)
    assert scaled.sizes[0] == pytest.approx(scaled.sizes[1], rel=1e-5)
    assert moved.isfinite().all()
    assert not torch.allclose(moved, plain, atol=1e-3)


def test_the_best_of_each_prompt_has_at_least_the_goal_of_one_for_all():
    rng, names = np.random.default_rng(0), ("on_data", "agreement", "valid", "coverage", "recall")
    figures = [{k: rng.random(6) for k in names} | {k: 1 + rng.random(6) for k in ("modes", "frechet_distance", "mmd")}
               for _ in range(4)]  # fmt: skip
    one, each = best_for_all(figures, 3), best_for_each(figures, 3)
    assert len(set(one)) == 1
    assert goal(figures, each)[0] >= goal(figures, one)[0]
    assert goal(figures, [0, 0, 0]) == pytest.approx((1.0, 1.0, 0.0))


def test_without_results_there_is_no_table(tmp_path: Path):
    assert set(tables(tmp_path / "none.json").values()) == {"(not measured)"}
    (tmp_path / "empty.json").write_text(json.dumps({"factors": {}}))
    assert set(tables(tmp_path / "empty.json").values()) == {"(not measured)"}


def test_the_page_has_the_tables_of_the_results():
    page = (Path(__file__).parents[2] / "docs" / "arena" / "ablations.md").read_text("utf-8")
    for name, text in tables().items():
        assert f"<!-- {name} -->\n{text}\n<!-- /{name} -->" in page
