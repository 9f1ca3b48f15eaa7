"""Other spaces and start noises on a transformer: settings are those of the methods, and the table tells their calls."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Case
from benchmarks.easing import PLAIN
from benchmarks.transformer_means import PRESET, calls, samples, tables
from kspec_guidance import SPARKE
from kspec_guidance.bench.methods import METHODS


def test_settings_are_the_methods_and_presets():
    bed, case = BEDS["emoji-transformer-distilled"](), Case("flower", 3)
    with torch.no_grad():
        assert torch.equal(samples(bed, case, PLAIN), bed.run(case, bed.images))
        assert torch.equal(samples(bed, case, "pink noise"), bed.sample(METHODS["pink noise"](), case))
        with SPARKE.preset("few-step").attach(bed.pipe):
            guided = bed.run(case, bed.images)
        assert torch.equal(samples(bed, case, PRESET), guided)
        inside = samples(bed, case, "block, scale 1")
    assert inside.isfinite().all()
    assert not torch.equal(inside, bed.run(case, bed.images))


def test_a_start_noise_costs_its_rounds_or_candidates():
    assert calls(4, PLAIN) == calls(4, "pink noise") == 1
    assert calls(4, "CNO") == pytest.approx(1 + 3 / 4)
    assert calls(8, f"{PRESET}, chosen of 4") == pytest.approx(1.5)


def test_without_results_there_is_no_table(tmp_path: Path):
    assert tables(tmp_path / "none.json") == "(not measured)"
    (tmp_path / "empty.json").write_text(json.dumps({}))
    assert tables(tmp_path / "empty.json") == ""


def test_the_page_has_the_table_of_the_results_with_their_calls():
    root = Path(__file__).parents[2]
    found = tables(root / "benchmarks" / "results" / "arena" / "transformer_means.json")
    assert found in (root / "docs" / "arena" / "ablations.md").read_text("utf-8")
    lines = {line.split("|")[1].strip(): line.split("|")[-2].strip() for line in found.splitlines() if line.startswith("|")}
    assert (lines["plain"], lines["CNO"], lines["preset, chosen of 4"]) == ("x1.00", "x1.75", "x2.00")
