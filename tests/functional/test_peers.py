"""Scores against those of other packages and of the papers' code (benchmarks/peers.py)."""

import re
from pathlib import Path

import pytest

from benchmarks.peers import INSTALLABLE, markdown, table

PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "migration.md"
STORED = table(live=False)


@pytest.mark.parametrize("row", STORED, ids=lambda r: f"{r.peer} {r.score}")
def test_score_equals_other_code(row):
    assert row.ours == pytest.approx(row.theirs, abs=1.01 * row.tolerance)


def test_installed_packages_give_the_stored_values():
    live = table()
    assert {"torchmetrics"} <= {r.peer for r in live if r.live} <= set(INSTALLABLE)
    for row, stored in zip(live, STORED, strict=True):
        assert row.theirs == pytest.approx(stored.theirs, rel=1e-6), row


def test_table_of_the_documentation_is_current():
    """The printed digits; the last one may depend on the machine."""
    pattern = re.compile(r"^\|.*\|$", re.MULTILINE)
    shown = [line for line in pattern.findall(PAGE.read_text()) if line in markdown(STORED).splitlines()]
    assert len(shown) == len(STORED) + 2
