"""The support matrix: its record covers all exported classes, and the classes that it lists as run are run again."""

import json
import re
from pathlib import Path

import diffusers
import pytest

from tests.tiny import builders, pipeline_checks, scheduler_checks

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text())
RUN = [r["name"] for r in RECORD["pipelines"] if r["evidence"] == "run"]
same_version = pytest.mark.skipif(
    diffusers.__version__ != RECORD["diffusers"], reason=f"the record is of diffusers {RECORD['diffusers']}"
)


@same_version
def test_every_exported_class_has_a_verdict():
    assert {r["name"] for r in RECORD["pipelines"]} == set(builders.pipeline_names())
    assert {s["name"] for s in RECORD["schedulers"]} == set(scheduler_checks.scheduler_names())
    assert {r["evidence"] for r in RECORD["pipelines"]} <= {"run", "hooked", "not applicable"}
    assert len(RUN) >= 150
    assert all(r["reason"] for r in RECORD["pipelines"] if r["evidence"] != "run")


def test_the_page_agrees_with_the_record():
    page = (ROOT / "docs" / "support.md").read_text()
    for row in RECORD["pipelines"]:
        assert re.search(rf"^\| {row['name']} \|", page, re.MULTILINE), row["name"]
    c = RECORD["counts"]
    assert f"{c['run']} of the {len(RECORD['pipelines'])} pipeline classes" in (ROOT / "README.md").read_text()
    assert f"| {c['run']} | {c['hooked']} | {c['not applicable']} | {len(RECORD['pipelines'])} |" in page


@same_version
@pytest.mark.parametrize(
    "name", ["StableDiffusionPipeline", "CogVideoXPipeline", "FluxModularPipeline", "HunyuanDiTPipeline"]
)
def test_a_class_is_guided_in_the_spaces_of_blocks_that_are_listed(name):
    row = next(r for r in RECORD["pipelines"] if r["name"] == name)
    assert pipeline_checks.check_spaces(name)[0] == row["spaces"]


@pytest.mark.slow
@same_version
@pytest.mark.parametrize("name", RUN)
def test_a_class_listed_as_run_runs(name):
    if "dummy" in getattr(diffusers, name).__module__:
        pytest.skip("a package that the class needs is not installed")
    verdict = pipeline_checks.check_pipeline(name)
    row = next(r for r in RECORD["pipelines"] if r["name"] == name)
    assert (verdict.layout, verdict.ways, verdict.scheduler) == (row["layout"], row["ways"], row["scheduler"])
