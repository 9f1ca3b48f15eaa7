"""The checks for third parties: they pass what is right, and name the law that something wrong breaks."""

from dataclasses import dataclass

import pytest
import torch

from kspec_guidance import functional as F
from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel, LaplacianKernel, RationalQuadraticKernel
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Gradient, Vendi
from kspec_guidance.testing import check_kernel, check_objective, check_score


@dataclass(frozen=True)
class Inverse(Kernel):
    """``1 / (1 + |x - y|^2)``, as somebody else would write it; ``fault`` is what is wrong with it."""

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
            * Inverse()(x, y) ** 2
            * (2 if self.fault == "sign" else -2)
        )
        return w.sum(1, keepdim=True) * x - w @ y


@pytest.mark.parametrize(
    "kernel", [Inverse(), GaussianKernel(None), CosineKernel(), LaplacianKernel(2.0), RationalQuadraticKernel(1.0)], ids=str
)
def test_kernels_pass(kernel):
    check_kernel(kernel)


@pytest.mark.parametrize(
    ("fault", "law"), [("skew", r"k\(x, y\) = k\(y, x\)"), ("negative", "no negative"), ("sign", "vjp is the derivative")]
)
def test_a_wrong_kernel_is_told_which_law_it_breaks(fault, law):
    with pytest.raises(AssertionError, match=law):
        check_kernel(Inverse(fault))


@pytest.mark.parametrize("order", [0.5, 1.0, 2.0, float("inf")])
def test_scores_pass(order):
    check_score(lambda x: F.vendi_score(x, GaussianKernel(1.0), order=order))
    check_score(lambda x: F.vendi_score(x, order=order))


@pytest.mark.parametrize(
    ("score", "law"),
    [
        (lambda x: len(x), "copies"),
        (lambda x: 1.0, "2 groups"),
        (lambda x: F.vendi_score(x) + float(x[0, 0] > 1.0) * 0, ""),
        (lambda x: F.vendi_score(x[: (len(x) + 1) // 2] if len(x) == 9 else x), "order of samples"),
    ],
)
def test_a_wrong_score_is_told_which_law_it_breaks(score, law):
    if not law:
        return check_score(score)
    with pytest.raises(AssertionError, match=law):
        check_score(score)


def test_objectives_pass_and_a_wrong_one_does_not():
    for objective in (
        RKE(Inverse(), normalize=False),
        ConditionalRKE(GaussianKernel(2.0), normalize=False, prompt_kernel=GaussianKernel(1.0)),
        MMD(torch.randn(9, 6, dtype=torch.float64), GaussianKernel(2.0)),
        Vendi(GaussianKernel(2.0), normalize=False),
    ):
        check_objective(objective)

    class Half(RKE):
        def gradient(self, *args, **kwargs):
            return Gradient(super().gradient(*args, **kwargs).rows / 2)

    with pytest.raises(AssertionError, match="alone, n = 2"):
        check_objective(Half(GaussianKernel(2.0), normalize=False))
