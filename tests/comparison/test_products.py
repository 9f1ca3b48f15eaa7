import pytest
import torch

from kspec_guidance.comparison import product_embedder
from kspec_guidance.evaluation.embedders import ImageEmbedder, TextEmbedder
from kspec_guidance.features import RandomFourierFeatures, RandomProductProjection
from kspec_guidance.kernels import GaussianKernel, LaplacianKernel, PolynomialKernel
from tests.samples import normalize_rows, rows

PIXELS = ImageEmbedder(lambda x: torch.nn.functional.avg_pool2d(x, 4).flatten(1), 16, "16 pixels", fit="squash")
COLOURS = ImageEmbedder(lambda x: x.mean((2, 3)), 8, "colours", fit="squash")


def first(x):
    return x[:, :20]


def second(x):
    return x[:, 20:]


def product(x, y):
    a, b = (normalize_rows(z[:, :20]) for z in (x, y)), (normalize_rows(z[:, 20:]) for z in (x, y))
    (a_x, a_y), (b_x, b_y) = a, b
    return (a_x @ a_y.T) * (b_x @ b_y.T)


def test_exact_rows_have_the_product_kernel():
    x, y = rows(6, 50), rows(4, 50, 1)
    both = product_embedder(first, second, features=None)
    assert both(x).shape == (6, 600)
    assert torch.allclose(both(x) @ both(y).T, product(x, y))
    assert torch.allclose(both.kernel(x, y), product(x, y))
    assert torch.allclose(product_embedder(first, second).kernel(x), product(x, x))


def test_error_falls_as_the_root_of_the_features_and_has_no_bias():
    x, y = rows(40, 50), rows(30, 50, 1)
    errors = {}
    for l in (250, 1000, 4000):
        found = [product_embedder(first, second, features=l, seed=s) for s in range(20)]
        differences = torch.stack([f(x) @ f(y).T for f in found]) - product(x, y)
        errors[l] = float(differences.square().mean().sqrt())
        assert errors[l] == pytest.approx(l**-0.5, rel=0.15)
        assert abs(float(differences.mean())) < 4 * l**-0.5 / (20 * 10) ** 0.5
    slope = torch.log(torch.tensor(errors[4000] / errors[250])) / torch.log(torch.tensor(16.0))
    assert float(slope) == pytest.approx(-0.5, abs=0.05)


def test_one_hot_rows_are_projected_without_an_error():
    a, b = torch.eye(5)[[0, 1, 1]], torch.eye(3)[[2, 0, 0]]
    z = RandomProductProjection([5, 3], 64)(a, b)
    assert (z @ z.T).diagonal().tolist() == pytest.approx([1, 1, 1])
    assert float((z @ z.T)[1, 2]) == pytest.approx(1)
    with pytest.raises(ValueError, match="input_dims=\\[5, 3\\], got rows of lengths \\[3, 5\\]"):
        RandomProductProjection([5, 3], 64)(b, a)


def test_three_factors_have_the_product_of_all():
    a, b, c = (normalize_rows(rows(8, d, d)) for d in (4, 5, 6))
    z = RandomProductProjection([4, 5, 6], 60_000)(a, b, c)
    assert float((z @ z.T - (a @ a.T) * (b @ b.T) * (c @ c.T)).abs().max()) < 0.05


@pytest.mark.parametrize("constant", [0.01, 1.0, 100.0])
def test_one_sided_form_leaves_zero_shot_ranking_unchanged(constant):
    images, texts = rows(12, 50), rows(7, 20, 1)
    both = product_embedder(first, second, features=200, other=lambda t: t, constant=constant)
    cross = normalize_rows(images[:, :20]) @ normalize_rows(texts).T
    z, t = both(images), both.other(texts)
    assert torch.allclose(z @ t.T, cross * constant / (1 + constant))
    assert (z @ t.T).argsort(1).tolist() == cross.argsort(1).tolist()
    similar = normalize_rows(texts) @ normalize_rows(texts).T
    assert torch.allclose(t @ t.T, similar * constant / (1 + constant))
    a = normalize_rows(images[:, :20]) @ normalize_rows(images[:, :20]).T
    exact = (constant * a + product(images, images)) / (1 + constant)
    assert torch.allclose(both.kernel(images), exact)
    assert float((z @ z.T - exact).abs().max()) < 8 * 200**-0.5


