"""The table of few large early moves toward a style: a line for each setting that has been measured."""

from benchmarks.style_early import LABELS, OTHERS, SETTINGS, early_table


def row(name, style, other, seeds, **more):
    about = {"name": name, "style": style, "references": 0, "baseline": 0, "scale": None, "seeds": seeds}
    return about | {"other": other, "other_se": 0.04, "valid": 0.5, "different": 3.0} | more


def test_a_setting_has_a_line_with_both_styles_and_its_number_of_seeds():
    early = {"references": 16, "baseline": 100, "scale": 6.0}
    rows = [row("large", style, 0.1 + k, 1, **early) for k, style in enumerate(("noto style", "twemoji style"))]
    rows += [row("plain", style, 0.4 + k, 2) for k, style in enumerate(("noto style", "twemoji style"))]
    rows += [row("half of CFG", "noto style", 0.7, 0)]
    lines = early_table(rows).splitlines()[2:]
    assert lines == [
        "| plain | - | - | - | 2 | 0.40 ± 0.04, 0.50, 3.0 | 1.40 ± 0.04, 0.50, 3.0 |",
        "| with a baseline, `stop=0.2` | 6 | 16 | 100 | 1 | 0.10, 0.50, 3.0 | 1.10, 0.50, 3.0 |",
    ]


def test_other_prompts_and_more_steps_have_tables_of_their_own():
    rows = [row("plain", "noto style", 0.1, 2), row("plain", "noto style", 0.3, 2, part=OTHERS)]
    first, name, second = early_table(rows).split("\n\n")
    assert name == f"*{OTHERS}*:"
    assert ("0.10 ± 0.04" in first, "0.30 ± 0.04" in second) == (True, True)


def test_every_setting_has_a_label():
    assert {name for _, name, *_ in SETTINGS} == set(LABELS)
