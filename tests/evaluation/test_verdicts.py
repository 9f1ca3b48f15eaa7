"""Sentences of reports: every set gets one that is true of it, and doubts and advice where they are due."""

from pathlib import Path

import pytest

from kspec_guidance.evaluation.verdicts import Headline, advice, compare_verdict, doubts, set_names, set_verdict
from kspec_guidance.statistics import Comparison


@pytest.mark.parametrize(
    ("headline", "sentence"),
    [
        (Headline(1, 1.0), "There is one image, so nothing can be said about variety."),
        (Headline(4, 1.0), "All 4 images are of one kind."),
        (Headline(30, 1.0, 1.0, 1.2), "All 30 images are of one kind (95% interval 1.0 to 1.2)."),
        (Headline(30, 29.5, 24.0, 30.0), "Nearly all of the 30 images differ in kind: 29.5 different ones (95% interval"),
        (
            Headline(500, 123.4, 110.0, 140.0),
            "The 500 images are as varied as 123 different ones (95% interval 110 to 140).",
        ),
    ],
)
def test_verdict_of_one_set(headline, sentence):
    assert set_verdict(headline).startswith(sentence)


def test_a_difference_is_sure_only_with_a_small_p_value():
    sure = compare_verdict(("a", "b"), Comparison(4.0, 6.0, 0.005, (50, 50), ""), False)
    assert sure == "b is more varied than a: 6.0 against 4.0 different images among 50 of each, +50% (sure, p = 0.005)."
    assert compare_verdict(("a", "b"), Comparison(6.0, 4.0, 0.005, (50, 50), ""), False).startswith(
        "a is more varied than b"
    )
    unsure = compare_verdict(("a", "b"), Comparison(4.0, 6.0, 0.2, (8, 8), ""), False)
    assert unsure.startswith("No sure difference: 4.0 different images in a and 6.0 in b among 8 of each (p = 0.2)")
    assert "only large differences" in unsure
    assert "per prompt, over 12 prompts" in compare_verdict(("a", "b"), Comparison(2, 3, 0.01, (12, 12), ""), True)


def test_doubts_are_named_only_where_they_are_due():
    assert doubts(Headline(60, 9.0), [5, 8], "net", True, 0.75) == []
    small = doubts(Headline(12, 3.0), [2, 2, 8], "net", False, 0.6)
    assert [line.split(" ")[0] for line in small] == ["There", "2", "The"]
    assert "0.6" in small[2]
    assert "net" in small[2]


def test_advice_names_the_least_varied_prompts_and_near_duplicates():
    assert advice([("a", 4.0, 6)], 0) == []
    assert advice([("a", 1.2, 2)], 0) == []  # two images say little
    found = advice([(f"p{k}", 1.1, 6) for k in range(7)], 3)
    assert found[0] == "p0: 1.1 of 6 images differ; raise variety, or rephrase the prompt"
    assert found[5] == "2 more prompts have images that are as alike"
    assert found[6].startswith("3 images nearly repeat others")


def test_sets_are_named_by_the_ends_of_their_paths():
    assert set_names(Path("x/a"), Path("y/b")) == ("a", "b")
    assert set_names(Path("x/a"), Path("y/a")) == ("x/a", "y/a")
    assert set_names(Path("a"), Path("a")) == ("a (first)", "a (second)")
