"""The table of digits toward equal shares: distances of each run, with their error, and of all runs together."""

from benchmarks.digits_target import tables


def test_a_setting_has_a_line_with_its_distances():
    row = {"name": "cubic kernel", "scale": 0.3, "runs": 4, "valid": 0.7}
    row |= {"distance": 0.2, "distance_se": 0.01, "together": 0.14}
    lines = tables([row, row | {"name": "plain", "scale": 0.0}]).splitlines()
    assert lines[-2] == "| cubic kernel | 0.3 | 4 | 0.20 ± 0.01 | 0.14 | 0.70 |"
    assert lines[-1].startswith("| plain | - | 4 |")
