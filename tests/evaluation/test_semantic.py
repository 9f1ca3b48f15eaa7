import pytest
import torch

from kspec_guidance.evaluation.neighbours import redundant
from kspec_guidance.evaluation.semantic import semantic_duplicates

pytest.importorskip("faiss")


def clusters(n, width=32):
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(40, width, generator=g)
    return centres[torch.randint(40, (n,), generator=g)] + 0.3 * torch.randn(n, width, generator=g)


def test_duplicates_are_those_of_the_exact_comparison(monkeypatch):
    monkeypatch.setattr("kspec_guidance.evaluation.semantic.BLOCK_ROWS", 64)
    x = clusters(1500)
    exact, found = set(redundant(x, 0.93)), {i: (j, value) for i, j, value in semantic_duplicates([x], 1500, 0.93)}
    assert len(exact) > 100
    assert len(exact ^ found.keys()) <= 0.03 * len(exact)
    for i, (j, value) in found.items():
        assert j < i
        assert j not in found
        assert value == pytest.approx(float(torch.cosine_similarity(x[i], x[j], dim=0)), abs=2e-3)
        assert value >= 0.93 - 2e-3


def test_the_result_does_not_depend_on_how_rows_are_read():
    x = clusters(1000)
    whole, parts, scaled = (
        [(i, j) for i, j, _ in semantic_duplicates(blocks, 1000, 0.93)]
        for blocks in ([x], x.split(77), (4 * row[None] for row in x))
    )
    assert whole == parts == scaled


def test_of_equal_rows_the_first_stays(monkeypatch):
    monkeypatch.setattr("kspec_guidance.evaluation.semantic.BLOCK_ROWS", 50)
    found = semantic_duplicates([torch.ones(300, 4)], 300)
    assert [(i, j) for i, j, _ in found] == [(i, 0) for i in range(1, 300)]
    assert semantic_duplicates([torch.eye(5)], 5) == []
    assert semantic_duplicates([torch.ones(1, 3)], 1) == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64, torch.int64])
def test_equal_rows_repeat_each_other_at_every_limit_and_dtype(monkeypatch, dtype):
    monkeypatch.setattr("kspec_guidance.evaluation.semantic.BLOCK_ROWS", 64)
    x = (9 * clusters(300, width=8)).to(dtype)
    found = semantic_duplicates([x, x[:0], x], 600, 1.0)
    assert {i for i, _, _ in found} >= set(range(300, 600))
    assert semantic_duplicates([torch.zeros(3, 8)], 3) == []


def test_rows_that_do_not_fit_are_errors():
    x = torch.eye(4)
    for blocks, rows, at_least, message in (
        ([x], 5, 0.9, "expected 5 rows, at least one, and got 4"), ([x], 3, 0.9, "expected 3 rows"), ([], 0, 0.9, "got 0"),
        ([x], 4, 0.0, "cosine in"), ([x], 4, 1.5, "cosine in"), ([x * float("nan")], 4, 0.9, "NaN or infinite"),
        ([x[0]], 4, 0.9, r"shape \[k, d\], got \[4\]"), ([x, x[:, :3]], 8, 0.9, "rows of 4 and of 3 numbers"),
        ([x[:0]], 0, 0.9, "at least one, and got 0"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            semantic_duplicates(blocks, rows, at_least)
