"""The blinded form: what it shows, what it hides, and what a browser saves."""

import json
from collections import Counter

import pytest
from PIL import Image, PngImagePlugin

from kspec_guidance.bench.form import QUESTIONS, write_form
from kspec_guidance.bench.preferences import analyse, read_answers
from tests.bench.runs import make_run

METHODS = {"plain": [None], "sparkle-method": ["25", "50"], "cadence-method": [None]}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run = make_run(folder, 4, 3, methods=METHODS)
    about = PngImagePlugin.PngInfo()
    about.add_text("method", "sparkle-method")
    for path in folder.rglob("*.png"):
        with Image.open(path) as image:
            image.save(path, pnginfo=about)
    return run


def test_pairs_are_balanced_and_sides_are_random(run, tmp_path):
    _, path = write_form(run, tmp_path, items=48)
    key = json.loads(path.read_text())
    assert key["methods"] == {"plain": None, "sparkle-method": "50", "cadence-method": None}
    pairs = Counter(frozenset((i["left"], i["right"])) for i in key["items"])
    assert set(pairs.values()) == {16}
    assert set(Counter(i["prompt"] for i in key["items"]).values()) == {12}
    assert 8 < sum(i["left"] == "plain" for i in key["items"]) < 24
    assert write_form(run, tmp_path / "again", items=48)[1].read_text() == path.read_text()


def test_the_page_names_no_method(run, tmp_path):
    page, _ = write_form(run, tmp_path, items=6)
    text = page.read_text()
    assert "sparkle" not in text
    assert "cadence" not in text
    assert text.count("<img ") == 6 * 2 * 3
    assert all(question in text for question in QUESTIONS.values())


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"items": 2}, "3 pairs of methods need at least as many items, got 2"),
        ({"methods": {"plain": None}}, "at least two methods"),
        ({"methods": {"plain": None, "sparkle-method": "60"}}, "no method 'sparkle-method' with strength '60'"),
        ({"questions": {}}, "at least one question"),
    ],
)
def test_impossible_forms_are_errors(run, tmp_path, changed, words):
    with pytest.raises(ValueError, match=words):
        write_form(run, tmp_path, **changed)


def test_answers_of_a_browser_are_read_and_analysed(run, tmp_path, browser):
    page_path, key_path = write_form(run, tmp_path, items=3, questions={"variety": "Which?", "quality": "And?"})
    key = json.loads(key_path.read_text())
    page = browser.new_page(viewport={"width": 400, "height": 800})
    page.goto(f"file://{page_path}")
    page.get_by_role("button", name="Begin").click()
    for number, item in enumerate(key["items"]):
        page.wait_for_selector(f"text={number + 1} of 3")
        button = page.locator("button.next:visible")
        assert button.is_disabled()
        side = "left" if item["left"] == "cadence-method" else "right" if item["right"] == "cadence-method" else "equal"
        page.check(f"input[name='{number}-variety'][value={side}]")
        page.check(f"input[name='{number}-quality'][value=equal]")
        assert page.evaluate("document.documentElement.scrollWidth") <= 400
        button.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Save answers").click()
    download.value.save_as(tmp_path / "answers.json")
    page.close()
    found = analyse(key, [read_answers(tmp_path / "answers.json")])["questions"]
    assert {m: (v["wins"], v["losses"], v["ties"]) for m, v in found["variety"]["methods"].items()} == {
        "plain": (0, 1, 1), "sparkle-method": (0, 1, 1), "cadence-method": (2, 0, 0),
    }  # fmt: skip
    assert all(v["strength"] == pytest.approx(0, abs=1e-6) for v in found["quality"]["methods"].values())
