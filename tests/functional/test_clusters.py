"""Kinds: clusters of known sets, their effective number, and sets too large for one matrix of distances."""

import pytest
import torch

from kspec_guidance import functional as F


def groups(sizes, d=32, spread=0.02):
    """Rows of norms 0.5 to 2 around orthogonal directions, in random order, and their true labels."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    labels = labels[torch.randperm(len(labels), generator=g)]
    x = torch.eye(d)[labels] + spread * torch.randn(len(labels), d, generator=g)
    return x * (0.5 + 1.5 * torch.rand(len(labels), 1, generator=g)), labels


def same_partition(a, b):
    return bool(((a[:, None] == a) == (b[:, None] == b)).all())


@pytest.mark.parametrize("sizes", [[7], [1] * 9, [5, 5, 5], [12, 4, 1, 1]])
def test_kinds_are_the_groups_and_their_number_is_hills(sizes):
    x, labels = groups(sizes)
    assert same_partition(F.kind_labels(x), labels)
    n = sum(sizes)
    assert float(F.kinds_score(x)) == pytest.approx(n**2 / sum(k * k for k in sizes))
    found = F.kinds(x)
    assert [len(k.samples) for k in found] == sorted(sizes, reverse=True)
    assert sum(k.share for k in found) == pytest.approx(1)
    assert sorted(i for k in found for i in k.samples) == list(range(n))


def test_a_kind_ends_at_the_given_mean_distance():
    angle = torch.tensor([0.0, 0.7])
    x = torch.stack([angle.cos(), angle.sin()], 1)
    gap = 2 * torch.tensor(0.35).sin().item()
    assert F.kind_labels(x, gap + 1e-6).tolist() == [0, 0]
    assert F.kind_labels(x, gap - 1e-6).tolist() == [0, 1]


def test_the_medoid_comes_first(g):
    x = torch.eye(8)[0] + 0.3 * torch.randn(9, 8, generator=g)
    u = torch.nn.functional.normalize(x.double())
    kind = F.kinds(x, 2.0)[0]
    assert kind.samples[0] == int((u @ u.T).mean(1).argmax())
    assert kind.values == pytest.approx((u @ u.T).mean(1)[kind.samples].tolist())


def test_copies_and_rows_of_zeros_are_of_one_kind():
    assert float(F.kinds_score(torch.zeros(5, 3))) == 1
    assert float(F.kinds_score(torch.ones(5, 3, dtype=torch.float16))) == 1
    assert F.kind_labels(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 0.0]])).tolist() == [0, 1, 0]


@pytest.mark.parametrize("sizes", [[40, 20, 5, 1, 1, 1], [1] * 60, [70]])
def test_large_sets_are_clustered_in_parts(monkeypatch, sizes):
    x, labels = groups(sizes, 64)
    monkeypatch.setattr("kspec_guidance.functional.clusters.LINKAGE_ROWS", 8)
    monkeypatch.setattr("kspec_guidance.functional.clusters.BLOCK_ROWS", 7)
    assert same_partition(F.kind_labels(x), labels)
    assert F.kind_labels(x).bincount().tolist() == sizes


def test_wrong_arguments_are_named():
    for distance in (-0.1, 2.1, float("nan")):
        with pytest.raises(ValueError, match=r"distance must lie in 0\.\.2"):
            F.kinds(torch.eye(3), distance)
    with pytest.raises(ValueError, match="NaN"):
        F.kinds(torch.full((3, 2), float("nan")))
    for sizes in ([], [0, 0], [3, -1]):
        with pytest.raises(ValueError, match="sizes must be"):
            F.effective_number(sizes)
