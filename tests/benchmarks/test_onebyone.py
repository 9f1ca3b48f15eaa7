"""Images one by one with a memory: the methods, and all cases of a mixture in one batch."""

import functools
from pathlib import Path

import pytest
import torch

from benchmarks.arena.batched import Batch
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.harness import Record, measure_one, take_tuned
from kspec_guidance.bench.methods import METHODS

NAMES = {
    "SPARKE, ours, one by one": {"scale": 2.0},
    "SPARKE, ours, one by one, lower CFG": {"scale": 3.0, "weight": 1.4},
    "SPARKE, ours, one by one, interval CFG": {"scale": 3.0, "cfg_start": 0.2, "cfg_stop": 0.7},
    "SPELL, one by one": {"r": 1.2},
    "SPELL, one by one, lower CFG": {"r": 0.9, "cfg": 1.3},
}


@pytest.fixture
def bed() -> Analytic:
    bed = Analytic(8, skewed=False)
    bed.images = 4
    return bed


@pytest.mark.parametrize("dim", [2, 8])
@pytest.mark.parametrize(("name", "chosen"), NAMES.items())
def test_batched_images_are_those_of_single_calls(name: str, chosen: dict[str, float], dim: int) -> None:
    bed = Analytic(dim, skewed=False)
    bed.images = 4
    cases, make = bed.cases("report", 1)[:2], functools.partial(METHODS[name], **chosen)
    with torch.no_grad():
        found = list(Batch(bed).measure(measure_one, make, cases))
        for case, (rows, figures) in zip(cases, found, strict=True):
            torch.testing.assert_close(rows, bed.rows(bed.sample(make(), case)), atol=5e-3, rtol=1e-3)
            assert figures.keys() == measure_one(bed, make, case)[1].keys()


def test_other_methods_are_measured_one_case_after_another(bed: Analytic) -> None:
    make, case = functools.partial(METHODS["SPARKE, ours"], scale=2.0), bed.cases("report", 1)[0]
    with torch.no_grad():
        (rows, _), *rest = Batch(bed).measure(measure_one, make, [case])
        assert not rest
        assert torch.equal(rows, bed.rows(bed.sample(make(), case)))


@pytest.mark.parametrize(("name", "off"), [("SPARKE, ours, one by one", {"scale": 0.0}), ("SPELL, one by one", {"r": 0.0})])
def test_without_strength_they_are_plain_samples(name: str, off: dict[str, float], bed: Analytic) -> None:
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(bed.sample(METHODS[name](**off), case), bed.run(case, 4), atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["SPARKE, ours, one by one", "SPELL, one by one"])
def test_each_image_repels_the_next_ones_alone(name: str, bed: Analytic) -> None:
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        plain = bed.run(case, 4)
        found = bed.sample(METHODS[name](**NAMES[name]), case)
        torch.testing.assert_close(found[0], plain[0], atol=2e-5, rtol=1e-5)
        assert not torch.allclose(found[3], plain[3], atol=1e-2)
        bed.images = 2  # what comes after does not change what was made
        torch.testing.assert_close(bed.sample(METHODS[name](**NAMES[name]), case), found[:2], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["lower CFG", "interval CFG", "score rescaling"])
def test_methods_of_single_images_make_the_same_ones_alone(name: str, bed: Analytic) -> None:
    """So their figures of a call of several images are those of as many calls of one."""
    case, method = bed.cases("report", 1)[0], METHODS[name]
    assert method.single
    with torch.no_grad():
        together = bed.sample(method(), case)
        for noise, expected in zip(bed.start(case, 4), together, strict=True):
            with method().attach(bed.pipe):
                torch.testing.assert_close(bed.run(case, 1, noise[None])[0], expected, atol=2e-5, rtol=1e-5)


def test_methods_that_compare_the_images_of_a_call_are_not_single() -> None:
    assert not any(METHODS[name].single for name in ("OSCAR", "DiverseFlow", "SPELL", "SPARKE, ours", "group inference"))
    assert all(METHODS[name].single for name in (*NAMES, "plain", "CADS", "SPARKE, authors' code"))


def test_settings_are_taken_of_the_method_in_one_call(bed: Analytic, tmp_path: Path) -> None:
    source, record = Record(tmp_path / "source", bed), Record(tmp_path / "record", bed)
    source.of("SPARKE, ours")["tuned"] = {"scale": 0.3, "stop": 0.5}
    take_tuned(record, source)
    assert record.of("SPARKE, ours, one by one")["tuned"] == {"scale": 0.3, "stop": 0.5}
    assert "SPELL, one by one" not in record.data["methods"]


def test_settings_of_the_other_half_of_the_prompts_are_refused(bed: Analytic, tmp_path: Path) -> None:
    source, record = Record(tmp_path / "source", bed), Record(tmp_path / "record", bed)
    source.data["settings"] = {"swap": True}
    with pytest.raises(ValueError, match="with --swap, so on other prompts"):
        take_tuned(record, source)


def test_the_unit_of_distance_is_that_of_a_usual_call(bed: Analytic) -> None:
    bed.images = 1
    few = bed.radius_unit()
    bed._unit, bed.images = None, Analytic.images
    assert few == bed.radius_unit() > 0


@pytest.mark.parametrize("name", ["interval CFG", "seed variance", "OSCAR"])
def test_each_run_of_one_attachment_is_a_run_of_its_own(name: str, bed: Analytic) -> None:
    """As where the images of a prompt do not fit one call: a schedule begins anew, and so does what is kept in a run."""
    case, start = bed.cases("report", 1)[0], bed.start(bed.cases("report", 1)[0], 4)
    method = METHODS[name]()
    with torch.no_grad():
        with method.attach(bed.pipe):
            method.generator.manual_seed(1)
            first = bed.run(case, 4, start)
            method.generator.manual_seed(1)
            torch.testing.assert_close(bed.run(case, 4, start), first)
        assert not torch.allclose(first, bed.run(case, 4, start), atol=1e-2)
