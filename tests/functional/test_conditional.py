import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.functional import conditional
from kspec_guidance.kernels import CosineKernel, GaussianKernel
from tests.samples import rows


@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_conditional_scores_of_one_and_of_distinct_prompts(order):
    x, n = oracles.clusters(6, 1), 6
    one_prompt, own_prompt = torch.ones(n, 1, dtype=torch.float64), torch.eye(n, dtype=torch.float64)
    assert F.conditional_vendi_score(x, one_prompt, order=order).item() == pytest.approx(n)
    assert F.information_vendi_score(x, one_prompt, order=order).item() == pytest.approx(1)
    assert F.conditional_vendi_score(x, own_prompt, order=order).item() == pytest.approx(1)
    assert F.information_vendi_score(x, own_prompt, order=order).item() == pytest.approx(n)


def test_independent_prompts_leave_scores_unchanged():
    x = oracles.clusters(4, 3)  # every prompt occurs once with every cluster
    t = torch.eye(3, dtype=torch.float64).repeat(4, 1)
    assert F.conditional_vendi_score(x, t).item() == pytest.approx(4)
    assert F.information_vendi_score(x, t).item() == pytest.approx(1)
    assert F.conditional_rke_score(x, t).item() == pytest.approx(4)


def test_conditional_times_information_equals_vendi(g):
    x, t = torch.randn(11, 4, generator=g), torch.randn(11, 3, generator=g)
    k, kt = GaussianKernel(1.0), GaussianKernel(2.0)
    product = F.conditional_vendi_score(x, t, k, kt) * F.information_vendi_score(x, t, k, kt)
    assert product.item() == pytest.approx(F.vendi_score(x, k).item(), rel=1e-10)


@pytest.mark.parametrize("unbiased", [False, True])
@pytest.mark.parametrize("kernel", [None, GaussianKernel()])
def test_conditional_rke_by_blocks_is_that_of_whole_matrices(g, monkeypatch, kernel, unbiased):
    x = torch.randn(2, 40, 4, generator=g).double().requires_grad_()
    t = torch.randn(2, 1, 3, generator=g).double() + 0.1 * torch.randn(2, 40, 3, generator=g).double()
    whole = F.conditional_rke_score(x, t, kernel, unbiased=unbiased)
    (expected,) = torch.autograd.grad(whole.sum(), x)
    monkeypatch.setattr(conditional, "BLOCK_ROWS", 7)
    score = F.conditional_rke_score(x, t, kernel, unbiased=unbiased)
    torch.testing.assert_close(score, whole, rtol=1e-12, atol=0)
    (gradient,) = torch.autograd.grad(score.sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-9, atol=1e-14)


def test_conditional_rke_equals_ratio_of_frobenius_norms(g):
    x, t = torch.randn(9, 4, generator=g).double(), torch.randn(9, 3, generator=g).double()
    k, kt = GaussianKernel(1.0)(x), GaussianKernel(2.0)(t)
    expected = kt.square().sum() / (k * kt).square().sum()
    assert F.conditional_rke_score(x, t, GaussianKernel(1.0), GaussianKernel(2.0)).item() == pytest.approx(expected.item())


def test_conditional_scores_with_features_match_kernels_for_any_n():
    x, t = rows(40, 3), rows(40, 2, 1)
    normalize = lambda z: z / z.norm(dim=1, keepdim=True)  # noqa: E731
    expected = F.conditional_vendi_score(x, t, CosineKernel(), CosineKernel()).item()
    assert F.conditional_vendi_score(x, t, feature_map=(normalize, normalize)).item() == pytest.approx(expected, rel=1e-8)
    small = F.conditional_vendi_score(x[:5], t[:5], feature_map=(normalize(x[:5]), normalize(t[:5]))).item()
    assert small == pytest.approx(F.conditional_vendi_score(x[:5], t[:5]).item(), rel=1e-8)
    assert F.conditional_rke_score(x, t, feature_map=(normalize, normalize)).item() == pytest.approx(
        F.conditional_rke_score(x, t).item(), rel=1e-8
    )
