"""Scendi, KEN, modes, KID, fidelity: closed forms, the papers' own matrices, and other libraries as oracles."""

import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel


def rows(n, d, seed=0, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# -- Vendi -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [0.5, 1, 2, math.inf])
def test_rows_of_zeros_are_alike_and_unlike_all_else(order):
    assert F.vendi_score(torch.zeros(5, 3), order=order).item() == pytest.approx(1)
    assert F.vendi_score(torch.zeros(3, 5), order=order).item() == pytest.approx(1)
    mixed = torch.cat([torch.zeros(2, 2), torch.eye(2).repeat_interleave(2, 0)])
    assert F.vendi_score(mixed, order=order).item() == pytest.approx(3)


def test_rke_by_blocks_equals_the_whole(monkeypatch):
    from kspec_guidance.functional import vendi

    x, k = rows(50, 60), GaussianKernel(8.0)
    whole = F.rke_score(x, k).item()
    monkeypatch.setattr(vendi, "ROWS", 7)
    assert F.rke_score(x, k).item() == pytest.approx(whole, rel=1e-12)
    assert F.rke_score(x).item() == pytest.approx(F.vendi_score(x, order=2 + 1e-9).item(), rel=1e-6)


def test_feature_rows_may_be_given_instead_of_a_map():
    x = rows(30, 4)
    phi = RandomFourierFeatures(GaussianKernel(2.0), 4, 16)
    assert F.vendi_score(x, feature_map=phi(x)).item() == F.vendi_score(x, feature_map=phi).item()
    with pytest.raises(ValueError, match="one row each"):
        F.vendi_score(x, feature_map=phi(x)[:7])


def test_nystrom_with_all_landmarks_is_exact_and_few_are_near():
    x = rows(60, 3)
    k = GaussianKernel(3.0)
    exact = F.vendi_score(x, k).item()
    assert F.vendi_score(x, feature_map=NystromFeatures(k, x)).item() == pytest.approx(exact, rel=1e-6)
    assert F.vendi_score(x, feature_map=NystromFeatures(k, x[:30])).item() == pytest.approx(exact, rel=0.05)
    t = 6  # truncated scores by as many landmarks: what the map misses is part of the tail
    few = F.vendi_score(x, feature_map=NystromFeatures(k, x[:t]), truncation=t).item()
    assert few == pytest.approx(F.vendi_score(x, k, truncation=t).item(), rel=0.15)


def test_the_random_feature_error_falls_as_the_root_of_their_number():
    x, k = rows(200, 6), GaussianKernel(3.0)
    exact = F.vendi_score(x, k).item()

    def error(count):
        draws = [F.vendi_score(x, feature_map=RandomFourierFeatures(k, 6, count, False, seed)) for seed in range(12)]
        return sum((d.item() - exact) ** 2 for d in draws) ** 0.5

    assert 1.4 < error(64) / error(256) < 8
    assert error(1024) < error(64) / 2.5


def test_vendi_equals_the_vendi_score_package():
    vendi = pytest.importorskip("vendi_score.vendi")
    x = torch.nn.functional.normalize(rows(40, 6), dim=1)
    assert F.vendi_score(x).item() == pytest.approx(vendi.score_dual(x.numpy(), q=1, normalize=False), rel=1e-6)
    k = GaussianKernel(1.0)(x).numpy()
    for q in (1, 2, math.inf):
        ours = F.vendi_score(x, GaussianKernel(1.0), q).item()
        assert ours == pytest.approx(vendi.score_K(k, q="inf" if q == math.inf else q), rel=1e-6)


# -- conditional -------------------------------------------------------------------------------------------------------


def test_conditional_scores_by_features_agree_on_both_sides_of_their_size():
    x, t = rows(40, 3), rows(40, 2, 1)
    unit = lambda z: z / z.norm(dim=1, keepdim=True)  # noqa: E731
    expected = F.conditional_vendi_score(x, t, CosineKernel(), CosineKernel()).item()
    assert F.conditional_vendi_score(x, t, feature_map=(unit, unit)).item() == pytest.approx(expected, rel=1e-8)
    few = F.conditional_vendi_score(x[:5], t[:5], feature_map=(unit(x[:5]), unit(t[:5]))).item()
    assert few == pytest.approx(F.conditional_vendi_score(x[:5], t[:5]).item(), rel=1e-8)
    assert F.conditional_rke_score(x, t, feature_map=(unit, unit)).item() == pytest.approx(
        F.conditional_rke_score(x, t).item(), rel=1e-8
    )


# -- Scendi ------------------------------------------------------------------------------------------------------------


def test_scendi_parts_add_up_and_traces_to_one():
    x, t = rows(50, 6), rows(50, 4, 1)
    own, explained = F.scendi_matrices(x, t)
    u = CosineKernel.unit(x)[0]
    torch.testing.assert_close(own + explained, u.T @ u / 50)
    assert (own.trace() + explained.trace()).item() == pytest.approx(1)
    assert torch.linalg.eigvalsh(own).min() > -1e-12


def test_scendi_at_its_extremes():
    x, n = oracles.clusters(6, 2), 12
    assert F.scendi_score(x, x).item() == pytest.approx(1)  # the prompts determine the images
    assert F.prompt_vendi_score(x, x).item() == pytest.approx(6)
    one = torch.ones(n, 1, dtype=torch.float64)
    centred = torch.cat([rows(n, 3, 2), -rows(n, 3, 2)])
    assert F.scendi_score(centred, torch.ones(2 * n, 1)).item() == pytest.approx(F.vendi_score(centred).item())
    # a constant prompt explains the mean image: 1/6 of the mass, the other five modes keep 1/6 each
    assert F.scendi_score(x, one).item() == pytest.approx(math.exp(5 / 6 * math.log(5)))
    assert F.prompt_vendi_score(x, one).item() == pytest.approx(1)


def test_scendi_is_the_papers_schur_complement():
    x, t = CosineKernel.unit(rows(80, 5))[0], CosineKernel.unit(rows(80, 3, 1))[0]
    c = torch.cat([x, t], 1)
    c = c.T @ c / 80
    s = c[:5, :5] - c[:5, 5:] @ torch.linalg.solve(c[5:, 5:], c[5:, :5])
    l = torch.linalg.eigvalsh(s)
    expected = (-(l * (l / l.sum()).log()).sum()).exp()
    assert F.scendi_score(x, t).item() == pytest.approx(expected.item(), rel=1e-9)


def test_scendi_survives_dependent_prompt_features_in_single_precision():
    x, t = rows(60, 6, dtype=torch.float32), rows(60, 3, 1, dtype=torch.float32)
    wide = torch.cat([t, t @ rows(3, 20, 2, torch.float32)], 1)
    narrow = t @ torch.linalg.qr(torch.cat([torch.eye(3), rows(3, 20, 2, torch.float32)], 1).T)[1].T
    assert F.scendi_score(x, wide).item() == pytest.approx(F.scendi_score(x, narrow).item(), rel=1e-3)


def test_what_is_left_of_the_images_is_uncorrelated_with_the_prompts():
    t = rows(200, 4, 1)
    x = t @ rows(4, 7, 2) + 0.3 * rows(200, 7, 3)
    rest = F.remove_prompt(x, t)
    assert rest.shape == x.shape
    assert (rest.T @ CosineKernel.unit(t)[0]).abs().max() < 1e-9
    assert F.remove_prompt(x[:5], t[:5], fit=(x, t)) == pytest.approx(rest[:5])


def test_scendi_with_random_features_has_its_extremes_too():
    x = oracles.clusters(4, 5)
    phi = RandomFourierFeatures(GaussianKernel(0.3), 4, 512)
    assert F.scendi_score(x, x, feature_map=phi).item() == pytest.approx(1, abs=1e-6)
    assert F.prompt_vendi_score(x, x, feature_map=phi).item() == pytest.approx(4, rel=0.05)


# -- KEN ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0, 4.0])
@pytest.mark.parametrize("kernel", [CosineKernel(), GaussianKernel(1.5), LaplacianKernel(4.0), PolynomialKernel(2)])
def test_ken_is_the_papers_matrix(kernel, eta):
    x, y = rows(12, 4), rows(9, 4, 1) + 0.7
    s, n, m = eta**0.5, 12, 9
    k = kernel.normalised
    upper = torch.cat([k(x) / n, s * k(x, y) / (n * m) ** 0.5], 1)
    lower = torch.cat([-s * k(y, x) / (n * m) ** 0.5, -eta * k(y) / m], 1)
    l = torch.linalg.eigvals(torch.cat([upper, lower])).real
    l = l[l > 1e-10]
    assert F.ken_score(x, y, kernel, eta).item() == pytest.approx(-(l * (l / l.sum()).log()).sum().item(), rel=1e-6)


def test_ken_at_its_extremes():
    x = oracles.clusters(5, 3)
    assert F.ken_score(x, x).item() == pytest.approx(0, abs=1e-9)
    assert F.ken_score(x, torch.zeros(3, 5)).item() == pytest.approx(math.log(5), rel=1e-6)  # zeros are like nothing else
    # modes 0 and 1 are known: 3/5 of the mass is new, in three equal parts
    assert F.ken_score(x, x[:6]).item() == pytest.approx(0.6 * math.log(3), rel=1e-6)
    # 2/5 against 1: not even twice as frequent
    assert F.ken_score(x[:6], x).item() == pytest.approx(0.6 * math.log(2), rel=1e-6)
    assert F.ken_score(x[:6], x, eta=3.0).item() == pytest.approx(0, abs=1e-9)


def test_ken_by_features_is_ken_by_kernels():
    x, y, k = rows(60, 3), rows(50, 3, 1) + 1.0, GaussianKernel(2.0)
    phi = RandomFourierFeatures(k, 3, 8192)
    assert F.ken_score(x, y, feature_map=phi).item() == pytest.approx(F.ken_score(x, y, k).item(), rel=0.05)


def test_gradients_of_ken_and_scendi_pass_gradcheck():
    x, y = rows(6, 3).requires_grad_(), rows(5, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.ken_score(a, b, GaussianKernel(1.5), 0.7), (x, y))
    t = rows(6, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(F.scendi_score, (x, t))
    assert torch.autograd.gradcheck(F.prompt_vendi_score, (x, t))
    assert torch.autograd.gradcheck(lambda a: F.rke_score(a, GaussianKernel(1.0)), x)
    phi = RandomFourierFeatures(GaussianKernel(1.0), 3, 8)
    assert torch.autograd.gradcheck(lambda a: F.vendi_score(a, feature_map=phi), x)
    assert torch.autograd.gradcheck(lambda a, b: F.information_vendi_score(a, b, GaussianKernel(1.0)), (x, t))


def test_gradients_at_equal_samples_are_finite():
    x = rows(2, 3).repeat(3, 1).requires_grad_()
    for score in (
        lambda z: F.vendi_score(z, GaussianKernel(1.0)),
        lambda z: F.ken_score(z, rows(4, 3, 1), GaussianKernel(1.0)),
    ):
        (g,) = torch.autograd.grad(score(x), x)
        assert torch.isfinite(g).all()


# -- modes -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("by_features", [True, False])
def test_modes_are_the_clusters_by_size(by_features):
    x = torch.cat([oracles.clusters(3, 1)[i : i + 1].repeat(c, 1) for i, c in enumerate((2, 7, 4))])
    unit = CosineKernel.features if by_features else None
    modes = F.top_modes(x, modes=3, feature_map=unit)
    assert [m.share for m in modes] == pytest.approx([7 / 13, 4 / 13, 2 / 13])
    assert [set(m.samples) for m in modes] == [set(range(2, 9)), set(range(9, 13)), {0, 1}]


def test_novel_modes_are_those_the_reference_lacks():
    x = oracles.clusters(4, 3)
    found = F.novel_modes(x, x[:6], modes=10)
    assert len(found) == 2
    assert set().union(*(m.samples for m in found)) == set(range(6, 12))
    assert found[0].share == pytest.approx(0.25)
    assert F.novel_modes(x[:6], x, eta=3.0) == []


# -- KID and fidelity --------------------------------------------------------------------------------------------------


def test_kid_of_one_full_subset_is_the_unbiased_mmd():
    x, y = rows(20, 8), rows(20, 8, 1) + 0.2
    mean, std = F.kid(x, y, subsets=3)
    assert mean.item() == pytest.approx(F.mmd(x, y, PolynomialKernel()).item(), rel=1e-9)
    assert std.item() == pytest.approx(0, abs=1e-12)
    mean, std = F.kid(x, y, subsets=50, subset_size=10)
    assert std > 0
    assert torch.equal(F.kid(x, y, subsets=5, subset_size=4)[0], F.kid(x, y, subsets=5, subset_size=4)[0])


@pytest.mark.parametrize("unbiased", [True, False])
def test_mmd_by_features_is_mmd_of_their_kernel(unbiased):
    x, y = rows(9, 3), rows(7, 3, 1)
    phi = RandomFourierFeatures(GaussianKernel(1.0), 3, 32)
    linear = PolynomialKernel(1, gamma=1.0, coef=0.0)
    expected = F.mmd(phi(x), phi(y), linear, unbiased)
    assert F.mmd(x, y, feature_map=phi, unbiased=unbiased).item() == pytest.approx(expected.item(), abs=1e-10)


def test_frechet_distance_of_gaussians_is_in_closed_form():
    x = rows(4000, 3)
    x = (x - x.mean(0)) @ torch.linalg.inv(torch.linalg.cholesky(x.T.cov())).T  # mean 0, covariance exactly 1
    shift = torch.tensor([1.0, 2.0, 2.0], dtype=torch.float64)
    assert F.frechet_distance(x, x + shift) == pytest.approx(9, rel=1e-6)
    assert F.frechet_distance(x, 3 * x) == pytest.approx(3 * 4, rel=1e-6)  # sum of (3 - 1)^2


def test_fidelity_at_its_extremes():
    x = rows(60, 4)
    same, far = F.fidelity(x, x), F.fidelity(x + 100, x)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)
    collapsed = F.fidelity(x[:1] + 1e-3 * rows(60, 4, 1), x)
    assert collapsed.precision == 1
    assert collapsed.recall < 0.1
    assert collapsed.coverage < 0.2


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: F.ken_score(rows(3, 2), rows(3, 4)), "embed both with the same model"),
        (lambda: F.ken_score(rows(3, 2), rows(3, 2), eta=-1), "at least 0"),
        (lambda: F.ken_score(rows(3, 2), torch.empty(0, 2)), "reference holds no samples"),
        (lambda: F.scendi_score(rows(3, 2), rows(4, 2)), "one prompt row per sample"),
        (lambda: F.scendi_score(rows(3, 2), rows(3, 2), feature_map=rows(3, 2)), "needs a pair"),
        (lambda: F.fidelity(rows(4, 2), rows(9, 2)), "below 4"),
        (lambda: F.frechet_distance(rows(1, 2), rows(9, 2)), "two samples"),
        (lambda: F.kid(rows(4, 2), rows(9, 2), subsets=0), "subsets"),
        (lambda: F.mmd(rows(4, 2), rows(4, 2), feature_map=rows(4, 2)), "must be a function"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
