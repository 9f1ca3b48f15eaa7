"""Tables of guidance toward a style: a part for each experiment, and the count of different pictures."""

from statistics import mean, stdev
from types import SimpleNamespace

import pytest
import torch

from benchmarks.toward_style import different, parts, with_seed


def row(name, style, other, **more):
    return {"name": name, "style": style, "other": other, "other_se": 0.0, "valid": 0.5, "different": 3.0, **more}


def test_each_experiment_has_its_own_table_with_a_column_for_each_style():
    styles = ("noto style", "twemoji style")
    rows = [row("plain", style, 0.11 + k, part=part) for k, part in enumerate((None, "diversity")) for style in styles]
    rows += [row("baseline", "noto style", 0.33, part="emoji, transformer", scale=2.0, references=96, baseline=100)]
    found = parts(rows)
    assert ("0.11" in found["style"], "1.11" in found["style"]) == (True, False)
    assert found["style"].splitlines()[-1].count("0.11") == 2
    assert "1.11, 0.50, 3.0" in found["style_diversity"]
    assert "| with a baseline | 2 | 96 | 100 | 0.33, 0.50, 3.0 |" in found["style_transformers"]


def test_seeds_are_added_to_the_mean_of_a_row_and_its_standard_error():
    made, values = {"name": "plain"}, [0.1, 0.4, 0.2, 0.9]
    for k, value in enumerate(values, 1):
        made = with_seed(made, {"other": value})
        assert (made["seeds"], made["other"]) == (k, pytest.approx(mean(values[:k])))
    assert made["other_se"] == pytest.approx(stdev(values) / 2)
    assert with_seed({}, {"other": 1.0})["other_se"] == 0.0


def test_pictures_that_differ_only_in_style_or_show_something_else_count_once_or_not():
    emoji = [{"code": c, "tone": t} for c, t in (("a", "dark"), ("a", "dark"), ("a", "light"), ("b", "dark"))]
    judge = SimpleNamespace(
        emoji=emoji, probabilities=lambda rows: rows, described=lambda prompt: torch.tensor([True, True, True, False])
    )
    shown = torch.eye(4)
    assert different(judge, shown, "a") == 2  # both styles of dark, and light; b is not described
    assert different(judge, shown[[0, 1, 0]], "a") == 1
    assert different(judge, shown[[3]], "a") == 0
