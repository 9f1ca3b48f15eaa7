import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from tests.samples import rows


@pytest.mark.parametrize("order", [0.7, 1.0, 2.0, 3.0])
def test_scores_pass_gradcheck(order, g):
    x = torch.randn(5, 3, generator=g, dtype=torch.float64, requires_grad=True)
    t = torch.randn(5, 2, generator=g, dtype=torch.float64)
    k, y = GaussianKernel(1.0), torch.randn(4, 3, generator=g, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda z: F.vendi_score(z, k, order), x)
    assert torch.autograd.gradcheck(lambda z: F.conditional_vendi_score(z, t, k, k, order), x)
    assert torch.autograd.gradcheck(lambda z: F.mmd(z, y, k), x)


def test_ken_scendi_and_feature_scores_pass_gradcheck():
    x, y = rows(6, 3).requires_grad_(), rows(5, 3, 1).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: F.ken_score(a, b, GaussianKernel(1.5), 0.7), (x, y))
    t = rows(6, 2, 2).requires_grad_()
    assert torch.autograd.gradcheck(F.scendi_score, (x, t))
    assert torch.autograd.gradcheck(F.prompt_vendi_score, (x, t))
    assert torch.autograd.gradcheck(lambda a: F.rke_score(a, GaussianKernel(1.0)), x)
    phi = RandomFourierFeatures(GaussianKernel(1.0), 3, 8)
    assert torch.autograd.gradcheck(lambda a: F.vendi_score(a, feature_map=phi), x)
    assert torch.autograd.gradcheck(lambda a, b: F.information_vendi_score(a, b, GaussianKernel(1.0)), (x, t))


def test_gradients_at_duplicate_samples_are_finite():
    x = rows(2, 3).repeat(3, 1).requires_grad_()
    for score in (
        lambda z: F.vendi_score(z, GaussianKernel(1.0)),
        lambda z: F.ken_score(z, rows(4, 3, 1), GaussianKernel(1.0)),
    ):
        (g,) = torch.autograd.grad(score(x), x)
        assert torch.isfinite(g).all()
