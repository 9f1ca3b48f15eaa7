import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from kspec_guidance.spectrum import CovarianceOperator, renyi_entropy, truncate

ORDERS = [0.5, 1.0, 2.0, 3.7, math.inf]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_vendi_of_orthogonal_clusters_is_their_number(order, dtype):
    x = oracles.clusters(5, 7, dtype)
    assert F.vendi_score(x, order=order).item() == pytest.approx(5, rel=1e-6)
    assert F.vendi_score(x, GaussianKernel(0.05), order=order).item() == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_vendi_of_two_points_is_that_of_their_eigenvalues(order):
    x, (a, b) = oracles.two_points(0.6)
    if order == 1:
        expected = math.exp(-a * math.log(a) - b * math.log(b))
    elif order == math.inf:
        expected = 1 / b
    else:
        expected = (a**order + b**order) ** (1 / (1 - order))
    assert F.vendi_score(x, order=order).item() == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kernel", [None, GaussianKernel(), PolynomialKernel(), LaplacianKernel()])
def test_identical_points_and_one_point_score_one(order, kernel, g):
    x = torch.randn(1, 6, generator=g)
    assert F.vendi_score(x, kernel, order).item() == pytest.approx(1, abs=1e-5)
    assert F.vendi_score(x.expand(9, 6), kernel, order).item() == pytest.approx(1, abs=1e-5)


def test_order_two_needs_no_eigenvalues_and_agrees_with_them(g):
    x = torch.randn(12, 5, generator=g, dtype=torch.float64)
    l = torch.linalg.eigvalsh(GaussianKernel(1.0)(x) / 12)
    assert F.rke_score(x, GaussianKernel(1.0)).item() == pytest.approx(1 / l.square().sum().item(), rel=1e-10)


def test_both_sides_of_the_cosine_spectrum_agree(g):
    x = torch.randn(20, 6, generator=g, dtype=torch.float64)
    wide = torch.cat([x, torch.zeros(20, 30, dtype=torch.float64)], 1)  # d > n takes the n x n matrix
    for order in ORDERS:
        assert F.vendi_score(x, order=order).item() == pytest.approx(F.vendi_score(wide, order=order).item(), rel=1e-6)


def test_truncation_keeps_the_mass_and_ends_at_the_full_score(g):
    x = torch.randn(15, 4, generator=g, dtype=torch.float64)
    l = torch.linalg.eigvalsh(GaussianKernel(1.0)(x) / 15)
    assert truncate(l, 4).sum().item() == pytest.approx(l.sum().item())
    full = F.vendi_score(x, GaussianKernel(1.0)).item()
    assert F.vendi_score(x, GaussianKernel(1.0), truncation=15).item() == pytest.approx(full, rel=1e-12)
    top = l.flip(0)[:4] + (1 - l.flip(0)[:4].sum()) / 4
    expected = math.exp(-(top * top.log()).sum().item())
    assert F.vendi_score(x, GaussianKernel(1.0), truncation=4).item() == pytest.approx(expected, rel=1e-9)


