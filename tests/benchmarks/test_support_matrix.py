"""The support matrix: its record covers every class there is, and every class it calls run is run again here."""

import json
import re
from pathlib import Path

import diffusers
import pytest

from tests.tiny import checking, making, scheduling

ROOT = Path(__file__).parents[2]
RECORD = json.loads((ROOT / "benchmarks" / "results" / "support.json").read_text())
RUN = [r["name"] for r in RECORD["pipelines"] if r["evidence"] == "run"]
same_version = pytest.mark.skipif(
    diffusers.__version__ != RECORD["diffusers"], reason=f"the record is of diffusers {RECORD['diffusers']}"
)


@same_version
def test_every_exported_class_has_a_verdict():
    assert {r["name"] for r in RECORD["pipelines"]} == set(making.pipeline_names())
    assert {s["name"] for s in RECORD["schedulers"]} == set(scheduling.scheduler_names())
    assert {r["evidence"] for r in RECORD["pipelines"]} <= {"run", "hooked", "not applicable"}
    assert len(RUN) >= 150
    assert all(r["reason"] for r in RECORD["pipelines"] if r["evidence"] != "run")


def test_the_page_says_what_the_record_says():
    page = (ROOT / "docs" / "support.md").read_text()
    for row in RECORD["pipelines"]:
        assert re.search(rf"^\| {row['name']} \|", page, re.MULTILINE), row["name"]
    c = RECORD["counts"]
    assert f"{c['run']} of the {len(RECORD['pipelines'])} pipeline classes" in (ROOT / "README.md").read_text()
    assert f"| {c['run']} | {c['hooked']} | {c['not applicable']} | {len(RECORD['pipelines'])} |" in page


@pytest.mark.slow
@same_version
@pytest.mark.parametrize("name", RUN)
def test_a_class_that_is_called_run_runs(name):
    if "dummy" in getattr(diffusers, name).__module__:
        pytest.skip("a package that the class needs is not installed")
    seen = checking.check(name)
    row = next(r for r in RECORD["pipelines"] if r["name"] == name)
    assert (seen.layout, seen.ways, seen.scheduler) == (row["layout"], row["ways"], row["scheduler"])


def test_hooked_classes_call_a_schedulers_step_in_their_source():
    import inspect
    import sys

    for row in RECORD["pipelines"]:
        found = getattr(diffusers, row["name"], None)
        if row["evidence"] != "hooked" or found is None or "dummy" in found.__module__ or "Modular" in row["name"]:
            continue
        source = inspect.getsource(sys.modules[found.__module__])
        itself_or_inner = ("scheduler.step", "generation_pipe", "decoder_pipe")  # combined pipelines call others
        assert any(word in source for word in itself_or_inner), row["name"]
