"""Damaged files raise the errors that their readers document: a short run of benchmarks/fuzz.py."""

from benchmarks.fuzz import fuzz


def test_damaged_files_raise_documented_errors():
    found = fuzz(2000, seed=1)
    assert len(found) == 10
    for name, counts in found.items():
        assert not counts["failures"], (name, counts["failures"][:3])
        assert counts["refused"] + counts["loaded"] == counts["inputs"] == 200
    assert sum(c["refused"] for c in found.values()) > 1000
