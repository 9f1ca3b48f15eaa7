import math

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance import testing as oracles
from kspec_guidance.features import NystromFeatures, RandomFourierFeatures
from kspec_guidance.functional.vendi import entropy_of
from kspec_guidance.kernels import CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel, l2_normalize
from kspec_guidance.kernels.spectrum import largest_eigenvalues, renyi_entropy, truncate
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


def entropy_number(p, order):
    """The Renyi number of a distribution."""
    if order == 1:
        return math.exp(-sum(v * math.log(v) for v in p))
    return 1 / max(p) if order == math.inf else sum(v**order for v in p) ** (1 / (1 - order))


COPIES = [1, 3, 20, 40]
SHARES = [c / sum(COPIES) for c in COPIES]


@pytest.mark.parametrize("order", [0.01, *ORDERS])
@pytest.mark.parametrize(
    "kernel", [None, GaussianKernel(1e-4), LaplacianKernel(1e-4), lambda a, b: GaussianKernel(1e-3)(a, b)]
)
@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_scores_of_copies_match_closed_form_for_every_order(order, kernel, offset):
    """A narrow kernel sees four points with multiplicities; rounding must not turn copies into modes."""
    count = torch.tensor(COPIES)
    points = torch.eye(4, 30, dtype=torch.float64) if kernel is None else offset + rows(4, 30)
    x, prompts = points.repeat_interleave(count, 0), torch.ones(64, 3)
    expected = pytest.approx(entropy_number(SHARES, order), rel=1e-6)
    assert F.vendi_score(x, kernel, order).item() == expected
    assert F.conditional_vendi_score(x, prompts, kernel, order=order).item() == expected
    own_prompt = torch.arange(4)[:, None].eq(torch.arange(4)).float().repeat_interleave(count, 0)
    assert F.information_vendi_score(x, own_prompt, kernel, order=order).item() == expected
    assert F.conditional_vendi_score(x, own_prompt, kernel, order=order).item() == pytest.approx(1, rel=1e-6)
    if order == 2:
        assert F.rke_score(x, kernel).item() == expected
        assert F.conditional_rke_score(x, prompts, kernel).item() == expected


@pytest.mark.parametrize("scale", [1 / 3, 7.0])
def test_rows_that_differ_by_rounding_are_one_mode(scale):
    u = rows(10, 64)
    x = torch.cat([u / u.norm(dim=1, keepdim=True), (u * scale) / (u * scale).norm(dim=1, keepdim=True)])
    assert F.vendi_score(x, GaussianKernel(1e-5), 0.5).item() == pytest.approx(10, rel=1e-6)


def test_small_orders_do_not_count_rounding_of_many_samples():
    x = rows(50_000, 2) @ rows(2, 5, 1)  # two dimensions in five
    l = torch.linalg.eigvalsh(
        F.scendi_matrices(x, torch.ones(50_000, 1))[0] + F.scendi_matrices(x, torch.ones(50_000, 1))[1]
    )
    expected = entropy_number(l[-2:].tolist(), 0.05)
    assert F.vendi_score(x, order=0.05).item() == pytest.approx(expected, rel=1e-6)


def test_plain_function_is_a_kernel_with_gradients(g):
    x = torch.randn(9, 3, generator=g, dtype=torch.float64, requires_grad=True)
    function = lambda a, b: 3 * GaussianKernel(1.0)(a, b)  # noqa: E731  normalised to a unit diagonal
    for score in (F.vendi_score, F.rke_score, lambda z, k: F.ken_score(z, x.detach()[:4], k)):
        (found,) = torch.autograd.grad(score(x, function), x)
        (expected,) = torch.autograd.grad(score(x, GaussianKernel(1.0)), x)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("gaussian", "must be a kernel such as GaussianKernel"),
        (GaussianKernel, "got the class GaussianKernel"),
        (lambda a, b: float((a[0] @ b[0]).item()), "returned float"),
        (lambda a, b: a @ a.mT @ a, r"returned \[8, 2\]"),
    ],
)
def test_what_is_no_kernel_raises_type_error(kernel, message):
    for score in (F.vendi_score, lambda x, k: F.mmd(x, x + 1, k), lambda x, k: F.conditional_rke_score(x, x, k, k)):
        with pytest.raises(TypeError, match=message):
            score(rows(8, 2), kernel)


def test_kernel_that_overflows_raises():
    with pytest.raises(ValueError, match="infinite"):
        F.vendi_score(1e80 * rows(5, 3), PolynomialKernel(3))
    with pytest.raises(ValueError, match="not positive"):
        F.vendi_score(rows(5, 3), lambda a, b: torch.zeros(len(a), len(b)))


