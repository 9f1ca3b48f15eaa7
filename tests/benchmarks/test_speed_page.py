"""The page on speed: its markers, its tables, the slope of a growth, and the time of nested parts."""

import json
import time

import pytest

from benchmarks.growth import exponent
from benchmarks.profiling import Parts
from benchmarks.speed_page import MAKERS, PAGE, parts_of_the_page

MACHINE = {"processor": "x", "cores": 2, "torch": "2"}


def test_the_page_has_a_place_for_each_part():
    text = PAGE.read_text()
    for name in MAKERS:
        assert text.count(f"<!-- {name} -->") == text.count(f"<!-- /{name} -->") == 1


def test_parts_are_made_from_the_results_that_are_there(tmp_path):
    growth = {"work": "Vendi", "against": "rows", "sizes": [10, 1000], "ms": [1.0, 20.0], "exponent": 2.96, "theory": 3}
    (tmp_path / "growth.json").write_text(json.dumps({"machine": MACHINE, "rows": [growth]}))
    profile = {"a call": {"denoiser": 3.0, "guide": 1.0}, "a run": {"denoiser": 1.0}}
    (tmp_path / "profile.json").write_text(json.dumps({"machine": MACHINE, "parts": profile}))
    found = parts_of_the_page(tmp_path)
    assert list(found) == ["growth", "profile"]
    assert "| Vendi | rows | 10 to 1,000 | 20.0 | 2.96 | 3 |" in found["growth"]
    assert "| denoiser | 75.0% | 100.0% |" in found["profile"]
    assert "| guide | 25.0% | - |" in found["profile"]


def test_the_exponent_is_that_of_the_larger_sizes():
    sizes = [10, 100, 1000, 10_000]
    assert exponent(sizes, [1.0, 1.0, 1e3, 1e6]) == pytest.approx(3)


def test_a_part_is_without_the_parts_within_it(monkeypatch):
    now = iter([0.0, 1.0, 3.0, 7.0, 12.0])  # begin; outer begins; inner begins; inner ends; outer ends
    monkeypatch.setattr(time, "process_time", lambda: next(now))
    parts = Parts()
    with parts.part("outer"), parts.part("inner"):
        pass
    assert parts.seconds == {"outer": 2.0 + 5.0, "inner": 4.0}
