"""Tables of papers: complete, mapped to what exists, and printed beside our figures."""

import pytest

from kspec_guidance.bench.methods import CODES
from kspec_guidance.bench.metrics import METRICS
from kspec_guidance.bench.tables import markdown
from kspec_guidance.bench.targets import TARGETS, compare_with, target

COST = ("seconds", "peak_bytes")


@pytest.mark.parametrize("name", TARGETS)
def test_tables_state_their_source_and_map_to_our_methods_and_scores(name):
    found = target(name)
    assert all(found[k] for k in ("title", "source", "read", "caveat", "setting"))
    assert "arXiv" in found["source"]
    assert "notes" not in found["read"] or "not read" in found["caveat"] or "No table was read" in found["caveat"]
    assert {code for codes in found["methods"].values() for code in codes} <= set(CODES)
    assert {m["ours"] for m in found["metrics"].values()} - {None, *COST} <= set(METRICS)
    for model in found["models"]:
        assert set(model["rows"]) <= set(found["methods"])
        assert all(set(row) <= set(found["metrics"]) for row in model["rows"].values())


def results():
    def value(v):
        return {"value": v, "low": v - 0.1, "high": v + 0.1}

    return {
        "model": "demo", "prompts": 6, "images": 4, "steps": 8,
        "methods": {
            "plain": {"clip_score": value(30.0), "mss": {"value": 0.8, "low": None, "high": None}},
            "sparke": {"clip_score": value(29.5)}, "sparke-published": {"clip_score": value(29.0)},
        },
        "cost": {"plain": {"seconds": 1.0, "peak_bytes": 3e9}, "sparke": {"seconds": 1.25, "peak_bytes": None}},
    }  # fmt: skip


def test_ours_stand_beside_theirs_in_their_unit():
    found = compare_with(results(), "sparke-table-1")
    assert [t.title for t in found] == [f"SPARKE, Table 1, {m}" for m in ("SD 2.1", "SDXL", "PixArt-Sigma")]
    text = markdown(found[0])
    assert "| none (plain) | 31.2 | 30.00 [29.90, 30.10] | 52.37 | - | 26.54 | - | 369.37 | - | 80.36 | 80.00 |" in text
    assert "| SPARKE (sparke-published) | 30.96 | 29.00 [28.90, 29.10] |" in text
    assert "| SPARKE (sparke) | 30.96 | 29.50 [29.40, 29.60] |" in text
    assert "| CADS | 29.89 | - |" in text
    assert "24 images" in found[0].about
    assert "of the images" not in found[0].about
    many = compare_with(results() | {"prompts": 1000}, "sparke-table-1")[0].about
    assert "Ours of Cond-Vendi and Vendi take 2000 of the images." in many
    cost = markdown(compare_with(results(), "sparke-cost")[0])
    assert "| none (plain) | 1.62 | 1.00 | 3.178 | 3.00 |" in cost
    assert "| SPARKE (sparke) | 1.752 | 1.25 | 3.23 | - |" in cost


def test_unknown_tables_and_papers_without_figures_are_errors():
    with pytest.raises(ValueError, match=r"named 'sparke'; choose one of .*sparke-table-1"):
        compare_with(results(), "sparke")
    with pytest.raises(ValueError, match=r"no figures of OSCAR \(arXiv 2510.09060\) are known here"):
        compare_with(results(), "oscar")
