"""Tables of guidance toward a style: a part for each experiment, and the count of different pictures."""

from types import SimpleNamespace

import torch

from benchmarks.toward_style import different, parts


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


def test_pictures_that_differ_only_in_style_or_show_something_else_count_once_or_not():
    emoji = [{"code": c, "tone": t} for c, t in (("a", "dark"), ("a", "dark"), ("a", "light"), ("b", "dark"))]
    judge = SimpleNamespace(
        emoji=emoji, probabilities=lambda rows: rows, described=lambda prompt: torch.tensor([True, True, True, False])
    )
    shown = torch.eye(4)
    assert different(judge, shown, "a") == 2  # both styles of dark, and light; b is not described
    assert different(judge, shown[[0, 1, 0]], "a") == 1
    assert different(judge, shown[[3]], "a") == 0
