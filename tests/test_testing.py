"""The checks of third-party kernels, scores and objectives accept valid ones and name the property that others violate."""

from dataclasses import dataclass

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel, LaplacianKernel, RationalQuadraticKernel
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Gradient, Vendi
from kspec_guidance.testing import check_kernel, check_objective, check_score


@dataclass(frozen=True)
class InverseQuadratic(Kernel):
    """``1 / (1 + |x - y|^2)``, with an optional ``fault``: "negative", "skew" or "sign"."""

    fault: str = ""

    def __call__(self, x, y=None):
        y = x if y is None else y
        k = 1 / (1 + (x[:, None] - y[None]).square().sum(-1))
        return k - 0.5 if self.fault == "negative" else k * (1 + x[:, :1].abs()) if self.fault == "skew" else k

    def diagonal(self, x):
        return torch.full(x.shape[:-1], 0.5 if self.fault == "negative" else 1.0, dtype=x.dtype)

    def vjp(self, x, y, weight):
        w = (
            (weight(self(x, y)) if callable(weight) else weight)
            * InverseQuadratic()(x, y) ** 2
            * (2 if self.fault == "sign" else -2)
        )
        return w.sum(1, keepdim=True) * x - w @ y


@pytest.mark.parametrize(
    "kernel",
    [InverseQuadratic(), GaussianKernel(None), CosineKernel(), LaplacianKernel(2.0), RationalQuadraticKernel(1.0)],
    ids=str,
)
def test_check_kernel_accepts_valid_kernels(kernel):
    check_kernel(kernel)


@pytest.mark.parametrize(
    ("fault", "message"),
    [("skew", r"k\(x, y\) = k\(y, x\)"), ("negative", "positive semi-definite"), ("sign", "vjp is the derivative")],
)
def test_check_kernel_names_violated_property(fault, message):
    with pytest.raises(AssertionError, match=message):
        check_kernel(InverseQuadratic(fault))


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, float("inf")])
def test_check_score_accepts_vendi(order):
    check_score(lambda x: F.vendi_score(x, GaussianKernel(1.0), order=order))
    check_score(lambda x: F.vendi_score(x, order=order))


@pytest.mark.parametrize(
    ("score", "message"),
    [
        (lambda x: len(x), "copies"),
        (lambda x: 1.0, "2 distant orthogonal groups"),
        (lambda x: F.vendi_score(x) + (len(x) == 18), "repeating the whole set"),
        (lambda x: F.vendi_score(x[: (len(x) + 1) // 2] if len(x) == 9 else x), "order of samples"),
    ],
)
def test_check_score_names_violated_property(score, message):
    with pytest.raises(AssertionError, match=message):
        check_score(score)


def test_check_objective_rejects_wrong_gradient():
    for objective in (
        RKE(InverseQuadratic(), normalize=False),
        ConditionalRKE(GaussianKernel(2.0), normalize=False, prompt_kernel=GaussianKernel(1.0)),
        MMD(torch.randn(9, 6, dtype=torch.float64), GaussianKernel(2.0)),
        Vendi(GaussianKernel(2.0), normalize=False),
    ):
        check_objective(objective)

    class HalvedGradient(RKE):
        def gradient(self, *args, **kwargs):
            return Gradient(super().gradient(*args, **kwargs).rows / 2)

    with pytest.raises(AssertionError, match="alone, n = 2"):
        check_objective(HalvedGradient(GaussianKernel(2.0), normalize=False))
