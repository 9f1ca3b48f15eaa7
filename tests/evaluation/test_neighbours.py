import pytest
import torch

from kspec_guidance.evaluation.neighbours import largest_cosine, near_duplicates, prompt_bound, redundant
from tests.samples import rows


def test_near_duplicates_are_pairs_of_distinct_rows():
    x = torch.cat([rows(5, 4), 2 * rows(5, 4)[:2]])
    found = near_duplicates(x, pairs=100, at_least=-2.0)
    assert len(found) == 7 * 6 // 2
    assert [(d.first, d.second) for d in found[:2]] == [(0, 5), (1, 6)]
    assert near_duplicates(x[:1], at_least=-2.0) == []


def test_largest_cosine_of_rows_in_the_other_set_is_one():
    x = rows(5, 4)
    torch.testing.assert_close(largest_cosine(3 * x[:2], x), torch.ones(2))
    assert largest_cosine(x, x[:0]).isnan().all()


def test_redundant_rows_leave_no_two_that_are_close(monkeypatch):
    monkeypatch.setattr("kspec_guidance.evaluation.neighbours.BLOCK_ROWS", 3)
    angles = torch.tensor([0.0, 0.1, 0.2, 2.0, 0.3, 2.01, 0.0])
    x = torch.stack([angles.cos(), angles.sin()], 1)
    assert redundant(x, 0.99) == [1, 4, 5, 6]  # 0.2 stays, since 0.1 is left out; 0.3 goes with it
    assert redundant(x, 1.01) == []


def test_prompt_bound_is_the_difference_of_mean_cosines():
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    groups = [[0, 3, 5], [1, 2], [4, 6, 7]]  # 8 has no prompt
    u = torch.nn.functional.normalize(x.double())
    expected = {}
    for group in groups:
        for i in group:
            same = [u[i] @ u[j] for j in group if j != i]
            other = [u[i] @ u[j] for g in groups for j in g if g is not group]
            expected[i] = float(sum(same) / len(same) - sum(other) / len(other))
    assert prompt_bound(x, groups) == pytest.approx(expected)
    assert prompt_bound(x, groups[:1]) == {}
