import copy
import pickle

import pytest
import torch

from kspec_guidance.features import NystromFeatures, RandomFourierFeatures, RandomProjection, tensor_product
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


@pytest.mark.parametrize("make", [
    lambda seed: RandomFourierFeatures(GaussianKernel(1.0), 4, 8, seed=seed), lambda seed: RandomProjection(4, 3, seed),
    lambda seed: NystromFeatures(GaussianKernel(1.0), torch.arange(12.0).view(3, 4) + seed),
])  # fmt: skip
def test_copies_of_buffers_are_made_once_and_follow_changes(make, g):
    x = torch.randn(5, 4, generator=g).to(torch.float64 if isinstance(make(0), RandomProjection) else torch.float32)
    phi, other = make(0), make(1)
    phi(x), other(x)
    copies = {name: found[2] for name, found in phi._copies.items()}
    phi(x)
    assert all(phi._copies[name][2] is kept for name, kept in copies.items())
    phi.load_state_dict(other.state_dict())
    torch.testing.assert_close(phi(x), other(x))
    with torch.no_grad():
        for buffer in phi.buffers():
            buffer.mul_(0)
    assert phi(x).std(0).max() == 0
    for copied in (pickle.loads(pickle.dumps(other)), copy.deepcopy(other)):
        assert not copied._copies
        assert torch.equal(copied(x), other(x))
    assert other.state_dict().keys() == dict(other.named_buffers()).keys()


def test_random_features_follow_dtype_and_accept_half_precision(g):
    x = torch.randn(6, 4, generator=g)
    phi = RandomFourierFeatures(GaussianKernel(1.0), 4, 64)
    expected = phi(x)
    for dtype in (torch.float16, torch.bfloat16):
        assert phi(x.to(dtype)).dtype == torch.float32
        torch.testing.assert_close(phi(x.to(dtype)), expected, atol=0.02, rtol=0)
    assert phi.to(torch.float32).frequencies.dtype == torch.float32
    torch.testing.assert_close(phi(x), expected)
    assert phi.half()(x).dtype == torch.float32


def test_nystrom_features_follow_dtype_without_noise_of_small_eigenvalues(g):
    x = torch.randn(40, 3, generator=g)
    kernel = GaussianKernel(3.0)  # of low rank
    phi = NystromFeatures(kernel, x)
    exact, features = kernel(x.double()), phi.num_features
    torch.testing.assert_close(phi(x) @ phi(x).mT, exact, rtol=1e-9, atol=1e-9)
    single = copy.deepcopy(phi).to(torch.float32)
    assert single(x).dtype == torch.float32
    assert single.num_features == single(x).shape[1] < features
    torch.testing.assert_close((single(x) @ single(x).mT).double(), exact, rtol=0, atol=3e-4)
    half = single.half()
    assert half(x.half()).dtype == torch.float32
    torch.testing.assert_close((half(x) @ half(x).mT).double(), exact, rtol=0.01, atol=0.01)