@pytest.mark.parametrize("kind", [GaussianKernel, LaplacianKernel])
def test_two_shift_invariant_kernels_have_joint_fourier_features(kind):
    x, kernels = rows(30, 50), (kind(0.9), kind(1.3))
    factors = normalize_rows(x[:, :20]), normalize_rows(x[:, 20:])
    exact = kernels[0](factors[0]) * kernels[1](factors[1])
    both = product_embedder(first, second, features=8000, kernel_a=kernels[0], kernel_b=kernels[1])
    z = both(x)
    assert torch.allclose(both.kernel(x), exact)
    assert torch.allclose((z @ z.T).diagonal(), torch.ones(30, dtype=z.dtype))
    assert float((z @ z.T - exact).square().mean().sqrt()) < 2 * 8000**-0.5
    phase = torch.cat([factors[0] / kernels[0].bandwidth, factors[1] / kernels[1].bandwidth], 1)
    assert torch.allclose(z, RandomFourierFeatures(kind(1.0), 50, 8000)(phase))
    assert both.fingerprint != product_embedder(first, second, features=8000).fingerprint


def test_a_cosine_and_a_gaussian_kernel_multiply():
    x, kernel = rows(30, 50), GaussianKernel(0.8)
    both = product_embedder(first, second, features=8000, kernel_b=kernel, other=lambda t: t)
    a, b = normalize_rows(x[:, :20]), normalize_rows(x[:, 20:])
    exact = (a @ a.T) * (1 + kernel(b)) / 2
    assert torch.allclose(both.kernel(x), exact)
    assert float((both(x) @ both(x).T - exact).square().mean().sqrt()) < 4 * 8000**-0.5
    assert torch.allclose(both(x) @ both.other(a).T, (a @ a.T) / 2)


def test_embedders_multiply_and_have_names_and_fingerprints():
    images = torch.rand(5, 3, 16, 16)
    both = PIXELS * COLOURS
    assert both.name == "16 pixels x colours"
    assert (both.size, both.fit) == (16, "squash")
    assert both(images).shape == (5, 3000)
    assert both.fingerprint != (COLOURS * PIXELS).fingerprint
    assert both.fingerprint == (PIXELS * COLOURS).fingerprint
    three = both * COLOURS
    assert torch.allclose(three.kernel(images), both.kernel(images) * COLOURS_KERNEL(images), atol=0.1)
    texts = TextEmbedder(lambda t: torch.eye(len(t), 4), "letters", "none")
    assert (texts * texts)(["a", "b"]).shape == (2, 3000)


def COLOURS_KERNEL(images):
    return normalize_rows(COLOURS(images)) @ normalize_rows(COLOURS(images)).T


def test_bad_factors_are_named():
    with pytest.raises(TypeError, match="an embedder is a function"):
        product_embedder(first, torch.eye(3))
    with pytest.raises(ValueError, match="features"):
        product_embedder(first, second, features=0)
    with pytest.raises(ValueError, match="constant"):
        product_embedder(first, second, constant=0)
    with pytest.raises(ValueError, match="one-sided"):
        product_embedder(first, second, features=None, other=first)
    with pytest.raises(ValueError, match="exact rows of finite width"):
        product_embedder(first, second, features=None, kernel_a=GaussianKernel(1.0))
    with pytest.raises(ValueError, match="random features are for cosine, Gaussian"):
        product_embedder(first, second, kernel_b=PolynomialKernel())
    with pytest.raises(ValueError, match="needs a bandwidth"):
        product_embedder(first, second, kernel_b=GaussianKernel())
    with pytest.raises(ValueError, match="the one-sided form needs the cosine kernel"):
        product_embedder(first, second, other=first, kernel_a=GaussianKernel(1.0))
    with pytest.raises(ValueError, match="returned 3 and 2 rows"):
        product_embedder(first, lambda x: x[:2, 20:])(rows(3, 50))
    with pytest.raises(ValueError, match="contains NaN"):
        product_embedder(first, second)(rows(3, 50) / 0)


@pytest.mark.parametrize("features", [None, 50])
def test_rows_of_zeros_have_no_product(features):
    fused = product_embedder(lambda z: z, lambda z: z.roll(1, 1), features=features)
    with pytest.raises(ValueError, match="1 rows of zeros"):
        fused(torch.eye(3)[:2] * torch.tensor([[1.0], [0.0]]))
