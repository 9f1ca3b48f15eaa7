"""Kernels of the difference of two vectors: Gaussian, rational quadratic, Laplacian."""

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kspec_guidance.kernels.base import Kernel, Weight, evaluate
from kspec_guidance.kernels.distances import (
    check_pair,
    distances_of_pairs,
    far_centre,
    median_rows,
    squared_distances,
)
from kspec_guidance.utils.arguments import plain_number

__all__ = ["GaussianKernel", "LaplacianKernel", "RationalQuadraticKernel", "weighted_median"]

CHUNK = 1 << 24  # elements of the [n, m, d] differences that the Laplacian kernel holds at once
WEIGHT_BITS = 30  # of the largest weight in a weighted median; sums of 2^33 such weights fit into 64 bits


def weighted_median(values: Tensor, weights: Tensor) -> Tensor:
    """The value at which half of the total weight is reached; 1 if all weights are 0, or if the value is 0.

    Computed on the device of the values, without waiting for it. The weights are added as integers: sums of floating-point
    numbers in parallel are not reproducible.

    Args:
        values: nonnegative tensor of any shape.
        weights: nonnegative tensor of the same shape.

    Returns:
        A tensor of one element.

    >>> float(weighted_median(torch.tensor([1.0, 2.0, 5.0]), torch.tensor([1.0, 1.0, 9.0])))
    5.0
    """
    if not values.numel():
        return values.new_ones(())
    values, order = values.flatten().sort()
    unit = weights.amax().clamp_min(torch.finfo(weights.dtype).tiny)
    total = weights.take(order).div_(unit).mul_(2.0**WEIGHT_BITS).long().cumsum(0)
    whole = total[-1]
    found = values.take(torch.searchsorted(total, whole - (whole >> 1)))  # the first that reaches half, rounded up
    return torch.where(found * whole > 0, found, 1.0)


class _Stationary(Kernel):
    """Kernels with a ``bandwidth``; for ``None``, ``fit`` sets it by the median rule.

    A bandwidth that was fitted on an accelerator, in a guided step, is a tensor of one element.
    """

    bandwidth: float | None
    stationary = True

    def __post_init__(self):
        b = self.bandwidth
        if b is None or isinstance(b, Tensor) or (type(b) is float and 0 < b < math.inf):  # in each guided step
            return
        number = plain_number(b)
        if number is None or not 0 < number < math.inf:
            raise ValueError(f"bandwidth must be a positive finite number, got {b!r}")
        object.__setattr__(self, "bandwidth", number)  # one of numpy could not be saved

    @property
    def open(self) -> bool:
        return self.bandwidth is None

    def fit(self, x: Tensor, y: Tensor | None = None) -> "_Stationary":
        return self if self.bandwidth is not None else replace(self, bandwidth=self._median(x, y))  # type: ignore[type-var]

    def fit_on_device(self, x: Tensor) -> "_Stationary":
        if self.bandwidth is not None or x.device.type == "cpu":
            return self.fit(x)
        d, distinct = self._distances(x, None)
        return replace(self, bandwidth=weighted_median(d, distinct.to(d)))  # type: ignore[type-var]

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        found = self.of_distances(torch.sub(xx + yy, p, alpha=2).clamp_min(0))
        return None if found is None else (*found, found[1] / -2)

    def _distances(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """The distances of the median rule, and the mask of those that count."""
        return distances_of_pairs(x, y)

    @torch.no_grad()
    def _median(self, x: Tensor, y: Tensor | None) -> float:
        """The median rule."""
        d, distinct = self._distances(x, y)
        d = d[distinct]
        return float(d.median()) if d.numel() else 1.0

    def _width(self, x: Tensor, y: Tensor | None) -> float:
        """The given bandwidth, or that of the median rule."""
        return self.bandwidth if self.bandwidth is not None else self._median(check_pair(x, x)[0], y)


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

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        b = self._width(x, y)
        d2 = squared_distances(x, y)
        if d2.requires_grad:
            return torch.exp(d2 / (-2 * b * b))
        return d2.div_(-2 * b * b).exp_()  # a large matrix takes as long to allocate as to compute

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        b = self._width(x, y)
        k = torch.exp(squared_distances(x, y) / (-2 * b * b))
        return _radial_vjp(x, y, evaluate(weight, k) * k / (-b * b))

    def of_distances(self, d2: Tensor) -> tuple[Tensor, Tensor]:
        assert self.bandwidth is not None
        precision = self.bandwidth**-2
        k = torch.exp(d2 * (-0.5 * precision))
        return k, k * precision

    def squared(self) -> "GaussianKernel":
        assert self.bandwidth is not None
        return GaussianKernel(self.bandwidth / math.sqrt(2))


@dataclass(frozen=True)
class RationalQuadraticKernel(_Stationary):
    """``(1 + ||x - y||^2 / (2 alpha bandwidth^2))^-alpha``: a mixture of Gaussians, with heavier tails."""

    bandwidth: float | None = None
    alpha: float = 1.0

    def __post_init__(self):
        super().__post_init__()
        if not (isinstance(self.alpha, int | float) and 0 < self.alpha < math.inf):
            raise ValueError(f"alpha must be a positive finite number, got {self.alpha!r}")

    def _base(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, float]:
        b = self._width(x, y)
        return 1 + squared_distances(x, y) / (2 * self.alpha * b * b), b

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self._base(x, y)[0].pow(-self.alpha)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        base, b = self._base(x, y)
        k = base.pow(-self.alpha)
        return _radial_vjp(x, y, evaluate(weight, k) * k / base / (-b * b))

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

    The median rule uses the median L1 distance. The derivative is 0 in coordinates in which ``x`` and ``y`` are equal.
    """

    bandwidth: float | None = None

    def _distances(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        x, y = check_pair(median_rows(x), median_rows(x if y is None else y))
        d = torch.cdist(x, y, p=1).flatten()
        return d, d > 0

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        b = self._width(x, y)
        x, y = check_pair(x, x if y is None else y)
        return torch.exp(-torch.cdist(x, y, p=1) / b)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        x, y = check_pair(x, y)
        b = self._width(x, y)
        k = torch.exp(-torch.cdist(x, y, p=1) / b)
        coefficient = evaluate(weight, k) * k / -b
        rows = max(1, CHUNK // max(1, x.shape[-2] * x.shape[-1]))
        total = torch.zeros_like(x)
        for part, c in zip(y.split(rows, dim=-2), coefficient.split(rows, dim=-1), strict=True):
            # [..., n, 1, d] - [..., 1, m, d]
            total += (c[..., None] * torch.sign(x[..., :, None, :] - part[..., None, :, :])).sum(-2)
        return total
