import math

import pytest
import torch

from kspec_guidance.kernels import GaussianKernel, RationalQuadraticKernel
from kspec_guidance.memory import MemoryBank, selection
from kspec_guidance.memory.selection import prune
from tests.memory.banks import PROMPT_WEIGHTS, filled_bank
from tests.samples import clustered_samples, normalize_rows


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tolerance", [1e-4, 1e-3, 0.1])
def test_pruning_error_is_within_bound(seed, tolerance, g):
    bank, _, _ = filled_bank()
    bandwidth = 0.6
    x, t = (z[seed : seed + 2] for z in clustered_samples(20, seed=seed))
    t = normalize_rows(t + 0.2 * torch.randn(2, 6, generator=g))
    x = normalize_rows(x).double()
    kernel = GaussianKernel(bandwidth)
    all_rows = bank.select(t, PROMPT_WEIGHTS, 0.0)
    pruned = bank.select(t, PROMPT_WEIGHTS, tolerance)
    assert len(pruned) < len(all_rows) == 300
    dropped = all_rows.effective_count(2) - pruned.effective_count(2)
    allowed = tolerance * all_rows.effective_count(2).clamp_min(1)
    assert (dropped <= allowed * (1 + 1e-5) + 1e-4).all()  # counts are sums of float32 weights
    gradient = lambda selection: kernel.squared().vjp(x, selection.rows(x), selection.weights.double())  # noqa: E731
    error = (gradient(all_rows) - gradient(pruned)).norm(dim=1)
    assert (error <= allowed * math.sqrt(2 / math.e) / bandwidth).all()


def test_prune_drops_smallest_weights_by_row_count():
    weights = torch.tensor([[1.0, 1e-4, 1e-5, 1e-2], [1e-6, 1e-5, 1e-5, 1e-2]])
    assert prune(weights, torch.ones(4), 1e-3).tolist() == [True, False, False, True]
    assert prune(weights, torch.tensor([1, 100, 1, 1]), 1e-3).tolist() == [True, True, False, True]
    large_counts = torch.tensor([[1.0, 1e-4, 1e-5, 1e-2]])
    # relative to 1,000 rows
    assert prune(large_counts, torch.tensor([1000, 100, 1, 1]), 1e-3).tolist() == [True, False, False, False]
    assert prune(weights, torch.ones(4), 0.0).all()
    assert not prune(weights, torch.ones(4), 10.0).any()


@pytest.mark.parametrize("kernel", [GaussianKernel(0.6), RationalQuadraticKernel(0.6)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_products_formed_once_give_the_same_distances_and_gradients(kernel, dtype):
    bank, _, _ = filled_bank()
    x, t = (normalize_rows(z[:3]).to(dtype) for z in clustered_samples(20))
    found = bank.select(t, PROMPT_WEIGHTS, 0.0)
    products = found.products(x)
    if products is None:  # rows of another dtype are converted block by block
        assert dtype == torch.float64
        products = x @ found.rows(x).mT
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-6, "atol": 1e-7}
    torch.testing.assert_close(products, x @ found.rows(x).mT, **tolerance)
    for given, alone in [
        (found.distances(x, 16, products), found.distances(x, 16)),
        (found.kernel_gradient(kernel, x, products), found.kernel_gradient(kernel, x)),
    ]:
        torch.testing.assert_close(given, alone, **tolerance)


def test_products_are_left_to_blocks_where_these_are_cheaper(monkeypatch, g):
    near, far, half = MemoryBank(), MemoryBank(), MemoryBank(dtype=torch.bfloat16)
    x = torch.randn(8, 16, generator=g)
    near.add(x)
    half.add(x)
    far.add(x + 100)
    of = lambda bank: bank.select(None, None, 0.0, normalize=False).products(x)  # noqa: E731
    assert of(near).shape == (8, 8)
    assert of(half) is None
    assert of(far) is None
    monkeypatch.setattr(selection, "FEW_ROWS", 7)
    assert of(near) is None
