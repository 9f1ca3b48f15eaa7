"""The page and the tables of a comparison."""

import json
import re

import pytest
import torch

from kspec_guidance.bench.judge import judge
from kspec_guidance.bench.metrics import METRICS, Metric
from kspec_guidance.bench.page import write
from kspec_guidance.bench.tables import Cell, Table, latex, markdown, tables
from tests.bench.runs import make_run

WORDS = ["a cat & a <b>dog</b>", "50% of $100"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of long names, scored by stubs, with its page."""
    folder = tmp_path_factory.mktemp("run")
    methods = {"plain": [None], "sparke": ["25", "50"], "a_method_with_a_name_that_is_rather_long": [None], "cads": ["1"]}
    run = make_run(folder, images=3, methods=methods, names=WORDS)
    with pytest.MonkeyPatch.context() as patch:
        for name, aspect, higher in (("a", "diversity", True), ("b", "agreement", True), ("c", "realism", False)):
            measure = lambda s: torch.full((len(s),), 2.0 + len(s[0].path.parts[-3]))  # noqa: E731
            metric = Metric(name, f"score {name}", aspect, "image", lambda r, m=measure: m, higher=higher, tolerance=100.0)
            patch.setitem(METRICS, name, metric)
        results = judge(run, ["a", "b", "c", "lpips"]) | {"failed": {"cno": "needs 80 GB"}}
        results["compare_with"] = ["sparke-cost"]
        preferred = {"value": 0.7, "low": 0.6, "high": 0.81}
        methods = {m: {"preferred": preferred} for m in ("plain", "cads")}
        results["preferences"] = {"participants": 5, "reference": "plain", "questions": {"variety": {"methods": methods}}}
        write(results, run, folder)
    return folder


def test_the_page_has_verdict_fronts_tables_reasons_and_the_same_prompts_of_all_methods(folder):
    page = (folder / "bench.html").read_text()
    results = json.loads((folder / "results.json").read_text())
    assert results["verdict"] in page
    assert page.count("<svg") == 2
    sections = ("Diversity at equal quality", "Agreement with the prompts", "Time and memory")
    for words in (*sections, "lpips: lpips needs", "cno: needs 80 GB"):
        assert words in page
    assert page.count("<img ") == 2 * 4 * 3
    assert "<b>dog</b>" not in page
    assert "a cat &amp; a &lt;b&gt;dog&lt;/b&gt;" in page
    assert not re.search(r"(src|href)=.http|<script|<link", page)


def test_tables_are_also_files(folder):
    results = json.loads((folder / "results.json").read_text())
    text = (folder / "tables.md").read_text()
    beside = ["What people prefer", "SPARKE, cost of an image, SD 1.5"]
    assert [*(t.title for t in tables(results)), *beside] == re.findall("^## (.*)$", text, re.MULTILINE)
    assert "| cads | 3.00 | 2.00 | 0.00 |" not in text
    assert re.search(r"\| cads \| 4\.00 \| 3\.00 \| 0\.00", text)
    assert "| cads | 70% [60%, 81%] |" in text
    assert "| none (plain) | 1.62 | 1.00 | 3.178 | 0.00105 |" in text
    assert (folder / "tables.tex").read_text().count(r"\toprule") == len(tables(results)) + 2


def test_cells_are_escaped_and_marked():
    found = Table("A & B", "", ["method", "gain ↑"], [("a_b|c", [Cell("+5%", "+1%, +9%", True)]), ("d", [Cell("-")])])
    assert r"a\_b|c & +5\% {\scriptsize [+1\%, +9\%]}$^*$ \\" in latex(found)
    assert r"method & gain $\uparrow$ \\" in latex(found)
    assert r"\caption{A \& B.}" in latex(found)
    assert r"| a_b\|c | +5% [+1%, +9%]\* |" in markdown(found)


def test_the_page_does_not_scroll_sideways_on_wide_and_narrow_screens(folder, browser):
    for width in (1280, 400):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(f"file://{folder}/bench.html")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


def test_a_damaged_image_is_named_and_the_page_is_written(tmp_path):
    run = make_run(tmp_path, prompts=1, images=2, methods={"plain": [None]})
    path = tmp_path / "images/plain/plain/000000-001.png"
    path.write_bytes(path.read_bytes()[:40])
    results = judge(run, ["mss"])
    assert "000000-001.png cannot be read as an image" in results["skipped"]["mss"]
    write(results, run, tmp_path)
    assert "unreadable" in (tmp_path / "bench.html").read_text()
