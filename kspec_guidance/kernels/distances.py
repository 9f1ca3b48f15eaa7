"""Distances between rows that are accurate far from the origin, and bandwidths from them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kspec_guidance.kernels.spectrum import own_products
from kspec_guidance.utils.transfer import surely_none

__all__ = [
    "IMAGE_BANDWIDTH",
    "PROMPT_BANDWIDTH",
    "SAME_DISTANCE",
    "as_float",
    "check_pair",
    "distances_of_pairs",
    "evenly_spaced",
    "far_centre",
    "l2_normalize",
    "median_bandwidth",
    "pair_distances",
    "pairwise_distances",
    "row_norms",
    "squared_distances",
]

NEAR = 2e-3  # squared distance, relative to the squared norm, below which the formula by inner products loses digits
NEAR_ROWS = 1024  # rows that are searched for near pairs at once
PAIR_NUMBERS = 2**22  # numbers in the differences that are held at once
MEDIAN_ROWS = 2048  # maximum number of rows in the median rule
PROMPT_BANDWIDTH = 0.35  # for unit-norm prompt features, as published; see benchmarks/prompts.py
IMAGE_BANDWIDTH = 0.5  # for unit-norm image features: copies count as one image, unrelated images as two
SAME_DISTANCE = 0.75  # mean distance of unit-norm features of images of one kind, at most; see benchmarks/bandwidth.py


def as_float(x: Tensor) -> Tensor:
    """float32 for half precision and integers; float32 and float64 are returned unchanged."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_pair(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """``x`` and ``y`` in one floating-point dtype, checked to be matrices of one width.

    Raises:
        TypeError: if either is not a tensor.
        ValueError: if either has fewer than two dimensions, or their last dimensions differ.
    """
    for name, z in (("x", x), ("y", y)):
        if not isinstance(z, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor of shape [n, d], got {type(z).__name__}")
        if z.ndim < 2:
            raise ValueError(f"{name} must have shape [n, d], got {list(z.shape)}; flatten each sample to one row")
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(f"x has {x.shape[-1]} features per row and y has {y.shape[-1]}; they must be equal")
    x, y = as_float(x), as_float(y)
    dtype = torch.promote_types(x.dtype, y.dtype)
    return x.to(dtype), y.to(dtype)


def row_norms(x: Tensor) -> Tensor:
    """Euclidean norms ``[..., n, 1]`` of rows ``[..., n, d]``; 1 for rows of zeros, so that division is safe."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(norm > 0, norm, 1.0)


def l2_normalize(x: Tensor) -> Tensor:
    """Rows ``[..., n, d]`` scaled to norm 1; rows of zeros stay zeros.

    >>> l2_normalize(torch.tensor([[3.0, 4.0], [0.0, 0.0]])).tolist()
    [[0.6000000238418579, 0.800000011920929], [0.0, 0.0]]
    """
    return x / row_norms(x)


def evenly_spaced(n: int, k: int) -> Tensor:
    """At most ``k`` of the indices ``0 .. n - 1``, ascending and evenly spaced, with the first and the last, on the CPU.

    >>> evenly_spaced(7, 3).tolist(), evenly_spaced(2, 3).tolist()
    ([0, 3, 6], [0, 1])
    """
    return torch.arange(n, device="cpu") if n <= k else torch.linspace(0, n - 1, k, device="cpu").round().long()


def _squared_norms(x: Tensor) -> Tensor:
    """``[..., n, 1]``; without gradients in one pass, since squaring first would write a copy of all rows."""
    if x.requires_grad and torch.is_grad_enabled():
        return x.square().sum(-1, keepdim=True)
    return torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()


