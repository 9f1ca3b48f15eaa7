import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, PolynomialKernel
from tests.samples import rows


def test_mmd_with_linear_kernel_equals_squared_mean_distance(g):
    x, y = torch.randn(8, 3, generator=g).double(), torch.randn(10, 3, generator=g).double()
    linear = PolynomialKernel(1, gamma=1.0, coef=0.0)
    expected = (x.mean(0) - y.mean(0)).square().sum().item()
    assert F.mmd(x, y, linear, unbiased=False).item() == pytest.approx(expected)
    within = x.var(0).sum() / 8 + y.var(0).sum() / 10
    assert F.mmd(x, y, linear).item() == pytest.approx(expected - within.item())


def test_unbiased_mmd_matches_torchmetrics_kid(g):
    from torchmetrics.image.kid import poly_mmd

    x, y = torch.randn(20, 16, generator=g), torch.randn(20, 16, generator=g) + 0.3
    assert F.mmd(x, y, PolynomialKernel()).item() == pytest.approx(poly_mmd(x, y).item(), rel=1e-4)


def test_kid_of_full_subsets_equals_unbiased_mmd():
    x, y = rows(20, 8), rows(20, 8, 1) + 0.2
    assert F.kid(x, y, subsets=3)[0].item() == pytest.approx(F.mmd(x, y, PolynomialKernel()).item(), rel=1e-9)
    _, std = F.kid(x, y, subsets=50, subset_size=10)
    assert std > 0
    assert torch.equal(F.kid(x, y, subsets=5, subset_size=4)[0], F.kid(x, y, subsets=5, subset_size=4)[0])
    assert math.isnan(F.kid(x, y, subsets=1)[1])


@pytest.mark.parametrize(("n", "m"), [(80, 80), (40, 120)])
def test_kid_spread_of_whole_sets_is_their_standard_error(n, m):
    draws = [F.kid(rows(n, 4, s), 0.5 + rows(m, 4, s + 500), subsets=20, subset_size=max(n, m)) for s in range(60)]
    values, spreads = (torch.stack(z) for z in zip(*draws, strict=True))
    assert 0.75 < spreads.square().mean().sqrt() / values.std() < 1.4


def test_kid_matches_torchmetrics_for_small_and_for_whole_subsets():
    from torchmetrics.image.kid import KernelInceptionDistance

    x, y = rows(200, 16), 0.3 + rows(200, 16, 1)
    for size in (30, 200):
        theirs = KernelInceptionDistance(feature=torch.nn.Flatten(), subsets=200, subset_size=size)
        theirs.update(y.float(), real=True), theirs.update(x.float(), real=False)
        mean, std = F.kid(x, y, subsets=200, subset_size=size)
        other_mean, other_std = theirs.compute()
        error = 1e-5 if size == 200 else 5 * std.item() * (2 / 200) ** 0.5  # of the means of two times 200 random subsets
        assert mean.item() == pytest.approx(other_mean.item(), abs=error)
        if size == 30:
            assert std.item() == pytest.approx(other_std.item(), rel=0.25)


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_with_feature_map_matches_its_kernel(unbiased):
    x, y = rows(9, 3), rows(7, 3, 1)
    phi = RandomFourierFeatures(GaussianKernel(1.0), 3, 32)
    linear = PolynomialKernel(1, gamma=1.0, coef=0.0)
    expected = F.mmd(phi(x), phi(y), linear, unbiased)
    assert F.mmd(x, y, feature_map=phi, unbiased=unbiased).item() == pytest.approx(expected.item(), abs=1e-10)


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_cmmd_of_two_points_in_other_shares_is_the_share_squared_times_their_distance(share):
    """Of kernel mean embeddings: ``|p (phi(a) - phi(b))|^2 = p^2 (2 - 2 k(a, b))``, whatever the scale of the features."""
    a, b = torch.tensor([3.0, 0.0, 0.0]), torch.tensor([0.0, 0.5, 0.0])
    y = torch.stack([b] * int(8 * share) + [a] * (8 - int(8 * share)))
    expected = 1000 * share**2 * (2 - 2 * math.exp(-2 / 200))
    assert float(F.cmmd(a.expand(5, 3), y)) == pytest.approx(expected, abs=1e-9)


def test_unbiased_cmmd_is_zero_in_the_mean(g):
    values = [float(F.cmmd(*torch.randn(2, 20, 4, generator=g), unbiased=True)) for _ in range(200)]
    error = torch.tensor(values).std() / 200**0.5
    assert abs(sum(values) / 200) < 4 * float(error)


@pytest.mark.parametrize("kernel", [None, GaussianKernel(2.0), lambda a, b: (a @ b.mT + 1).square()])
def test_kid_of_overlapping_subsets_is_the_mean_of_their_mmd(kernel):
    x, y = rows(1200, 5), rows(40, 5, seed=1) + 0.1  # of which all pairs are fewer than those of the subsets
    g, draws = torch.Generator().manual_seed(3), []
    for _ in range(30):
        i, j = (torch.randperm(len(z), generator=g)[: len(z) // 2] for z in (x, y))
        draws.append(F.mmd(x[i], y[j], kernel))
    mean, spread = F.kid(x, y, kernel, subsets=30, subset_size=600, seed=3)
    assert mean.item() == pytest.approx(torch.stack(draws).mean().item(), rel=1e-9)
    assert spread.item() == pytest.approx(torch.stack(draws).std().item(), rel=1e-9)
