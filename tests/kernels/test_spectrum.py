import pytest
import torch

from kspec_guidance.kernels.spectrum import (
    accumulate_gram,
    cholesky_factor,
    cross_products,
    inverse_of_factor,
    mirror_upper,
    own_products,
    own_products_of_factor,
    renyi_entropy,
    symmetric_eigenvalues,
    times_factor,
)


def test_renyi_entropy_ignores_rounding_noise():
    l = torch.tensor([1e-18, 0.0, 1.0], dtype=torch.float64)
    assert renyi_entropy(l, 0.01).exp().item() == pytest.approx(1)


@pytest.mark.parametrize("size", [(300, 130), (2, 110, 110), (3, 4, 4)])
def test_eigenvalues_are_those_of_torch_in_any_shape_and_differentiable(size):
    x = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    matrix = x.mT @ x
    expected = torch.linalg.eigvalsh(matrix)
    torch.testing.assert_close(symmetric_eigenvalues(matrix), expected, rtol=0, atol=1e-11)
    lower = matrix.tril()  # the upper triangle is not read
    torch.testing.assert_close(symmetric_eigenvalues(lower), expected, rtol=0, atol=1e-11)
    matrix.requires_grad_()
    (gradient,) = torch.autograd.grad(symmetric_eigenvalues(matrix).sum(), matrix)
    torch.testing.assert_close(gradient, torch.eye(size[-1], dtype=torch.float64).expand_as(gradient))  # of the trace


def test_own_products_are_exactly_symmetric_and_those_of_a_product():
    a = torch.randn(200, 110, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for z in (a, a.mT, a[::2], a[:5]):
        torch.testing.assert_close(own_products(z), z.mT @ z)
        assert torch.equal(own_products(z), own_products(z).mT)


@pytest.mark.parametrize("width", [3, 600])
def test_sums_of_gram_matrices_over_parts_are_symmetric_and_exact(width):
    a = torch.randint(-9, 9, (3100, width), generator=torch.Generator().manual_seed(0)).float()
    whole = (a.double().mT @ a.double()).contiguous()
    total, apart = torch.zeros_like(whole), torch.zeros(width, 2 * width, dtype=torch.float64)[:, ::2]
    for part in (a[0::3], a[1::3], a[2::3], a[:0]):
        accumulate_gram(total, part)
        accumulate_gram(apart, part)  # not contiguous: BLAS cannot write into it
    mirror_upper(total)
    mirror_upper(apart)
    assert torch.equal(total, whole)
    assert torch.equal(apart, whole)


def test_eigenvalues_of_nan_are_refused():
    with pytest.raises((ValueError, RuntimeError)):
        symmetric_eigenvalues(torch.full((200, 200), torch.nan, dtype=torch.float64))


@pytest.mark.parametrize("n", [5, 200])  # by torch, and by LAPACK itself
def test_triangular_factor_its_inverse_and_its_products(n):
    a = torch.randn(n, 2 * n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    g = a @ a.mT / n
    l = cholesky_factor(g)
    assert torch.equal(l, l.tril())
    torch.testing.assert_close(l @ l.mT, g)
    torch.testing.assert_close(inverse_of_factor(l) @ l, torch.eye(n, dtype=torch.float64))
    torch.testing.assert_close(own_products_of_factor(l).tril(), (l.mT @ l).tril())
    torch.testing.assert_close(times_factor(l, a), l @ a)
    torch.testing.assert_close(cross_products(a.mT, a.mT[:, :n]), a @ a[:n].mT)
    assert cholesky_factor(g - 2 * torch.linalg.eigvalsh(g)[0] * torch.eye(n)) is None


def test_products_of_columns_stay_in_their_precision():
    a = torch.randn(300, 100, generator=torch.Generator().manual_seed(0))
    assert own_products(a).dtype == torch.float32
    torch.testing.assert_close(own_products(a).double(), a.double().mT @ a.double(), rtol=1e-4, atol=1e-4)