@torch.no_grad()
def far_centre(y: Tensor) -> Tensor | None:
    """The centre of the rows ``[..., n, d]`` if they are so far from the origin that ``|x|^2 + |y|^2 - 2 x.y`` cancels.

    None otherwise, since subtracting it writes a copy of all rows. About 64 rows are sampled: if their mean has at most
    95% of their squared norm, the rounding error grows by a factor of at most 20. On an accelerator the decision stays on
    the device, so the result is a tensor: zeros instead of None.
    """
    sample = y[..., :: max(1, y.shape[-2] // 64), :]
    centre = sample.mean(dim=-2, keepdim=True)
    far = centre.square().sum() > 0.95 * sample.square().sum(-1).mean(-1).sum()
    return None if surely_none(far) else torch.where(far, centre, 0)


def pair_distances(x: Tensor, y: Tensor, pairs: Sequence[Tensor]) -> Tensor:
    """``||x_i - y_j||^2`` ``[p]`` of the pairs with the given indices (batches, i, j), from the differences themselves.

    Accurate at any distance; equal pairs of rows give equal values, and equal rows exactly 0.
    """
    found, rows = [], max(1, PAIR_NUMBERS // max(1, x.shape[-1]))
    for *batch, i, j in zip(*(index.split(rows) for index in pairs), strict=True):
        found.append((x[(*batch, i)] - y[(*batch, j)]).square().sum(-1))
    return torch.cat(found) if found else x.new_zeros(0)


def _near(d2: Tensor, x: Tensor, y: Tensor, xx: Tensor) -> tuple[Tensor, Tensor]:
    """The mask of near pairs, and their distances."""
    near = d2.detach() < NEAR * xx.detach()
    return near, pair_distances(x, y, near.nonzero(as_tuple=True))


def squared_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """``||x_i - y_j||^2`` ``[..., n, m]``; the diagonal of ``x`` with itself is exactly 0.

    In float64 every value has a small relative error and equal rows are at distance exactly 0, which narrow kernels and
    entropies of order below 1 need: near pairs are computed again from their differences.
    """
    same = y is None
    x, y = check_pair(x, x if y is None else y)
    centre = far_centre(y if y.shape[-2] else x)
    if centre is not None:
        x, y = x - centre, y - centre
    xx = _squared_norms(x)
    yy = xx if same else _squared_norms(y)
    d2 = (own_products(x.mT) if same else x @ y.mT).mul_(-2).add_(xx).add_(yy.mT)
    if not d2.requires_grad:  # in place: at 10,000 rows each further copy writes and reads 800 MB
        d2.clamp_min_(0)
        if same:
            d2.diagonal(dim1=-2, dim2=-1).zero_()
    else:
        d2 = d2.clamp_min(0)
        if same:
            d2 = d2.masked_fill(torch.eye(x.shape[-2], dtype=torch.bool, device=x.device), 0)
    if d2.dtype == torch.float64:  # always on the host: scores, not guidance
        x, y = (z.expand(*d2.shape[:-2], *z.shape[-2:]) for z in (x, y))
        if d2.requires_grad:
            return d2.masked_scatter(*_near(d2, x, y, xx))
        for part, rows, norms in zip(*(z.split(NEAR_ROWS, dim=-2) for z in (d2, x, xx)), strict=True):
            part.masked_scatter_(*_near(part, rows, y, norms))  # in place, a few rows at a time
    return d2


def pairwise_distances(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Euclidean distances of distinct pairs, flattened: all of ``x`` with ``y``, or the pairs ``i < j`` of ``x``."""
    d = squared_distances(x, y).sqrt()
    if y is None:
        i, j = torch.triu_indices(d.shape[-2], d.shape[-1], offset=1, device=d.device)
        d = d[..., i, j]
    return d.flatten()


def median_rows(x: Tensor) -> Tensor:
    """The rows ``[..., k, d]`` used by the median rule: at most 2,048, evenly spaced."""
    n = x.shape[-2]
    return x if n <= MEDIAN_ROWS else x[..., evenly_spaced(n, MEDIAN_ROWS).to(x.device), :]


@torch.no_grad()
def median_bandwidth(x: Tensor, y: Tensor | None = None) -> float:
    """The median rule: the median Euclidean distance of distinct pairs, excluding pairs at distance 0.

    It is 1 if there are no such pairs (one point, or all points equal). Of more than 2,048 rows, 2,048 evenly spaced ones
    are used, i.e. two million pairs.

    Args:
        x: rows ``[n, d]``.
        y: rows ``[m, d]``; the pairs are then those of ``x`` with ``y``.

    >>> median_bandwidth(torch.tensor([[0.0], [1.0], [4.0]]))
    3.0
    """
    d, distinct = distances_of_pairs(x, y)
    d = d[distinct]
    return float(d.median()) if d.numel() else 1.0


def distances_of_pairs(x: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The distances of the median rule, flattened, and the mask of those that are not 0 up to rounding."""
    x, y = median_rows(x), None if y is None else median_rows(y)
    d = pairwise_distances(x, y)
    if not d.numel():
        return d, d > 0
    scale = x.abs().amax() if y is None else torch.maximum(x.abs().amax(), y.abs().amax())
    return d, d > 8 * torch.finfo(d.dtype).eps * scale