@pytest.mark.parametrize("distance", [1e-3, 1e-6, 1e-9, 1e-12, 1e-15])
def test_vendi_is_continuous_in_the_order_at_one(distance):
    x = rows(30, 5)
    for order in (1 - distance, 1 + distance):
        expected = pytest.approx(F.vendi_score(x).item(), rel=2 * distance + 1e-12)
        assert F.vendi_score(x, order=order).item() == expected


def test_vendi_of_large_order_is_that_of_infinity():
    x = rows(30, 5)
    assert F.vendi_score(x, order=1e9).item() == pytest.approx(F.vendi_score(x, order=math.inf).item(), rel=1e-6)


def test_orders_around_the_series_agree():
    x = rows(30, 5)
    l = torch.linalg.eigvalsh(GaussianKernel(1.0)(x) / 30)
    for order in (0.85, 0.9, 0.95, 1.05, 1.1, 1.15):
        expected = l.clamp_min(1e-300).pow(order).sum().pow(1 / (1 - order)).item()
        assert F.vendi_score(x, GaussianKernel(1.0), order).item() == pytest.approx(expected, rel=1e-9)


def test_unbiased_rke_estimates_the_score_of_the_distribution(g):
    modes = torch.eye(10, dtype=torch.float64)
    estimates, plain = [], []
    for _ in range(400):
        x = modes[torch.randint(10, (20,), generator=g)]
        estimates.append(1 / F.rke_score(x, unbiased=True))
        plain.append(1 / F.rke_score(x))
    assert float(torch.stack(estimates).mean()) == pytest.approx(0.1, rel=0.03)
    assert float(torch.stack(plain).mean()) == pytest.approx(1 / 20 + (1 - 1 / 20) / 10, rel=0.03)


def test_unbiased_rke_is_that_of_pairs_of_different_samples(g):
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    k = GaussianKernel(1.0)(x, x).square()
    expected = 30 / (k.sum() - 6)
    assert F.rke_score(x, GaussianKernel(1.0), unbiased=True) == pytest.approx(float(expected))
    one = F.conditional_rke_score(x, torch.ones(6, 1), GaussianKernel(1.0), unbiased=True)
    assert one == pytest.approx(float(expected))


def test_unbiased_scores_state_what_they_need():
    with pytest.raises(ValueError, match="at least two samples, got 1"):
        F.rke_score(torch.ones(1, 2), unbiased=True)
    with pytest.raises(ValueError, match="no two samples have related prompts"):
        F.conditional_rke_score(torch.rand(3, 2), torch.eye(3), unbiased=True)
    assert F.rke_score(torch.eye(3), unbiased=True) == float("inf")


def test_unbiased_rke_of_random_features_needs_rows_of_norm_one(g):
    x = torch.randn(30, 3, generator=g)
    kernel = GaussianKernel(1.0)
    rows = RandomFourierFeatures(kernel, 3, 4096)(x)
    exact = float(F.rke_score(x, kernel, unbiased=True))
    assert float(F.rke_score(x, feature_map=rows, unbiased=True)) == pytest.approx(exact, rel=0.05)
    with pytest.raises(ValueError, match="features of norm 1"):
        F.rke_score(x, feature_map=2 * rows, unbiased=True)


@pytest.mark.parametrize("order", ORDERS)
def test_score_of_a_matrix_is_that_of_its_rows_and_weights_count_copies(order, g):
    x = torch.randn(6, 3, generator=g, dtype=torch.float64)
    k = 3 * GaussianKernel(1.0)(x)  # the scale of the diagonal does not matter
    torch.testing.assert_close(F.matrix_vendi_score(k, order), F.vendi_score(x, GaussianKernel(1.0), order))
    copies = torch.tensor([3, 1, 2, 1, 1, 4])
    expected = F.vendi_score(x.repeat_interleave(copies, 0), GaussianKernel(1.0), order)
    torch.testing.assert_close(F.matrix_vendi_score(k, order, copies), expected, rtol=1e-6, atol=0)


def test_weights_of_a_matrix_are_shares_of_orthogonal_samples():
    p = torch.tensor([0.5, 0.25, 0.25, 0.0])
    assert F.matrix_vendi_score(torch.eye(4), weights=p).log().item() == pytest.approx(1.5 * math.log(2))
    assert F.matrix_vendi_score(torch.eye(4), 2.0, (8 * p).tolist()).item() == pytest.approx(1 / 0.375)
    assert F.matrix_vendi_score(torch.eye(4).expand(2, 4, 4), weights=torch.stack([p, p])).shape == (2,)


