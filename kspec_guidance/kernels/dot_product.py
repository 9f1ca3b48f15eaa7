"""Kernels of inner products: cosine, exponential of the cosine, and polynomial."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kspec_guidance.kernels.base import Kernel, Weight, evaluate
from kspec_guidance.kernels.distances import as_float, check_pair, l2_normalize
from kspec_guidance.kernels.spectrum import own_products
from kspec_guidance.utils.transfer import surely_none

__all__ = ["CosineKernel", "ExpCosineKernel", "PolynomialKernel"]


@dataclass(frozen=True)
class CosineKernel(Kernel):
    """``x.y / (||x|| ||y||)``; 1 between two rows of zeros, and 0 between a row of zeros and any other row."""

    @staticmethod
    def features(x: Tensor) -> Tensor:
        """Rows whose inner products are the kernel: unit rows, with a further coordinate if there are rows of zeros."""
        zero = (x == 0).all(dim=-1, keepdim=True)
        u = l2_normalize(x)
        return u if surely_none(zero) else torch.cat([u, zero.to(u)], dim=-1)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x, y = check_pair(x, x if y is None else y)
        k = l2_normalize(x) @ l2_normalize(y).mT
        zero_x, zero_y = (x == 0).all(dim=-1), (y == 0).all(dim=-1)
        return k if surely_none(zero_x) else k + (zero_x[..., :, None] & zero_y[..., None, :]).to(k)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return _vjp_of_products(self, x, y, weight)

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        zero_x, zero_y = xx == 0, yy == 0
        xx, yy = torch.where(zero_x, 1, xx), torch.where(zero_y, 1, yy)
        slope = (xx * yy).rsqrt()
        k = p * slope
        return k + (zero_x & zero_y).to(k), slope, k / (-2 * xx)


@dataclass(frozen=True)
class ExpCosineKernel(Kernel):
    """``(exp(cos(x, y)) - 1) / (e - 1)``: near the cosine, but of full rank where rows are more than dimensions.

    The Gaussian kernel of bandwidth 1 of unit rows, without its constant part. It has no bandwidth. A row of zeros has the
    cosine 1 with itself, and 0 with others.
    """

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return _of_cosine(CosineKernel()(x, y))

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        return _vjp_of_products(self, x, y, weight)

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        cosine, in_p, in_xx = CosineKernel().of_products(p, xx, yy)
        slope = cosine.exp() / math.expm1(1)
        return _of_cosine(cosine), in_p * slope, in_xx * slope


def _of_cosine(cosine: Tensor) -> Tensor:
    return cosine.expm1() / math.expm1(1)


def _vjp_of_products(kernel: CosineKernel | ExpCosineKernel, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
    """The vector-Jacobian product from inner products and norms, without copies of the rows at norm 1."""
    x, y = check_pair(x, y)
    xx, yy = x.square().sum(-1, keepdim=True), y.square().sum(-1)[..., None, :]
    k, in_p, in_xx = kernel.of_products(x @ y.mT, xx, yy)
    w = evaluate(weight, k)
    return (w * in_p) @ y + 2 * (w * in_xx).sum(-1, keepdim=True) * x


@dataclass(frozen=True)
class PolynomialKernel(Kernel):
    """``(gamma x.y + coef)^degree``; ``gamma`` of ``None`` is ``1 / d``. Degree 3 with coef 1 is the kernel of KID.

    Its diagonal is not 1; entropy scores normalise the kernel, MMD does not.
    """

    degree: int = 3
    gamma: float | None = None
    coef: float = 1.0

    def __post_init__(self):
        if not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree must be an integer of at least 1, got {self.degree!r}")
        if self.gamma is not None and not (isinstance(self.gamma, int | float) and 0 < self.gamma < math.inf):
            raise ValueError(f"gamma must be a positive finite number, got {self.gamma!r}")
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(f"coef must be at least 0, or the kernel is not positive definite; got {self.coef!r}")

    def _base(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, float]:
        same = y is None
        x, y = check_pair(x, x if y is None else y)
        gamma = 1 / x.shape[-1] if self.gamma is None else self.gamma
        return (gamma * (own_products(x.mT) if same else x @ y.mT)).add_(self.coef), gamma

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._base(x, y)[0].pow(self.degree)

    def diagonal(self, x: Tensor) -> Tensor:
        x = as_float(x)
        gamma = 1 / x.shape[-1] if self.gamma is None else self.gamma
        return (gamma * x.square().sum(-1) + self.coef).pow(self.degree)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        base, gamma = self._base(x, y)
        w = evaluate(weight, base.pow(self.degree))
        return (w * base.pow(self.degree - 1) * (self.degree * gamma)) @ y

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        if self.gamma is None:  # 1 / d is unknown from products; fit() sets it
            return None
        base = self.gamma * p + self.coef
        return base.pow(self.degree), base.pow(self.degree - 1) * (self.degree * self.gamma), torch.zeros_like(base)

    def fit(self, x: Tensor, y: Tensor | None = None) -> "PolynomialKernel":
        return self if self.gamma is not None else replace(self, gamma=1 / x.shape[-1])
