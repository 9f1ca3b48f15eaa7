import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kspec_guidance import SPARKE
from kspec_guidance.kernels import (
    CosineKernel,
    ExpCosineKernel,
    GaussianKernel,
    Kernel,
    LaplacianKernel,
    PolynomialKernel,
    RationalQuadraticKernel,
    median_bandwidth,
)
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.objectives import RKE, Vendi
from kspec_guidance.testing import check_kernel

KERNELS = [
    GaussianKernel(1.3),
    CosineKernel(),
    ExpCosineKernel(),
    PolynomialKernel(),
    PolynomialKernel(2, gamma=0.3, coef=0.5),
    RationalQuadraticKernel(0.9, alpha=0.7),
    LaplacianKernel(2.0),
    GaussianKernel(2.0) * PolynomialKernel(2),
]
X = torch.tensor([[3.0, 4.0]], dtype=torch.float64)
O = torch.zeros(1, 2, dtype=torch.float64)
ONE = torch.tensor([[1.0, 0.0]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("kernel", "y", "value"),
    [
        (GaussianKernel(5.0), O, math.exp(-0.5)),
        (LaplacianKernel(7.0), O, math.exp(-1)),
        (RationalQuadraticKernel(5.0, alpha=2.0), O, (1 + 1 / 4) ** -2),
        (CosineKernel(), ONE, 0.6),
        (ExpCosineKernel(), ONE, math.expm1(0.6) / math.expm1(1)),
        (PolynomialKernel(), ONE, (1.5 + 1) ** 3),
        (PolynomialKernel(2, gamma=1.0, coef=0.0), ONE, 9.0),
    ],
)
def test_kernel_matches_formula(kernel, y, value):
    assert kernel(X, y).item() == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_vjp_matches_autograd(kernel, g):
    x = torch.randn(5, 4, generator=g, dtype=torch.float64, requires_grad=True)
    y = torch.randn(7, 4, generator=g, dtype=torch.float64)
    w = torch.randn(5, 7, generator=g, dtype=torch.float64)
    (expected,) = torch.autograd.grad((w * kernel(x, y)).sum(), x)
    torch.testing.assert_close(kernel.vjp(x.detach(), y, w), expected, rtol=1e-8, atol=1e-12)
    (expected,) = torch.autograd.grad(kernel(x, y).pow(3).sum(), x)
    torch.testing.assert_close(kernel.vjp(x.detach(), y, lambda k: 3 * k**2), expected, rtol=1e-8, atol=1e-12)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 9), st.integers(1, 6), st.sampled_from(KERNELS))
def test_kernel_matrix_is_symmetric_positive_semidefinite(seed, n, d, kernel):
    x = torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    k = kernel(x)
    torch.testing.assert_close(k, k.mT)
    assert torch.linalg.eigvalsh(k).min() > -1e-9 * k.abs().max()
    torch.testing.assert_close(kernel.diagonal(x), k.diagonal(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", KERNELS, ids=str)
def test_batched_kernel_matches_unbatched(kernel, g):
    x, y = torch.randn(2, 3, 5, 4, generator=g), torch.randn(2, 3, 6, 4, generator=g)
    torch.testing.assert_close(kernel(x, y)[1, 2], kernel(x[1, 2], y[1, 2]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_computed_in_float32(dtype, g):
    x = torch.randn(4, 8, generator=g).to(dtype)
    k = GaussianKernel(1.0)(x)
    assert k.dtype == torch.float32
    torch.testing.assert_close(k, GaussianKernel(1.0)(x.float()))


def test_gaussian_of_identical_points_far_from_origin_is_one(g):
    x = (torch.randn(1, 64, generator=g) + 1000).expand(6, 64)
    torch.testing.assert_close(GaussianKernel(0.1)(x), torch.ones(6, 6), atol=1e-4, rtol=0)


def test_median_bandwidth_ignores_duplicate_pairs():
    assert median_bandwidth(torch.tensor([[0.0], [0.0], [2.0]])) == pytest.approx(2.0, rel=1e-6)
    assert median_bandwidth(torch.zeros(3, 2)) == 1.0
    assert median_bandwidth(torch.zeros(1, 2)) == 1.0


@pytest.mark.parametrize("kernel", [GaussianKernel(), RationalQuadraticKernel(), LaplacianKernel()], ids=str)
def test_unset_bandwidth_is_fitted_to_samples(kernel, g):
    x = torch.randn(20, 3, generator=g)
    norm = 1 if isinstance(kernel, LaplacianKernel) else 2  # the distance that the kernel is a function of
    expected = torch.nn.functional.pdist(x, norm).sort().values
    fitted = kernel.fit(x)
    assert expected[94] <= fitted.bandwidth * (1 + 1e-6)  # 190 pairs: the median lies between the two in the middle
    assert fitted.bandwidth * (1 - 1e-6) <= expected[95]
    torch.testing.assert_close(kernel(x), fitted(x))


class NoGradient(Kernel):
    pass


def test_vjp_without_closed_form_raises():
    with pytest.raises(TypeError, match=r"NoGradient has no closed-form gradient; implement vjp"):
        NoGradient().vjp(X, X, torch.ones(1, 1))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: GaussianKernel(0.0), ValueError, "bandwidth must be a positive"),
        (lambda: GaussianKernel(float("nan")), ValueError, "bandwidth must be a positive"),
        (lambda: GaussianKernel("1"), ValueError, "bandwidth must be a positive finite number, got '1'"),
        (lambda: GaussianKernel(True), ValueError, "bandwidth must be a positive finite number, got True"),
        (lambda: PolynomialKernel(0), ValueError, "degree must be"),
        (lambda: PolynomialKernel(2, coef=-1.0), ValueError, "coef must be at least 0"),
        (lambda: CosineKernel()(torch.ones(3)), ValueError, r"shape \[n, d\], got \[3\]"),
        (lambda: CosineKernel()(torch.ones(3, 2), torch.ones(3, 4)), ValueError, "2 features per row and y has 4"),
        (lambda: CosineKernel()([[1.0]]), TypeError, "must be a torch.Tensor"),
    ],
)
def test_invalid_input_raises(call, error, message):
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("number", [np.float32(0.5), np.float64(0.5), np.array(0.5)])
def test_a_bandwidth_may_be_a_number_of_numpy(number):
    kernel = GaussianKernel(number)
    assert type(kernel.bandwidth) is float
    assert kernel == GaussianKernel(0.5)


def cauchy(x, y):
    """A kernel as a plain function."""
    return 1 / (1 + (x[..., :, None, :] - y[..., None, :, :]).square().sum(-1))


def test_function_is_a_kernel_with_gradient():
    check_kernel(as_kernel(cauchy))


def test_function_kernel_guides_like_its_closed_form():
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    closed = RationalQuadraticKernel(0.5**0.5)  # 1 / (1 + d^2)
    with torch.inference_mode():
        expected = RKE(closed, normalize=False).gradient(x).rows
        assert torch.allclose(RKE(cauchy, normalize=False).gradient(x).rows, expected, atol=1e-6)


@pytest.mark.parametrize("kernel", ["gaussian", GaussianKernel, 0.5])
@pytest.mark.parametrize("make", [RKE, Vendi, lambda kernel: SPARKE(prompt_kernel=kernel)])
def test_what_is_no_kernel_is_refused_by_objectives(make, kernel):
    with pytest.raises(TypeError, match="kernel must be a kernel such as"):
        make(kernel)


def test_function_without_gradient_is_refused_in_guidance():
    with pytest.raises(TypeError, match="differentiable"):
        RKE(lambda x, y: torch.ones(len(x), len(y))).gradient(torch.eye(3))