@pytest.mark.parametrize(
    ("matrix", "weights", "message"),
    [
        (torch.ones(2, 3), None, "square"),
        (torch.tensor([[1.0, 0.5], [0.2, 1.0]]), None, "symmetric"),
        (torch.tensor([[0.0, 0.0], [0.0, 1.0]]), None, "positive diagonal"),
        (torch.tensor([[1.0, 2.0], [2.0, 1.0]]), None, "positive semi-definite"),
        (torch.eye(2) * math.nan, None, "NaN"),
        (torch.eye(2), torch.ones(3), "weights must be 2"),
        (torch.eye(2), torch.tensor([-1.0, 2.0]), "at least 0"),
        (torch.eye(2), torch.zeros(2), "not all 0"),
    ],
)
def test_wrong_matrices_and_weights_are_refused(matrix, weights, message):
    with pytest.raises(ValueError, match=message):
        F.matrix_vendi_score(matrix, weights=weights)


@pytest.mark.parametrize("kind", ["rows of zeros", "far from the origin", "float16", "huge and tiny rows"])
def test_cosine_score_of_many_rows_is_that_of_their_kernel_matrix(kind):
    x = rows(1100, 4).float()  # more than one part
    match kind:
        case "rows of zeros":
            x[::7] = 0
        case "far from the origin":
            x += 1e3
        case "float16":
            x = x.half()
        case "huge and tiny rows":
            x = x.double() * 10.0 ** (torch.arange(1100) % 200 - 100).double()[:, None]
    x64 = x.double()
    k = l2_normalize(x64) @ l2_normalize(x64).T + ((x64 == 0).all(1)[:, None] & (x64 == 0).all(1)).double()
    assert F.vendi_score(x).item() == pytest.approx(F.matrix_vendi_score(k).item(), rel=1e-9)


@pytest.mark.parametrize("kind", ["groups", "copies", "nearly copies", "one point", "far from the origin"])
@pytest.mark.parametrize("order", [1.0, 1.001, 2.0, math.inf])
def test_truncated_score_of_many_samples_is_that_of_all_eigenvalues(kind, order, spectra):
    matrix, whole = spectra[kind]
    expected = renyi_entropy(truncate(whole.clamp_min(0), 5), order).exp().item()
    assert largest_eigenvalues(matrix, 5) is not None
    assert entropy_of(matrix, order, 5, semidefinite=True).exp().item() == pytest.approx(expected, rel=1e-7)


@pytest.fixture(scope="module")
def spectra():
    """Kernel matrices of trace 1, and all of their eigenvalues."""
    x = rows(1000, 6, seed=2)
    centres = 3 * rows(40, 6, seed=1)[torch.arange(1000) % 40]
    found = {
        "groups": (GaussianKernel(1.0), centres + 0.3 * x),
        "copies": (GaussianKernel(1.0), centres[torch.arange(1000) % 8]),
        "nearly copies": (GaussianKernel(1.0), centres + 1e-8 * x),
        "one point": (GaussianKernel(1.0), torch.ones_like(x)),
        "far from the origin": (PolynomialKernel(), x + 1e3),
    }
    matrices = {k: kernel.normalised(z) / 1000 for k, (kernel, z) in found.items()}
    return {k: (matrix, torch.linalg.eigvalsh(matrix)) for k, matrix in matrices.items()}


def test_truncated_score_of_many_samples_has_the_gradient_of_all_eigenvalues(spectra):
    matrix, _ = spectra["groups"]
    matrix = matrix.clone().requires_grad_()
    (found,) = torch.autograd.grad(entropy_of(matrix, 1.0, 5, semidefinite=True), matrix)
    (expected,) = torch.autograd.grad(entropy_of(matrix, 1.0, 5), matrix)
    torch.testing.assert_close(found, expected)
    with torch.no_grad():
        assert largest_eigenvalues(matrix, 5) is not None


def test_slow_convergence_and_functions_that_are_no_kernels_take_all_eigenvalues():
    n = 1000
    flat = torch.diag(1 + 1e-3 * torch.linspace(0, 1, n, dtype=torch.float64)) / n  # no gaps
    assert largest_eigenvalues(flat, 5) is None
    with pytest.raises(ValueError, match="negative eigenvalues"):
        F.vendi_score(torch.eye(4)[torch.arange(n) % 4], lambda a, b: 1.5 * (a @ b.mT) - 0.5, truncation=5)
