"""The minimum over the simplex against its conditions of optimality and closed forms."""

import pytest
import torch

from kspec_guidance.selection.quadratic import minimise_quadratic, nearest_psd


@pytest.mark.parametrize("k", [1, 2, 5, 12])
def test_the_minimum_satisfies_the_conditions_of_optimality(k):
    g = torch.Generator().manual_seed(k)
    for _ in range(20):
        f = torch.randn(k, max(1, k // 2), generator=g).double()
        q, b = f @ f.mT, torch.randn(k, generator=g).double()
        w = minimise_quadratic(q, b)
        gradient = 2 * q @ w - b
        assert float(w.min()) >= 0
        assert float(w.sum()) == pytest.approx(1)
        gap = float(w @ gradient - gradient.min())
        assert gap <= 1e-6 * max(1.0, float(gradient.abs().max()))


def test_disjoint_uniform_arms_have_weights_proportional_to_their_modes():
    w = minimise_quadratic(torch.diag(torch.tensor([1 / 2, 1 / 3, 1 / 5])).double(), torch.zeros(3))
    assert torch.allclose(w, torch.tensor([0.2, 0.3, 0.5]).double(), atol=1e-6)


def test_equal_arms_share_evenly():
    assert torch.allclose(minimise_quadratic(torch.ones(4, 4), torch.zeros(4)), torch.full((4,), 0.25).double())


def test_a_matrix_with_negative_eigenvalues_is_projected():
    q = torch.tensor([[0.1, 0.3], [0.3, 0.1]]).double()
    assert torch.linalg.eigvalsh(nearest_psd(q)).min() >= -1e-12
    w = minimise_quadratic(q, torch.zeros(2))
    assert torch.allclose(w, torch.tensor([0.5, 0.5]).double(), atol=1e-6)
