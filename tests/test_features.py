import pytest
import torch

from kspec_guidance.features import RandomFourierFeatures, RandomProjection, tensor_product
from kspec_guidance.kernels import GaussianKernel, LaplacianKernel


@pytest.mark.parametrize(
    ("kernel", "orthogonal"),
    [(GaussianKernel(1.5), True), (GaussianKernel(1.5), False), (LaplacianKernel(6.0), True)],
)
def test_feature_inner_products_converge_to_kernel(kernel, orthogonal, g):
    x = torch.randn(30, 5, generator=g, dtype=torch.float64)
    errors = []
    for d in (64, 1024, 16384):
        phi = RandomFourierFeatures(kernel, 5, d, orthogonal)(x)
        errors.append((phi @ phi.mT - kernel(x)).square().mean().sqrt().item())
    assert errors[0] < 1.5 * 64**-0.5
    assert errors[2] < 1.5 * 16384**-0.5
    assert errors[0] > errors[1] > errors[2]


def test_features_have_unit_norm_and_depend_on_seed(g):
    x = torch.randn(6, 3, generator=g)
    phi = RandomFourierFeatures(GaussianKernel(0.5), 3, 10)
    torch.testing.assert_close(phi(x).norm(dim=1), torch.ones(6))
    assert torch.equal(phi(x), RandomFourierFeatures(GaussianKernel(0.5), 3, 10)(x))
    assert not torch.equal(phi(x), RandomFourierFeatures(GaussianKernel(0.5), 3, 10, seed=1)(x))


def test_feature_maps_keep_global_rng_state():
    before = torch.get_rng_state()
    RandomFourierFeatures(GaussianKernel(1.0), 4, 64)
    RandomProjection(4, 2)
    assert torch.equal(before, torch.get_rng_state())


def test_vjp_matches_autograd(g):
    phi = RandomFourierFeatures(GaussianKernel(1.0), 4, 32)
    x = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    c = torch.randn(5, 32, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad((c * phi(x)).sum(), x)
    torch.testing.assert_close(phi.vjp(x.detach(), c), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kernel", [GaussianKernel(2.0), LaplacianKernel(4.0)])
def test_power_approximates_kernel_power(kernel, g):
    x = torch.randn(8, 3, generator=g, dtype=torch.float64)
    phi = RandomFourierFeatures(kernel, 3, 20000).power(2)
    torch.testing.assert_close(phi(x) @ phi(x).mT, kernel(x).square(), atol=0.04, rtol=0)


def test_tensor_product_multiplies_kernels(g):
    a, b = torch.randn(4, 3, generator=g), torch.randn(4, 5, generator=g)
    product = tensor_product(a, b)
    torch.testing.assert_close(product @ product.mT, (a @ a.mT) * (b @ b.mT))


def test_random_projection_preserves_distances(g):
    x = torch.randn(10, 400, generator=g)
    y = RandomProjection(400, 2000)(x)
    torch.testing.assert_close(torch.cdist(y, y), torch.cdist(x, x), rtol=0.12, atol=1e-4)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((GaussianKernel(1.0), 4, 7), "even and positive"),
        ((GaussianKernel(None), 4, 8), "needs a bandwidth"),
        ((GaussianKernel(1.0) * GaussianKernel(1.0), 4, 8), "GaussianKernel and LaplacianKernel"),
        ((GaussianKernel(1.0), 0, 8), "input_dim"),
    ],
)
def test_invalid_settings_raise(args, message):
    with pytest.raises(ValueError, match=message):
        RandomFourierFeatures(*args)


def test_mismatched_input_width_raises():
    with pytest.raises(ValueError, match="input_dim=4, got rows of length 5"):
        RandomFourierFeatures(GaussianKernel(1.0), 4, 8)(torch.ones(2, 5))
