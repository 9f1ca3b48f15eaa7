import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel
from kspec_guidance.kernels.spectrum import truncate
from tests.samples import rows

ORDERS = [0.5, 1.0, 2.0, 3.7, math.inf]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_vendi_of_orthogonal_clusters_equals_cluster_count(order, dtype):
    x = oracles.clusters(5, 7, dtype)
    assert F.vendi_score(x, order=order).item() == pytest.approx(5, rel=1e-6)
    assert F.vendi_score(x, GaussianKernel(0.05), order=order).item() == pytest.approx(5, rel=1e-4)


@pytest.mark.parametrize("order", ORDERS)
def test_vendi_of_two_points_matches_closed_form(order):
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
def test_vendi_of_identical_points_is_one(order, kernel, g):
    x = torch.randn(1, 6, generator=g)
    assert F.vendi_score(x, kernel, order).item() == pytest.approx(1, abs=1e-5)
    assert F.vendi_score(x.expand(9, 6), kernel, order).item() == pytest.approx(1, abs=1e-5)


def test_rke_matches_eigenvalue_formula(g):
    x = torch.randn(12, 5, generator=g, dtype=torch.float64)
    l = torch.linalg.eigvalsh(GaussianKernel(1.0)(x) / 12)
    assert F.rke_score(x, GaussianKernel(1.0)).item() == pytest.approx(1 / l.square().sum().item(), rel=1e-10)


def test_cosine_vendi_matches_for_gram_and_covariance_spectrum(g):
    x = torch.randn(20, 6, generator=g, dtype=torch.float64)
    wide = torch.cat([x, torch.zeros(20, 30, dtype=torch.float64)], 1)  # d > n takes the n x n matrix
    for order in ORDERS:
        assert F.vendi_score(x, order=order).item() == pytest.approx(F.vendi_score(wide, order=order).item(), rel=1e-6)


def test_truncation_preserves_mass_and_matches_full_score_at_n(g):
    x = torch.randn(15, 4, generator=g, dtype=torch.float64)
    l = torch.linalg.eigvalsh(GaussianKernel(1.0)(x) / 15)
    assert truncate(l, 4).sum().item() == pytest.approx(l.sum().item())
    full = F.vendi_score(x, GaussianKernel(1.0)).item()
    assert F.vendi_score(x, GaussianKernel(1.0), truncation=15).item() == pytest.approx(full, rel=1e-12)
    top = l.flip(0)[:4] + (1 - l.flip(0)[:4].sum()) / 4
    expected = math.exp(-(top * top.log()).sum().item())
    assert F.vendi_score(x, GaussianKernel(1.0), truncation=4).item() == pytest.approx(expected, rel=1e-9)


def test_vendi_with_random_features_approximates_exact_score(g):
    x = torch.randn(50, 3, generator=g)
    phi = RandomFourierFeatures(GaussianKernel(1.5), 3, 8192)
    assert F.vendi_score(x, feature_map=phi).item() == pytest.approx(F.vendi_score(x, GaussianKernel(1.5)).item(), rel=0.02)


def test_scores_support_batch_dimensions(g):
    x, t = torch.randn(2, 3, 8, 4, generator=g), torch.randn(2, 3, 8, 2, generator=g)
    k = GaussianKernel(1.0)
    batched = F.conditional_vendi_score(x, t, k, k)
    assert batched.shape == (2, 3)
    assert batched[1, 2].item() == pytest.approx(F.conditional_vendi_score(x[1, 2], t[1, 2], k, k).item(), rel=1e-6)
    assert F.vendi_score(x, CosineKernel())[0, 1].item() == pytest.approx(F.vendi_score(x[0, 1]).item(), rel=1e-6)


@pytest.mark.parametrize("order", [0.5, 1, 2, math.inf])
def test_vendi_counts_zero_rows_as_one_mode(order):
    assert F.vendi_score(torch.zeros(5, 3), order=order).item() == pytest.approx(1)
    assert F.vendi_score(torch.zeros(3, 5), order=order).item() == pytest.approx(1)
    mixed = torch.cat([torch.zeros(2, 2), torch.eye(2).repeat_interleave(2, 0)])
    assert F.vendi_score(mixed, order=order).item() == pytest.approx(3)


def test_blockwise_rke_matches_full_computation(monkeypatch):
    from kspec_guidance.functional import vendi

    x, k = rows(50, 60), GaussianKernel(8.0)
    full = F.rke_score(x, k).item()
    monkeypatch.setattr(vendi, "BLOCK_ROWS", 7)
    assert F.rke_score(x, k).item() == pytest.approx(full, rel=1e-12)
    assert F.rke_score(x).item() == pytest.approx(F.vendi_score(x, order=2 + 1e-9).item(), rel=1e-6)


def test_vendi_accepts_precomputed_features():
    x = rows(30, 4)
    phi = RandomFourierFeatures(GaussianKernel(2.0), 4, 16)
    assert F.vendi_score(x, feature_map=phi(x)).item() == F.vendi_score(x, feature_map=phi).item()
    with pytest.raises(ValueError, match="one row per sample"):
        F.vendi_score(x, feature_map=phi(x)[:7])


def test_nystrom_is_exact_with_all_landmarks_and_close_with_few():
    x = rows(60, 3)
    k = GaussianKernel(3.0)
    exact = F.vendi_score(x, k).item()
    assert F.vendi_score(x, feature_map=NystromFeatures(k, x)).item() == pytest.approx(exact, rel=1e-6)
    assert F.vendi_score(x, feature_map=NystromFeatures(k, x[:30])).item() == pytest.approx(exact, rel=0.05)
    t = 6  # with t landmarks, the truncated score folds the error of the map into its tail
    truncated = F.vendi_score(x, feature_map=NystromFeatures(k, x[:t]), truncation=t).item()
    assert truncated == pytest.approx(F.vendi_score(x, k, truncation=t).item(), rel=0.15)


def test_random_feature_error_decreases_as_inverse_square_root():
    x, k = rows(200, 6), GaussianKernel(3.0)
    exact = F.vendi_score(x, k).item()

    def error(count):
        estimates = [F.vendi_score(x, feature_map=RandomFourierFeatures(k, 6, count, False, seed)) for seed in range(12)]
        return sum((d.item() - exact) ** 2 for d in estimates) ** 0.5

    assert 1.4 < error(64) / error(256) < 8
    assert error(1024) < error(64) / 2.5


def test_vendi_matches_vendi_score_package():
    vendi = pytest.importorskip("vendi_score.vendi")
    x = torch.nn.functional.normalize(rows(40, 6), dim=1)
    assert F.vendi_score(x).item() == pytest.approx(vendi.score_dual(x.numpy(), q=1, normalize=False), rel=1e-6)
    k = GaussianKernel(1.0)(x).numpy()
    for q in (1, 2, math.inf):
        ours = F.vendi_score(x, GaussianKernel(1.0), q).item()
        assert ours == pytest.approx(vendi.score_K(k, q="inf" if q == math.inf else q), rel=1e-6)
