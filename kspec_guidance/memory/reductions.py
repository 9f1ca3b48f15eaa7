"""Kernel sums over a memory, in one pass over the rows that matter."""

import itertools

import torch
from torch import Tensor

from kspec_guidance.kernels import GaussianKernel, Kernel, RationalQuadraticKernel
from kspec_guidance.memory import Selection

__all__ = ["distances_to_some", "memory_kernel", "memory_vjp", "nearest_rows"]

SOME = 128  # rows by which an open bandwidth is set: their median is within about 2% of that of all


def _weights(selection: Selection, part: slice, like: Tensor) -> Tensor | float:
    return 1.0 if selection.weights is None else selection.weights[:, part].to(like)


def slices(sizes: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(sizes))
    return [slice(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def memory_kernel(kernel: Kernel, x: Tensor, selection: Selection) -> Tensor:
    """``k(x_i, m_j)`` ``[n, m]``, differentiable in ``x``."""
    rows = selection.rows(x)
    xx = x.square().sum(-1, keepdim=True)
    yy = selection.squares.to(x) if selection.means else rows.square().sum(-1)
    found = kernel.of_products(x @ rows.mT, xx, yy)
    return kernel(x, rows) if found is None else found[0]


@torch.no_grad()
def distances_to_some(x: Tensor, selection: Selection, most: int = SOME) -> tuple[Tensor, Tensor | float]:
    """Distances ``[n, k]`` from ``x`` to evenly spaced rows of the selection, and the rows' weights, scaled up to all."""
    if not len(selection):
        return x.new_empty(len(x), 0), 1.0
    rows, places = selection.strided(x, most)
    p = x @ rows.mT
    if selection.scale is not None:
        p = p * selection.scale[places].to(x)
    d = (x.square().sum(-1, keepdim=True) + selection.squares[places].to(x)).sub_(p, alpha=2).clamp_min_(0).sqrt_()
    more = len(selection) / d.shape[1]
    return d, more if selection.weights is None else selection.weights[:, places].to(x) * more


@torch.no_grad()
def nearest_rows(x: Tensor, selection: Selection, most: int) -> Tensor:
    """Places in the selection, sorted, of the at most ``most`` rows nearest to any of ``x``, less likely prompts later.

    A weight ``w`` counts as a distance farther by ``-log w`` times the mean squared distance, as it does in the exponent of
    a Gaussian kernel times it.
    """
    if len(selection) <= most:
        return torch.arange(len(selection))
    p = torch.cat([x @ rows.mT for rows in selection.blocks(x)], 1)
    if selection.scale is not None:
        p = p * selection.scale.to(x)
    d2 = x.square().sum(-1, keepdim=True) + selection.squares.to(x) - 2 * p
    if selection.weights is not None:
        d2 = d2 - selection.weights.to(x).clamp_min(1e-12).log() * d2.mean()
    return d2.amin(0).topk(most, largest=False).indices.sort().values.cpu()


@torch.no_grad()
def memory_vjp(kernel: Kernel, x: Tensor, selection: Selection) -> tuple[Tensor, Tensor]:
    """``sum_j w_ij d k(x_i, m_j) / d x_i`` ``[n, d]``, reading every row once, and the largest kernel ``[n]`` with a row
    that weighs more than 1/2.

    Rows come in blocks that fit the processor's cache: their products with ``x`` give the kernel, and the same block then
    takes part in the sum. The rows' norms are known, so no scaled copy is needed. Rows that lie far from the origin
    are centred block by block, where differences of squares would lose digits.
    """
    if not len(selection):
        return torch.zeros_like(x), x.new_zeros(len(x))
    centre = selection.centre(x) if kernel.stationary else None
    if isinstance(kernel, GaussianKernel | RationalQuadraticKernel) and centre is None:
        g, k = _of_distances(kernel, x, selection)
    else:
        g, k = _of_products(kernel, x, selection, centre)
    if selection.weights is not None:
        k = torch.where(selection.weights.to(k) > 0.5, k, 0)
    return g, k.amax(-1)


def _of_distances(
    kernel: GaussianKernel | RationalQuadraticKernel, x: Tensor, selection: Selection
) -> tuple[Tensor, Tensor]:
    """The fast path; what can be done for all rows at once is done outside of the loop."""
    total, sizes = torch.zeros_like(x), selection.sizes(x)
    both = x.square().sum(-1, keepdim=True) + selection.squares.to(x)  # becomes the distances, block by block
    weights = x.new_ones(1, 1) if selection.weights is None else selection.weights.to(x)
    scales = x.new_ones(len(selection)) if selection.scale is None else selection.scale.to(x)
    scaled = weights * scales
    gaussian = isinstance(kernel, GaussianKernel)
    if isinstance(kernel, GaussianKernel):  # the exponent at once: five calls a block
        assert kernel.bandwidth is not None
        fold = -0.5 / kernel.bandwidth**2
        scaled = scaled * kernel.bandwidth**-2
        both = both.mul_(fold)
    else:
        fold = 1.0
    parts = zip(both.split(sizes, 1), scales.split(sizes), scaled.split(sizes, 1), selection.blocks(x), strict=True)
    for d, scale, weight, rows in parts:
        d.addcmul_(x @ rows.mT, scale, value=-2 * fold)
        slope = torch.exp(d) if gaussian else kernel.of_distances(d)[1]
        total.addmm_(slope.mul_(weight), rows)
    k, slope = kernel.of_distances((both / fold).clamp_min_(0))
    return total - (slope * weights).sum(-1, keepdim=True) * x, k


def _of_products(kernel: Kernel, x: Tensor, selection: Selection, centre: Tensor | None) -> tuple[Tensor, Tensor]:
    """Kernels that are no function of the distance, and rows that must be centred."""
    total, along, every = torch.zeros_like(x), x.new_zeros(len(x), 1), x.new_empty(len(x), len(selection))
    scales, squares = None if selection.scale is None else selection.scale.to(x), selection.squares.to(x)
    x = x if centre is None else x - centre
    xx = x.square().sum(-1, keepdim=True)
    parts = slices(selection.sizes(x))
    for part, rows in zip(parts, selection.blocks(x), strict=True):
        weights, yy = _weights(selection, part, x), squares[part]
        if scales is not None:
            rows = rows * scales[part, None]
        if centre is not None:  # about the centre, a mean keeps the scatter of what it stands for
            scatter = (yy - rows.square().sum(-1)).clamp_min(0) if selection.means else 0
            rows = rows - centre
            yy = rows.square().sum(-1) + scatter
        found = kernel.of_products(x @ rows.mT, xx, yy)
        if found is None:
            every[:, part] = kernel(x, rows)
            total += kernel.vjp(x, rows, torch.as_tensor(weights).to(x).expand(len(x), len(rows)))
            continue
        every[:, part], by_product, by_square = found
        c = weights * by_product
        along += c.sum(-1, keepdim=True) if by_square is None else (weights * by_square).sum(-1, keepdim=True) * -2
        total.addmm_(c, rows)
    return total - along * x, every