def test_the_feature_route_approaches_the_exact_score(g):
    x = torch.randn(50, 3, generator=g)
    phi = RandomFourierFeatures(GaussianKernel(1.5), 3, 8192)
    assert F.vendi_score(x, feature_map=phi).item() == pytest.approx(F.vendi_score(x, GaussianKernel(1.5)).item(), rel=0.02)


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_conditional_scores_at_the_three_extremes(order):
    x, n = oracles.clusters(6, 1), 6
    one_prompt, own_prompt = torch.ones(n, 1, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    assert F.conditional_vendi_score(x, one_prompt, order=order).item() == pytest.approx(n)
    assert F.information_vendi_score(x, one_prompt, order=order).item() == pytest.approx(1)
    assert F.conditional_vendi_score(x, own_prompt, order=order).item() == pytest.approx(1)
    assert F.information_vendi_score(x, own_prompt, order=order).item() == pytest.approx(n)


def test_independent_prompts_condition_nothing():
    x = oracles.clusters(4, 3)  # every prompt meets every sample once
    t = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    assert F.conditional_vendi_score(x, t).item() == pytest.approx(4)
    assert F.information_vendi_score(x, t).item() == pytest.approx(1)
    assert F.conditional_rke_score(x, t).item() == pytest.approx(4)


def test_entropies_form_a_chain(g):
    x, t = torch.randn(11, 4, generator=g), torch.randn(11, 3, generator=g)
    k, kt = GaussianKernel(1.0), GaussianKernel(2.0)
    product = F.conditional_vendi_score(x, t, k, kt) * F.information_vendi_score(x, t, k, kt)
    assert product.item() == pytest.approx(F.vendi_score(x, k).item(), rel=1e-10)


def test_conditional_rke_is_the_ratio_of_frobenius_norms(g):
    x, t = torch.randn(9, 4, generator=g).double(), torch.randn(9, 3, generator=g).double()
    k, kt = GaussianKernel(1.0)(x), GaussianKernel(2.0)(t)
    expected = kt.square().sum() / (k * kt).square().sum()
    assert F.conditional_rke_score(x, t, GaussianKernel(1.0), GaussianKernel(2.0)).item() == pytest.approx(expected.item())


def test_mmd_of_a_linear_kernel_is_the_distance_of_the_means(g):
    x, y = torch.randn(8, 3, generator=g).double(), torch.randn(10, 3, generator=g).double()
    linear = PolynomialKernel(1, gamma=1.0, coef=0.0)
    expected = (x.mean(0) - y.mean(0)).square().sum().item()
    assert F.mmd(x, y, linear, unbiased=False).item() == pytest.approx(expected)
    within = x.var(0).sum() / 8 + y.var(0).sum() / 10
    assert F.mmd(x, y, linear).item() == pytest.approx(expected - within.item())


def test_the_unbiased_mmd_is_kid_of_torchmetrics(g):
    from torchmetrics.image.kid import poly_mmd

    x, y = torch.randn(20, 16, generator=g), torch.randn(20, 16, generator=g) + 0.3
    assert F.mmd(x, y, PolynomialKernel()).item() == pytest.approx(poly_mmd(x, y).item(), rel=1e-4)


@pytest.mark.parametrize("order", [0.7, 1.0, 2.0, 3.0])
def test_scores_are_differentiable(order, g):
    x = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 2, generator=g, dtype=torch.float64)
    k, y = GaussianKernel(1.0), torch.randn(4, 3, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: F.vendi_score(z, k, order), x)
    assert torch.autograd.gradcheck(lambda z: F.conditional_vendi_score(z, t, k, k, order), x)
    assert torch.autograd.gradcheck(lambda z: F.mmd(z, y, k), x)


def test_leading_dimensions_are_batches(g):
    x, t = torch.randn(2, 3, 8, 4, generator=g), torch.randn(2, 3, 8, 2, generator=g)
    k = GaussianKernel(1.0)
    both = F.conditional_vendi_score(x, t, k, k)
    assert both.shape == (2, 3)
    assert both[1, 2].item() == pytest.approx(F.conditional_vendi_score(x[1, 2], t[1, 2], k, k).item(), rel=1e-6)
    assert F.vendi_score(x, CosineKernel())[0, 1].item() == pytest.approx(F.vendi_score(x[0, 1]).item(), rel=1e-6)


def test_streamed_moments_do_not_depend_on_batching(g):
    x = torch.randn(30, 5, generator=g, dtype=torch.float64)
    whole, parts, extra = CovarianceOperator().add(x), CovarianceOperator(), CovarianceOperator().add(x[:4])
    for part in x.split(7):
        parts.add(part)
    torch.testing.assert_close(whole.eigenvalues(), parts.eigenvalues())
    torch.testing.assert_close(parts.merge(extra).subtract(extra).matrix(), whole.matrix())
    with pytest.raises(ValueError, match="no samples"):
        CovarianceOperator().matrix()


def test_entropy_ignores_rounding_noise():
    l = torch.tensor([1e-18, 0.0, 1.0], dtype=torch.float64)
    assert renyi_entropy(l, 0.01).exp().item() == pytest.approx(1)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.vendi_score(torch.empty(0, 3)), "no samples"),
        (lambda: F.vendi_score(torch.ones(3)), r"shape \[n, d\]"),
        (lambda: F.vendi_score(torch.tensor([[float("nan")]])), "NaN"),
        (lambda: F.vendi_score(torch.ones(2, 2), order=0), r"\(0, inf\]"),
        (lambda: F.vendi_score(torch.ones(2, 2), order=float("nan")), r"\(0, inf\]"),
        (lambda: F.vendi_score(torch.eye(3), truncation=0), "at least 1"),
        (lambda: F.conditional_vendi_score(torch.ones(3, 2), torch.ones(4, 2)), "one prompt row per sample"),
        (lambda: F.mmd(torch.ones(1, 2), torch.ones(4, 2), CosineKernel()), "unbiased=False"),
    ],
)
def test_degenerate_input_is_an_error_that_says_so(call, words):
    with pytest.raises(ValueError, match=words):
        call()
