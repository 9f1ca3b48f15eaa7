import pytest
import torch

from kspec_guidance.kernels.spectrum import CovarianceOperator, renyi_entropy


def test_streamed_moments_do_not_depend_on_batching(g):
    x = torch.randn(30, 5, generator=g, dtype=torch.float64)
    whole, parts, extra = CovarianceOperator().add(x), CovarianceOperator(), CovarianceOperator().add(x[:4])
    for part in x.split(7):
        parts.add(part)
    torch.testing.assert_close(whole.eigenvalues(), parts.eigenvalues())
    torch.testing.assert_close(parts.merge(extra).subtract(extra).matrix(), whole.matrix())
    with pytest.raises(ValueError, match="no samples"):
        CovarianceOperator().matrix()


def test_entropy_ignores_rounding_noise():
    l = torch.tensor([1e-18, 0.0, 1.0], dtype=torch.float64)
    assert renyi_entropy(l, 0.01).exp().item() == pytest.approx(1)
