import math

import pytest
import torch

from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory.selection import prune
from tests.memory.banks import WEIGH, filled
from tests.samples import clustered, unit


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 0.1])
def test_what_pruning_drops_is_within_the_stated_bound(seed, tolerance, g):
    bank, _, _ = filled()
    b = 0.6
    x, t = (z[seed : seed + 2] for z in clustered(20, seed=seed))
    t = unit(t + 0.2 * torch.randn(2, 6, generator=g))
    x = unit(x).double()
    kernel = GaussianKernel(b)
    every = bank.select(t, WEIGH, 0.0)
    some = bank.select(t, WEIGH, tolerance)
    assert len(some) < len(every) == 300
    left = every.effective_count(2) - some.effective_count(2)
    allowed = tolerance * every.effective_count(2).clamp_min(1)
    assert (left <= allowed * (1 + 1e-5) + 1e-4).all()  # masses are sums of float32 weights
    pull = lambda s: kernel.squared().vjp(x, s.rows(x), s.weights.double())  # noqa: E731
    error = (pull(every) - pull(some)).norm(dim=1)
    assert (error <= allowed * math.sqrt(2 / math.e) / b).all()


def test_pruning_drops_the_lightest_and_counts_their_rows():
    weights = torch.tensor([[1.0, 1e-4, 1e-5, 1e-2], [1e-6, 1e-5, 1e-5, 1e-2]])
    assert prune(weights, torch.ones(4), 1e-3).tolist() == [True, False, False, True]
    assert prune(weights, torch.tensor([1, 100, 1, 1]), 1e-3).tolist() == [True, True, False, True]
    heavy = torch.tensor([[1.0, 1e-4, 1e-5, 1e-2]])
    assert prune(heavy, torch.tensor([1000, 100, 1, 1]), 1e-3).tolist() == [True, False, False, False]  # of 1,000 rows
    assert prune(weights, torch.ones(4), 0.0).all()
    assert not prune(weights, torch.ones(4), 10.0).any()
