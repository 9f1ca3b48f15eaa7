"""Kernels on vectors, each with its value and its vector-Jacobian product in closed form.

A kernel takes ``x`` ``[..., n, d]`` and ``y`` ``[..., m, d]`` and returns ``[..., n, m]``. Every quantity of this package
is a function of such matrices, so the one derivative needed is that of ``sum_ij w_ij k(x_i, y_j)`` in ``x``: that is
:meth:`Kernel.vjp`. Half precision is computed in float32; float64 stays float64.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kspec_guidance.distances import (
    as_float,
    check_pair,
    far_centre,
    gradient_bandwidth,
    median_bandwidth,
    pairwise_distances,
    some_rows,
    squared_distances,
)

__all__ = [
    "CosineKernel",
    "GaussianKernel",
    "Kernel",
    "LaplacianKernel",
    "PolynomialKernel",
    "ProductKernel",
    "RationalQuadraticKernel",
    "gradient_bandwidth",
    "median_bandwidth",
    "pairwise_distances",
]

CHUNK = 1 << 24  # elements of the [n, m, d] differences that the Laplacian kernel holds at once


Weight = Tensor | Callable[[Tensor], Tensor]


def _evaluate(weight: Weight, k: Tensor) -> Tensor:
    return weight(k) if callable(weight) else weight


def _positive(name: str, value: float | None) -> None:
    if value is not None and not (isinstance(value, int | float) and math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be a positive finite number, got {value!r}")


class Kernel:
    """Base class: a positive-definite function of two vectors.

    A subclass gives ``__call__`` and, if there is a closed form, ``vjp``. ``fit`` fills in what is to be chosen from
    data (a bandwidth of ``None`` means the median rule). ``k1 * k2`` is the product kernel.
    """

    stationary = False  # whether it depends on x - y alone

    @property
    def open(self) -> bool:
        """Whether :meth:`fit` has something to choose from data."""
        return False

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Kernel matrix ``[..., n, m]``; with ``y`` left out, of ``x`` with itself.

        Raises:
            ValueError: for shapes that do not fit each other.
        """
        raise NotImplementedError

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        """``sum_j weight_ij d k(x_i, y_j) / d x_i`` as ``[..., n, d]``, in closed form, ``y`` held fixed.

        ``weight`` ``[..., n, m]`` may be a function of the kernel matrix, so that for a sum of ``f(k)`` one passes ``f'``
        and the matrix is computed once.
        """
        raise TypeError(
            f"{type(self).__name__} has no closed-form gradient; give it a vjp(x, y, weight) method, "
            "or choose GaussianKernel, CosineKernel, PolynomialKernel, RationalQuadraticKernel or LaplacianKernel"
        )

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """The kernel and its derivatives in ``p`` and ``xx``, from inner products ``p`` ``[n, m]`` and squared norms.

        ``xx`` is ``[n, 1]``, ``yy`` ``[m]``. With it a sum over many rows needs one pass over them. The last is None for
        functions of the distance: it is -1/2 of the one in ``p`` then. None altogether for kernels that are no function of
        inner products; an open bandwidth must have been fitted.
        """
        return None

    def squared(self) -> "Kernel":
        """``k^2``, in closed form where there is one."""
        return ProductKernel(self, self)

    def fit(self, x: Tensor, y: Tensor | None = None) -> "Kernel":
        """This kernel with its open parameters chosen from the rows of ``x`` (against ``y`` when given)."""
        return self

    def diagonal(self, x: Tensor) -> Tensor:
        """``k(x_i, x_i)`` ``[..., n]``."""
        return torch.ones(x.shape[:-1], dtype=as_float(x).dtype, device=x.device)

    def normalised(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``k(x, y) / sqrt(k(x, x) k(y, y))``: unit diagonal, as entropies need; the kernel itself if it has one."""
        k = self(x, y)
        if type(self).diagonal is Kernel.diagonal:
            return k
        scale_x = self.diagonal(x).rsqrt()
        scale_y = scale_x if y is None else self.diagonal(y).rsqrt()
        return k * scale_x[..., :, None] * scale_y[..., None, :]

    def __mul__(self, other: "Kernel") -> "ProductKernel":
        return ProductKernel(self, other)


class _Stationary(Kernel):
    """Kernels with a ``bandwidth``; ``None`` is filled in by ``fit`` with the median rule."""

    bandwidth: float | None
    stationary = True

    @property
    def open(self) -> bool:
        return self.bandwidth is None

    def fit(self, x: Tensor, y: Tensor | None = None) -> "_Stationary":
        return self if self.bandwidth is not None else replace(self, bandwidth=self._rule(x, y))  # type: ignore[type-var]

    def of_distances(self, d2: Tensor) -> tuple[Tensor, Tensor] | None:
        """The kernel of squared distances, and -2 times its derivative in them; None if they do not determine it."""
        return None

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        found = self.of_distances(torch.sub(xx + yy, p, alpha=2).clamp_min(0))
        return None if found is None else (*found, None)

    def _rule(self, x: Tensor, y: Tensor | None) -> float:
        return median_bandwidth(x, y)

    def _width(self, x: Tensor, y: Tensor | None) -> float:
        return self.bandwidth if self.bandwidth is not None else self._rule(check_pair(x, x)[0], y)


def _radial_vjp(x: Tensor, y: Tensor, coefficient: Tensor) -> Tensor:
    """``sum_j c_ij (x_i - y_j)`` without forming the differences."""
    if not y.shape[-2]:
        return torch.zeros_like(x)
    centre = far_centre(y)
    if centre is not None:
        x, y = x - centre, y - centre
    return coefficient.sum(-1, keepdim=True) * x - coefficient @ y


@dataclass(frozen=True)
class GaussianKernel(_Stationary):
    """``exp(-||x - y||^2 / (2 bandwidth^2))``; bandwidth in the units of the features, ``None`` for the median rule.

    >>> GaussianKernel(1.0)(torch.zeros(1, 2), torch.tensor([[1.0, 1.0]])).item()  # exp(-1)
    0.3678794503211975
    """

    bandwidth: float | None = None

    def __post_init__(self):
        _positive("bandwidth", self.bandwidth)

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        b = self._width(x, y)
        return torch.exp(squared_distances(x, y) / (-2 * b * b))

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        b = self._width(x, y)
        k = torch.exp(squared_distances(x, y) / (-2 * b * b))
        return _radial_vjp(x, y, _evaluate(weight, k) * k / (-b * b))

    def of_distances(self, d2: Tensor) -> tuple[Tensor, Tensor]:
        assert self.bandwidth is not None
        k = torch.exp(d2 * (-0.5 / self.bandwidth**2))
        return k, k * self.bandwidth**-2

    def squared(self) -> "GaussianKernel":
        assert self.bandwidth is not None
        return GaussianKernel(self.bandwidth / math.sqrt(2))


@dataclass(frozen=True)
class RationalQuadraticKernel(_Stationary):
    """``(1 + ||x - y||^2 / (2 alpha bandwidth^2))^-alpha``: a mixture of Gaussians, with heavier tails."""

    bandwidth: float | None = None
    alpha: float = 1.0

    def __post_init__(self):
        _positive("bandwidth", self.bandwidth)
        _positive("alpha", self.alpha)

    def _base(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, float]:
        b = self._width(x, y)
        return 1 + squared_distances(x, y) / (2 * self.alpha * b * b), b

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._base(x, y)[0].pow(-self.alpha)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        base, b = self._base(x, y)
        k = base.pow(-self.alpha)
        return _radial_vjp(x, y, _evaluate(weight, k) * k / base / (-b * b))

    def of_distances(self, d2: Tensor) -> tuple[Tensor, Tensor]:
        assert self.bandwidth is not None
        base = 1 + d2 / (2 * self.alpha * self.bandwidth**2)
        k = base.pow(-self.alpha)
        return k, k / base * self.bandwidth**-2

    def squared(self) -> "RationalQuadraticKernel":
        assert self.bandwidth is not None
        return RationalQuadraticKernel(self.bandwidth / math.sqrt(2), 2 * self.alpha)


@dataclass(frozen=True)
class LaplacianKernel(_Stationary):
    """``exp(-||x - y||_1 / bandwidth)`` with the sum of absolute differences, as in Rahimi and Recht (2007).

    The median rule takes the median L1 distance. Where a coordinate of ``x`` and ``y`` agrees, its derivative is 0.
    """

    bandwidth: float | None = None

    def __post_init__(self):
        _positive("bandwidth", self.bandwidth)

    def _rule(self, x: Tensor, y: Tensor | None) -> float:
        x, y = check_pair(some_rows(x.detach()), some_rows((x if y is None else y).detach()))
        d = torch.cdist(x, y, p=1).flatten()
        d = d[d > 0]
        return float(d.median()) if d.numel() else 1.0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        b = self._width(x, y)
        x, y = check_pair(x, x if y is None else y)
        return torch.exp(-torch.cdist(x, y, p=1) / b)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        b = self._width(x, y)
        k = torch.exp(-torch.cdist(x, y, p=1) / b)
        coefficient = _evaluate(weight, k) * k / -b
        rows = max(1, CHUNK // max(1, x.shape[-2] * x.shape[-1]))
        total = torch.zeros_like(x)
        for part, c in zip(y.split(rows, dim=-2), coefficient.split(rows, dim=-1), strict=True):
            # [..., n, 1, d] - [..., 1, m, d]
            total += (c[..., None] * torch.sign(x[..., :, None, :] - part[..., None, :, :])).sum(-2)
        return total


@dataclass(frozen=True)
class CosineKernel(Kernel):
    """``x.y / (||x|| ||y||)``; rows of zeros are equal to each other (1) and like nothing else (0)."""

    @staticmethod
    def unit(x: Tensor) -> tuple[Tensor, Tensor]:
        """Rows scaled to norm 1, and the norms ``[..., n, 1]`` (0 is kept as 1)."""
        norm = x.norm(dim=-1, keepdim=True)
        norm = torch.where(norm > 0, norm, torch.ones_like(norm))
        return x / norm, norm

    @classmethod
    def features(cls, x: Tensor) -> Tensor:
        """Rows whose inner products are the kernel: unit rows, and a further coordinate for zeros if there are any."""
        zero = (x == 0).all(dim=-1, keepdim=True)
        u = cls.unit(x)[0]
        return torch.cat([u, zero.to(u)], dim=-1) if bool(zero.any()) else u

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x, y = check_pair(x, x if y is None else y)
        k = self.unit(x)[0] @ self.unit(y)[0].mT
        zero_x, zero_y = (x == 0).all(dim=-1), (y == 0).all(dim=-1)
        return k + (zero_x[..., :, None] & zero_y[..., None, :]).to(k) if bool(zero_x.any()) else k

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        u, norm = self.unit(x)
        v = self.unit(y)[0]
        g = _evaluate(weight, u @ v.mT) @ v
        return (g - (g * u).sum(-1, keepdim=True) * u) / norm

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        zero_x, zero_y = xx == 0, yy == 0
        xx, yy = torch.where(zero_x, 1, xx), torch.where(zero_y, 1, yy)
        slope = (xx * yy).rsqrt()
        k = p * slope
        return k + (zero_x & zero_y).to(k), slope, k / (-2 * xx)


@dataclass(frozen=True)
class PolynomialKernel(Kernel):
    """``(gamma x.y + coef)^degree``; ``gamma`` of ``None`` is ``1 / d``. Degree 3 with coef 1 is the kernel of KID.

    Its diagonal is not 1; scores of entropy divide it out, MMD takes it as it is.
    """

    degree: int = 3
    gamma: float | None = None
    coef: float = 1.0

    def __post_init__(self):
        if not isinstance(self.degree, int) or self.degree < 1:
            raise ValueError(f"degree must be a whole number of at least 1, got {self.degree!r}")
        _positive("gamma", self.gamma)
        if not (math.isfinite(self.coef) and self.coef >= 0):
            raise ValueError(f"coef must be at least 0, or the kernel is not positive definite; got {self.coef!r}")

    def _base(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, float]:
        x, y = check_pair(x, x if y is None else y)
        gamma = 1 / x.shape[-1] if self.gamma is None else self.gamma
        return gamma * (x @ y.mT) + self.coef, gamma

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._base(x, y)[0].pow(self.degree)

    def diagonal(self, x: Tensor) -> Tensor:
        x = as_float(x)
        gamma = 1 / x.shape[-1] if self.gamma is None else self.gamma
        return (gamma * x.square().sum(-1) + self.coef).pow(self.degree)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        base, gamma = self._base(x, y)
        w = _evaluate(weight, base.pow(self.degree))
        return (w * base.pow(self.degree - 1) * (self.degree * gamma)) @ y

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        if self.gamma is None:  # 1 / d cannot be known from products: fit() puts it in
            return None
        base = self.gamma * p + self.coef
        return base.pow(self.degree), base.pow(self.degree - 1) * (self.degree * self.gamma), torch.zeros_like(xx)

    def fit(self, x: Tensor, y: Tensor | None = None) -> "PolynomialKernel":
        return self if self.gamma is not None else replace(self, gamma=1 / x.shape[-1])


@dataclass(frozen=True)
class ProductKernel(Kernel):
    """``first(x, y) * second(x, y)`` on the same vectors."""

    first: Kernel
    second: Kernel

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.first(x, y) * self.second(x, y)

    @property
    def open(self) -> bool:
        return self.first.open or self.second.open

    def fit(self, x: Tensor, y: Tensor | None = None) -> "ProductKernel":
        return ProductKernel(self.first.fit(x, y), self.second.fit(x, y))

    def diagonal(self, x: Tensor) -> Tensor:
        return self.first.diagonal(x) * self.second.diagonal(x)

    def normalised(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.first.normalised(x, y) * self.second.normalised(x, y)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        first, second = self.first.fit(x, y), self.second.fit(x, y)
        a, b = first(x, y), second(x, y)
        w = _evaluate(weight, a * b)
        return first.vjp(x, y, w * b) + second.vjp(x, y, w * a)

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor | None] | None:
        one, two = self.first.of_products(p, xx, yy), self.second.of_products(p, xx, yy)
        if one is None or two is None:
            return None
        (a, a_p, a_x), (b, b_p, b_x) = one, two
        by_square = None
        if a_x is not None or b_x is not None:
            by_square = (a_p / -2 if a_x is None else a_x) * b + a * (b_p / -2 if b_x is None else b_x)
        return a * b, a_p * b + a * b_p, by_square
