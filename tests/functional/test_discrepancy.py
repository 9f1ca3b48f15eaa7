import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.functional import discrepancy
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


def sets_beside(offset, width, n=1500, scale=1.0):
    """Two float32 sets of a normal distribution around a point at this distance from the origin, in each coordinate."""
    return tuple((scale * rows(n, width, seed) + offset).float() for seed in (1, 2))


@pytest.mark.parametrize("n", [1500, 5000])  # one pass over all pairs, and a matrix for each pair of subsets
@pytest.mark.parametrize("kernel", [PolynomialKernel(), GaussianKernel(4.0)])
@pytest.mark.parametrize("offset", [0, 3, 10, 14, 20, 100])
def test_rounding_of_kid_is_below_its_share_of_the_spread(offset, kernel, n):
    """The farther from the origin, the larger the kernels beside their differences: near 15, float32 reaches the bound."""
    x, y = sets_beside(offset, 64, n)
    mean, spread = F.kid(x, y, kernel, subsets=8, subset_size=400)
    exact, its = F.kid(x.double(), y.double(), kernel, subsets=8, subset_size=400)
    assert abs(mean - exact) <= discrepancy.ROUNDING_SHARE * its
    assert spread.item() == pytest.approx(its.item(), rel=0.02)


@pytest.mark.parametrize(
    ("x", "y"),
    [
        sets_beside(1000, 64),  # kernels of 1e18, whose differences float32 has lost
        sets_beside(0, 1024, scale=1e-3),  # kernels near 1, that differ by less than float32 shows
        (torch.arange(1, 1501)[:, None] * 1e9 + torch.zeros(64), torch.ones(1500, 64)),  # overflow in float32
        tuple(
            (1 + z * (torch.arange(1500) % 7 == 0)[:, None]).float() for z in (rows(1500, 64), rows(1500, 64, 1))
        ),  # copies
    ],
)
def test_kid_is_that_of_float64_where_float32_is_too_coarse(x, y):
    found, exact = (F.kid(a, b, subsets=8, subset_size=400) for a, b in ((x, y), (x.double(), y.double())))
    assert abs(found[0] - exact[0]) <= discrepancy.ROUNDING_SHARE * exact[1]


@pytest.mark.parametrize(("offset", "same"), [(1000, True), (0, False)])
def test_kid_of_float32_rows_is_in_float64_where_rounding_is_coarse_only(offset, same):
    x, y = sets_beside(offset, 64)
    found, exact = (F.kid(a, b, subsets=8, subset_size=400)[0] for a, b in ((x, y), (x.double(), y.double())))
    assert torch.equal(found, exact) == same


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_in_blocks_is_that_of_the_whole_matrices(unbiased):
    """The biased square of a linear kernel is that of the means; unbiased, the mean of the variances is taken off."""
    x, y = rows(2100, 3), rows(1030, 3, 1) + 0.3
    linear = PolynomialKernel(1, gamma=1.0, coef=0.0)
    expected = (x.mean(0) - y.mean(0)).square().sum() - unbiased * (x.var(0).sum() / 2100 + y.var(0).sum() / 1030)
    assert F.mmd(x, y, linear, unbiased).item() == pytest.approx(expected.item(), rel=1e-9)
