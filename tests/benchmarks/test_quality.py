"""Gains at equal quality."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from benchmarks.arena import page
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import Case
from benchmarks.arena.fronts import summaries
from benchmarks.arena.harness import FIDELITY_LOSS, PENALTY, Record, front, measure_all, plain
from benchmarks.arena.quality import change, equal_quality, quality_goal, with_other_half, with_other_tuning
from kspec_guidance.bench.fronts import weights_of_seeds
from kspec_guidance.bench.methods import METHODS


def vector(modes: float, **changed: float) -> dict[str, np.ndarray]:
    usual = {"modes": 4.0 * modes, "on_data": 0.9, "agreement": 0.8, "valid": 0.8, "coverage": 0.7, "recall": 0.5}
    return {k: np.array([v, v]) for k, v in (usual | {"frechet_distance": 10.0, "mmd": 0.1} | changed).items()}


@pytest.mark.parametrize(
    ("changed", "equal"),
    [
        ({}, True),
        ({"on_data": 0.89, "coverage": 0.69, "frechet_distance": 10.4}, True),
        ({"on_data": 0.87}, False),
        ({"coverage": 0.67}, False),
        ({"frechet_distance": 10.6}, False),
        ({"agreement": 0.5}, True),
        ({"coverage": 0.9, "frechet_distance": 12.0}, False),
    ],
)
def test_quality_is_equal_only_if_no_figure_is_worse(changed: dict[str, float], equal: bool) -> None:
    found = change(vector(1.5, **changed), vector(1.0), np.array([[0.5, 0.5]]))
    assert found["modes"][0] == pytest.approx(1.5)
    assert (found["kept"][0] >= -FIDELITY_LOSS) == equal


def test_goal_of_tuning_is_modes_less_lost_quality() -> None:
    small = Analytic(2, skewed=True)
    cases = small.cases("tune", 1)[:2]
    goal = quality_goal(small, cases)
    same, together = measure_all(small, METHODS["plain"], cases)
    distances = together()["distances"]
    assert goal(same, {"distances": distances}) == pytest.approx(1.0)
    far = [d | {"frechet_distance": 2 * d["frechet_distance"]} for d in distances]
    lost = FIDELITY_LOSS * math.log(2) / math.log(1.05) - FIDELITY_LOSS
    assert goal(same, {"distances": far}) == pytest.approx(1 - PENALTY * lost)


def test_gain_at_equal_quality_of_a_front(tmp_path: Path) -> None:
    """A front is measured on a bed, its record has the vector, and plain sampling against itself gains nothing."""
    small = Analytic(8, skewed=False)
    record = Record(tmp_path, small)
    cases = small.cases("report", 1)
    record.data["settings"] = {"prompts": [c.prompt for c in cases], "seeds": 1, "diversity": "modes", "fidelity": "valid",
                               "images": 16, "steps": 30}  # fmt: skip
    plain(small, record, "report", 1)
    record.of("SPARKE, ours")["tuned"] = {"scale": 1e-6, "stop": 0.65}
    front(small, "SPARKE, ours", record, 3, 1)
    (found,) = equal_quality(json.loads(record.path.read_text()), "SPARKE, ours")
    assert found.gain == pytest.approx(0.0, abs=1e-6)
    assert found.agreement == pytest.approx(0.0, abs=1e-6)

    # a gain that costs agreement does not count where agreement is kept too
    costly = json.loads(record.path.read_text())
    for point in costly["methods"]["SPARKE, ours"]["front"]:
        point["cases"]["modes"] = [2 * m for m in point["cases"]["modes"]]
        point["cases"]["agreement"] = [a - 0.5 for a in point["cases"]["agreement"]]
    (free,), (agreed,) = (equal_quality(costly, "SPARKE, ours", agreed=a) for a in (False, True))
    assert free.gain == pytest.approx(1.0, abs=0.01)
    assert agreed.gain == free.gain_agreed == agreed.gain_agreed < 0.1

    # of two tunings the one that gains more counts, and only for the same cases
    other = json.loads(record.path.read_text())
    for point in other["methods"]["SPARKE, ours"]["front"]:
        point["cases"]["modes"] = [1.5 * m for m in point["cases"]["modes"]]
    own = json.loads(record.path.read_text())
    for pair in ((own, other), (other, own)):
        (best,) = equal_quality(with_other_tuning(*pair), "SPARKE, ours")
        assert best.gain == pytest.approx(1.5 * (1 + found.gain) - 1, abs=0.01)
        (best,) = summaries(with_other_tuning(*pair), "SPARKE, ours")
        assert best.gain == pytest.approx(1.5 * (1 + found.gain) - 1, abs=0.01)
    other["settings"]["prompts"] = ["another"]
    with pytest.raises(ValueError, match="other cases"):
        with_other_tuning(own, other)


def test_two_halves_of_the_prompts_are_one_set_of_cases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each half keeps its cases, and the joined record is what one measurement of all prompts would have."""
    small = Analytic(8, skewed=False)
    prompts_of = small.prompts
    monkeypatch.setattr(small, "prompts", lambda half: prompts_of(half)[:2])
    small.images = 4
    halves = []
    for swapped in (False, True):
        small.swapped = swapped
        record = Record(tmp_path / str(swapped), small)
        prompts = [c.prompt for c in small.cases("report", 10)]
        record.data["settings"] = {"prompts": prompts, "seeds": 10, "diversity": "modes", "fidelity": "valid", "images": 4,
                                   "steps": 30}  # fmt: skip
        plain(small, record, "report", 10)
        record.of("SPARKE, ours")["tuned"] = {"scale": 2.0 if swapped else 1.0, "stop": 0.65}
        front(small, "SPARKE, ours", record, 3, 10)
        halves.append(json.loads(record.path.read_text()))
    assert not set(halves[0]["settings"]["prompts"]) & set(halves[1]["settings"]["prompts"])

    both = with_other_half(*halves)
    small.swapped = False
    seeds = range(10_000, 10_010)
    cases = [Case(p, s) for s in seeds for half in ("report", "tune") for p in small.prompts(half)]
    assert both["settings"]["prompts"] == [c.prompt for c in cases]
    found, together = measure_all(small, METHODS["plain"], cases)
    joined = both["methods"]["plain"]
    assert joined["report 10"]["modes"] == found["modes"]
    for mine, theirs in zip(joined["distances"], together()["distances"], strict=True):
        assert mine == pytest.approx(theirs, rel=1e-4)
    assert len(both["methods"]["SPARKE, ours"]["front"]) == 3
    (standing,) = equal_quality(both, "SPARKE, ours")
    parts = [equal_quality(half, "SPARKE, ours")[0].gain for half in halves]
    assert min(parts) - 0.1 < standing.gain < max(parts) + 0.1

    (fixed,) = equal_quality(both, "SPARKE, ours", weigh=weights_of_seeds)
    assert fixed.gain == standing.gain
    assert fixed.gain_high > fixed.gain_low

    # fronts of different lengths, and records that are not two halves
    longer = json.loads(json.dumps(halves[1]))
    points = longer["methods"]["SPARKE, ours"]["front"]
    points.append(points[-1] | {"strength": 100.0})
    assert len(with_other_half(halves[0], longer)["methods"]["SPARKE, ours"]["front"]) == 4
    with pytest.raises(ValueError, match="two halves"):
        with_other_half(halves[0], halves[0])


def test_results_on_further_prompts_stand_beside_those_of_the_bed(tmp_path: Path) -> None:
    data = [{"bed": "emoji", "methods": {"plain": 1}}, {"bed": "emoji, transformer", "methods": {}}]
    folder = tmp_path / "equal" / "further"
    folder.mkdir(parents=True)
    (folder / "emoji.json").write_text(json.dumps({"bed": "emoji", "methods": {"plain": 2}}))
    got = page.with_further_prompts(data, tmp_path)
    assert [(d["bed"], d["methods"].get("plain")) for d in got] == [
        ("emoji", 1), ("emoji, further prompts", 2), ("emoji, transformer", None),
    ]  # fmt: skip
