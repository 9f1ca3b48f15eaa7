import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import RandomFourierFeatures, tensor_product
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from tests.samples import rows


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("kernel", [CosineKernel(), GaussianKernel(1.5), LaplacianKernel(4.0), PolynomialKernel(2)])
@pytest.mark.parametrize(("n", "m", "d"), [(12, 9, 4), (150, 110, 90)])
def test_ken_matches_matrix_of_paper(kernel, eta, n, m, d):
    x, y = rows(n, d), rows(m, d, 1) + 0.7
    s = eta**0.5
    k = kernel.normalised
    upper = torch.cat([k(x) / n, s * k(x, y) / (n * m) ** 0.5], 1)
    lower = torch.cat([-s * k(y, x) / (n * m) ** 0.5, -eta * k(y) / m], 1)
    l = torch.linalg.eigvals(torch.cat([upper, lower])).real
    l = l[l > 1e-10]
    assert F.ken_score(x, y, kernel, eta).item() == pytest.approx(-(l * (l / l.sum()).log()).sum().item(), rel=1e-6)


def test_ken_of_identical_disjoint_and_overlapping_sets():
    x = oracles.clusters(5, 3)
    assert F.ken_score(x, x).item() == pytest.approx(0, abs=1e-9)
    assert F.ken_score(x, torch.zeros(3, 5)).item() == pytest.approx(math.log(5), rel=1e-6)  # zero rows resemble no others
    # modes 0 and 1 are known: 3/5 of the mass is novel, in three equal parts
    assert F.ken_score(x, x[:6]).item() == pytest.approx(0.6 * math.log(3), rel=1e-6)
    # both modes have frequency 1/2 against 1/5: 3/5 of the mass is in excess for eta = 1, none for eta = 3
    assert F.ken_score(x[:6], x).item() == pytest.approx(0.6 * math.log(2), rel=1e-6)
    assert F.ken_score(x[:6], x, eta=3.0).item() == pytest.approx(0, abs=1e-9)


def test_ken_with_random_features_approximates_kernel():
    x, y, k = rows(60, 3), rows(50, 3, 1) + 1.0, GaussianKernel(2.0)
    phi = RandomFourierFeatures(k, 3, 8192)
    assert F.ken_score(x, y, feature_map=phi).item() == pytest.approx(F.ken_score(x, y, k).item(), rel=0.05)


def shares(*counts):
    """Rows of orthogonal modes, so many of each."""
    return torch.eye(len(counts), dtype=torch.float64).repeat_interleave(torch.tensor(counts), 0)


def test_prompt_aware_ken_finds_known_samples_under_other_prompts():
    x, t = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    swapped = t[[1, 0, 2, 3]]  # two prompts have each other's samples
    assert float(F.ken_score(x, x)) == pytest.approx(0, abs=1e-9)
    assert float(F.conditional_ken_score(x, t, x, t)) == pytest.approx(0, abs=1e-9)
    found = float(F.conditional_ken_score(x, swapped, x, t))
    assert found == pytest.approx(0.5 * math.log(2), abs=1e-9)  # two new pairs with a quarter of the mass each


def test_prompt_aware_ken_is_ken_of_products_and_ken_for_one_prompt(g):
    x, y = torch.randn(7, 3, generator=g, dtype=torch.float64), torch.randn(9, 3, generator=g, dtype=torch.float64)
    t, s = torch.randn(7, 2, generator=g, dtype=torch.float64), torch.randn(9, 2, generator=g, dtype=torch.float64)
    unit = [z / z.norm(dim=1, keepdim=True) for z in (x, t, y, s)]
    expected = F.ken_score(tensor_product(*unit[:2]), tensor_product(*unit[2:]), eta=0.5)
    torch.testing.assert_close(F.conditional_ken_score(x, t, y, s, eta=0.5), expected)
    one = F.conditional_ken_score(x, torch.ones(7, 2), y, torch.ones(9, 2), GaussianKernel(1.0))
    torch.testing.assert_close(one, F.ken_score(x, y, GaussianKernel(1.0)))


def test_prompt_aware_ken_has_the_gradient_of_autograd(g):
    x, y = torch.randn(4, 3, generator=g, dtype=torch.float64), torch.randn(5, 3, generator=g, dtype=torch.float64)
    t, s = torch.randn(4, 2, generator=g, dtype=torch.float64), torch.randn(5, 2, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: F.conditional_ken_score(z, t, y, s, GaussianKernel(1.0)), x.requires_grad_())


def test_relative_rke_of_separate_modes_is_the_divergence_of_order_one_half():
    p, q = torch.tensor([5, 3, 2]).double() / 10, torch.tensor([2, 2, 6]).double() / 10
    expected = -2 * float((p * q).sqrt().sum().log())
    assert float(F.relative_rke_score(shares(5, 3, 2), shares(1, 1, 3))) == pytest.approx(expected, abs=1e-9)
    assert float(F.relative_rke_score(shares(5, 3, 2), shares(10, 6, 4))) == pytest.approx(0, abs=1e-7)
    assert float(F.relative_rke_score(shares(2, 0), shares(0, 3))) == math.inf


def test_relative_rke_equals_the_formula_with_covariances(g):
    x, y = (torch.randn(n, 3, generator=g, dtype=torch.float64) for n in (20, 30))
    roots = []
    for z in (x, y):
        u = z / z.norm(dim=1, keepdim=True)
        l, v = torch.linalg.eigh(u.T @ u / len(u))
        roots.append((v * l.sqrt()) @ v.T)
    expected = -2 * torch.linalg.svdvals(roots[0] @ roots[1]).sum().log()
    torch.testing.assert_close(F.relative_rke_score(x, y), expected)
    torch.testing.assert_close(F.relative_rke_score(x, y), F.relative_rke_score(y, x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.conditional_ken_score(rows(4, 2), rows(3, 2), rows(4, 2), rows(4, 2)), "one row of prompt features"),
        (lambda: F.conditional_ken_score(rows(4, 2), rows(4, 2), rows(4, 2), rows(4, 3)), "same model"),
        (lambda: F.conditional_ken_score(rows(4, 2), rows(4, 2), rows(4, 2), rows(4, 2), eta=-1), "at least 0"),
        (lambda: F.relative_rke_score(rows(4, 2), rows(4, 3)), "same model"),
    ],
)
def test_wrong_input_of_prompt_aware_ken_and_relative_rke_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
