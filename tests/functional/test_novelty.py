import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from tests.samples import rows


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("kernel", [CosineKernel(), GaussianKernel(1.5), LaplacianKernel(4.0), PolynomialKernel(2)])
def test_ken_matches_matrix_of_paper(kernel, eta):
    x, y = rows(12, 4), rows(9, 4, 1) + 0.7
    s, n, m = eta**0.5, 12, 9
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
