"""Sizes of one push: none at strength 0, different at others, and the table of their gains."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.base import Case
from benchmarks.how_pushes_end import STRENGTHS, Ending, measure, tables
from kspec_guidance import SPARKE


def test_sizes_are_those_of_the_presets() -> None:
    bed, case = BEDS["emoji-transformer-distilled"](), Case("bird", 3)
    with torch.no_grad():
        for name, setting in (
            ("faithful", Ending(size="until apart", amount=0.9)),
            ("vivid", Ending(size="fading", amount=1.5)),
        ):
            with SPARKE.preset(name).attach(bed.pipe):
                theirs = bed.run(case, bed.images)
            assert torch.equal(bed.sample(setting, case), theirs)
        plain = bed.run(case, bed.images)
        for size in STRENGTHS:
            assert torch.equal(bed.sample(Ending(size=size), case), plain)
        assert not torch.allclose(bed.sample(Ending(size="constant", amount=0.4), case), plain, atol=1e-2)


def test_a_table_has_the_gains_of_all_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bed = BEDS["emoji-transformer-distilled"]
    monkeypatch.setattr(bed, "prompts", lambda self, half: ["bird", "heart"])
    monkeypatch.setattr("benchmarks.how_pushes_end.STRENGTHS", {k: v[1:2] for k, v in STRENGTHS.items()})
    with torch.no_grad():
        measure("emoji-transformer-distilled", "tune", 1, tmp_path / "found.json")
    text = tables(tmp_path / "found.json")
    assert "tune: 2 prompts, 1 seeds" in text
    for size in STRENGTHS:
        assert text.count(f"\n| {size} | +") == 2
    assert tables(tmp_path / "none.json") == "(not measured)"
    (tmp_path / "empty.json").write_text(json.dumps({}))
    assert tables(tmp_path / "empty.json") == "(not measured)"
