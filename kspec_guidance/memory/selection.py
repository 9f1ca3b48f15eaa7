"""Selection: the rows of a memory that are relevant for given prompts, and kernel sums over them."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import GaussianKernel, Kernel, RationalQuadraticKernel
from kspec_guidance.kernels.distances import as_float, evenly_spaced, far_centre
from kspec_guidance.memory.store import RowStore
from kspec_guidance.utils.devices import free_bytes, normal_tensors, send, transfer

__all__ = ["PromptWeights", "Selection", "prune"]

BLOCK_BYTES = 4 << 20  # rows read at once on a CPU: they are used twice, the second time from its cache
BLOCK_BYTES_GPU = 128 << 20  # fastest of 8 to 128 MB on an H100: fewer launches, and products that fill it (docs/gpu.md)
GATHER_SHARE, GATHER_BYTES = 0.05, 512 << 20  # maximum share of a store, and bytes, that a selection may copy
DEVICE_SHARE = 0.25  # maximum share of an accelerator's free memory that a copy may take; GATHER_BYTES if unknown
MIN_RUN = 16  # minimum mean length of contiguous runs that are read in place
CENTRE_ROWS = 32  # rows sampled to detect whether all are far from the origin
BANDWIDTH_ROWS = 128  # rows sampled for an open bandwidth: their median is within about 2% of that of all rows
FEW_ROWS = 1024  # up to which products with all rows are formed first: of more, the sampled rows are a small part
ALIKE = 0.5  # weight above which a row is treated as a sample of the same prompt


@dataclass(frozen=True)
class PromptWeights:
    """``k_T(t, s)^power``: the weight of a sample of prompt ``s`` for a sample of prompt ``t``."""

    kernel: Kernel
    power: int = 2

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        """Weights ``[n, m]`` of prompt features ``t`` ``[n, p]`` and ``s`` ``[m, p]``."""
        return self.kernel(t, s).pow(self.power)


def prune(weights: Tensor, counts: Tensor, tolerance: float) -> Tensor:
    """Mask ``[P]`` of the prompts to keep, from weights ``[n, P]`` and numbers of rows ``[P]``, all on the host.

    For each of the n samples, the dropped rows have at most the share ``tolerance`` of the total weight, or of 1 if the
    total is smaller. A gradient is a sum over rows, so it changes by at most this weight times the steepest slope of one
    row: ``sqrt(2 / e) / b`` for ``k^2`` of a Gaussian with bandwidth b.
    """
    totals = weights.double() * counts
    allowed = tolerance * totals.sum(1).min().clamp_min(1.0)
    largest, order = totals.amax(0).sort()
    keep = torch.ones(len(largest), dtype=torch.bool, device="cpu")
    keep[order[largest.cumsum(0) <= allowed]] = False
    return keep


def _run_lengths(store: RowStore, indices: Tensor) -> list[int] | None:
    """Lengths of the runs of contiguous rows; None if they are too short to be read in place."""
    if len(indices) < MIN_RUN:
        return None
    ends = torch.cat([(indices.diff() != 1).nonzero().squeeze(1) + 1, torch.tensor([len(indices)], device="cpu")])
    if len(indices) / len(ends) < MIN_RUN:
        return None
    lengths, start = [], 0
    for end in ends.tolist():
        first = int(indices[start])
        lengths += [len(view) for view in store.view(first, first + end - start)]
        start = end
    return lengths


def _even_parts(n: int, size: int) -> list[int]:
    """Sizes of nearly equal parts of ``n``, each at least ``size`` if possible, without a short remainder."""
    parts = max(1, n // size)
    return [n // parts + (k < n % parts) for k in range(parts)]


def _take(blocks: Sequence[Tensor], indices: Tensor) -> Tensor:
    """The rows at ``indices``, on their device, of blocks ``[k, d]``, without a read of the indices by the host."""
    if len(blocks) == 1:
        return blocks[0][indices]
    found, start = blocks[0].new_zeros(len(indices), blocks[0].shape[1]), 0
    for block in blocks:
        local = indices - start
        inside = (local >= 0) & (local < len(block))
        found = torch.where(inside[:, None], block[local.clamp(0, len(block) - 1)], found)
        start += len(block)
    return found


class Selection:
    """Rows of a store, their weights for each sample of a batch, and their norms.

    Args:
        store: contains the rows.
        indices: sorted indices of the rows ``[m]``, on the CPU; None for the first ``len(norms)`` rows.
        weights: ``[n, m]``, ``[1, m]`` if they are the same for all samples, or None if all are 1.
        norms: norms of the stored rows ``[m]``, on the CPU.
        normalize: whether rows are scaled to norm 1.
        squares: mean squared norms ``[m]`` of the samples behind each row, for rows that are means; else None.
        prompts: prompt features ``[P, p]`` and the index ``[m]`` of each row's among them, on the CPU; None without any.
    """

    def __init__(
        self,
        store: RowStore | None,
        indices: Tensor | None,
        weights: Tensor | None,
        norms: Tensor,
        normalize: bool,
        squares: Tensor | None = None,
        prompts: tuple[Tensor, Tensor] | None = None,
    ):
        self.store, self.indices, self.weights, self.normalize = store, indices, weights, normalize
        self.means = squares is not None
        self._runs = None if store is None or indices is None else _run_lengths(store, indices)
        self._prompts = prompts
        self._copies: dict[object, Tensor] = {}
        self._plans: dict[object, tuple[list[int], Sequence[Tensor] | None]] = {}
        self._cached: dict[object, Any] = {}
        nonzero = norms > 0
        self.scale = torch.where(nonzero, 1 / torch.where(nonzero, norms, 1), 1) if normalize else None
        self.squares = squares if squares is not None else nonzero.to(norms) if normalize else norms.square()

    def __len__(self) -> int:
        return len(self.squares)

    def effective_count(self, n: int) -> Tensor:
        """Sum of the weights for each of ``n`` samples ``[n]``."""
        if self.weights is None:
            return torch.full((n,), float(len(self)), device="cpu")
        return self.weights.sum(1).expand(n)

    # -- reading rows ------------------------------------------------------------------------------------------------

    def vectors(self, like: Tensor) -> tuple[Tensor | None, Tensor, Tensor | None]:
        """Scales ``[m]``, squared norms ``[m]`` and weights ``[n or 1, m]`` in the dtype and on the device of ``like``."""
        key = "vectors", like.dtype, like.device
        found = self._cached.get(key)
        if found is None:
            with normal_tensors():
                scale = None if self.scale is None else transfer(self.scale, like)
                weights = None if self.weights is None else transfer(self.weights, like)
                found = self._cached[key] = scale, transfer(self.squares, like), weights
        return found

    def rows(self, like: Tensor, indices: Tensor | None = None) -> Tensor:
        """A copy ``[k, d]`` of all rows, or of those at sorted ``indices`` of the selection, scaled for comparison."""
        if self.store is None or not len(self):
            return like.new_empty(0, like.shape[-1])
        like = as_float(like)
        rows = self._rows_at(like, torch.arange(len(self), device="cpu") if indices is None else indices)
        scale = self.vectors(like)[0]
        if scale is None:
            return rows
        return rows * (scale if indices is None else scale[send(indices, scale.device)])[:, None]

    def prompts(self, like: Tensor, indices: Tensor) -> Tensor | None:
        """Prompt features ``[k, p]`` of the rows at ``indices``, in the dtype and on the device of ``like``, or None."""
        if self._prompts is None:
            return None
        key = "prompts", like.dtype, like.device
        found = self._cached.get(key)
        if found is None:
            features, ids = self._prompts
            with normal_tensors():
                used, ids = ids.unique(return_inverse=True)
                found = self._cached[key] = transfer(features[used], like), send(ids, like.device)
        return found[0][found[1][send(indices, like.device)]]

    def _rows_at(self, like: Tensor, indices: Tensor) -> Tensor:
        """The rows ``[k, d]`` at sorted ``indices``, not scaled, in the dtype and on the device of ``like``.

        Indices on another device than the CPU are not read, if the rows are there.
        """
        assert self.store is not None
        if self._is_copied(like):
            return self._copy(like)[send(indices, like.device)]
        blocks = None if indices.device.type == "cpu" else self._plan(like)[1]
        if blocks is not None:
            return _take(blocks, indices)
        indices = indices.cpu()
        return transfer(self.store.gather(indices if self.indices is None else self.indices[indices]), like)

    def _is_copied(self, like: Tensor) -> bool:
        """Whether the rows are copied once for all reads, rather than block by block for each."""
        key = "copied", like.dtype, like.device
        found = self._cached.get(key)
        if found is None:
            found = self._cached[key] = self._decide_copy(like)
        return found

    def _decide_copy(self, like: Tensor) -> bool:
        store = self.store
        if store is None or not len(self) or (self.indices is None and self._in_place(like)):
            return False
        size = len(self) * store.width * like.element_size()
        if store.device.type == like.device.type == "cpu":  # copies that fit the processor's cache cost little
            few = size <= min(GATHER_BYTES, GATHER_SHARE * store.nbytes)
            return few and self.indices is not None and self._runs is None
        free = free_bytes(like.device)
        return size <= (GATHER_BYTES if free is None else DEVICE_SHARE * free)

    def _in_place(self, like: Tensor) -> bool:
        """Whether the rows of the store have the dtype and device of ``like``."""
        return self.store is not None and self.store.dtype == like.dtype and self.store.device == like.device

    def _copy(self, like: Tensor) -> Tensor:
        """The rows ``[m, d]`` as one copy, not scaled, in the dtype and on the device of ``like``; made once."""
        key, store = (like.dtype, like.device), self.store
        found = self._copies.get(key)
        if found is None:
            assert store is not None
            with normal_tensors():
                if self.indices is None:
                    found, start = like.new_empty(len(self), store.width), 0
                    for view in store.view(0, len(self)):  # one after the other: no second copy of all
                        found[start : start + len(view)] = transfer(view, like)
                        start += len(view)
                else:
                    found = transfer(store.gather(self.indices), like)
            self._copies[key] = found
        return found

    def _block_rows(self, like: Tensor) -> int:
        """Number of rows in a block."""
        assert self.store is not None
        block_bytes = BLOCK_BYTES_GPU if like.device.type != "cpu" else BLOCK_BYTES // (2 if len(like) > 3 else 1)
        return max(4, block_bytes // (self.store.width * like.element_size()))

    def blocks(self, like: Tensor) -> tuple[list[int], Iterable[Tensor]]:
        """The rows in order, not scaled, in blocks ``[k, d]`` in the dtype and on the device of ``like``.

        A block is valid until the next one is requested.

        Returns:
            The number of rows in each block, and the blocks.
        """
        sizes, blocks = self._plan(like)
        return sizes, self._copied_blocks(like, sizes) if blocks is None else blocks

    def _plan(self, like: Tensor) -> tuple[list[int], Sequence[Tensor] | None]:
        """Sizes of the blocks, and the blocks themselves if they can be cached: views of the store, or one copy."""
        key = like.dtype, like.device, len(like) > 3
        found = self._plans.get(key)
        if found is None:
            found = self._plans[key] = self._make_plan(like)
        return found

    def _make_plan(self, like: Tensor) -> tuple[list[int], Sequence[Tensor] | None]:
        store, block = self.store, self._block_rows(like) if self.store is not None else 0
        if store is None or not len(self):
            return [], []
        if self._is_copied(like):
            sizes = _even_parts(len(self), block)
            return sizes, self._copy(like).split(sizes)
        if self.indices is not None:
            sizes = [size for run in self._runs or [len(self)] for size in _even_parts(run, block)]
            if self._runs is None or not self._in_place(like):
                return sizes, None
            return sizes, [store.gather(part) for part in self.indices.split(sizes)]  # of runs, these are views
        views = store.view(0, len(self))
        sizes = [size for view in views for size in _even_parts(len(view), block)]
        if not self._in_place(like):
            return sizes, None
        return sizes, [part for view in views for part in view.split(_even_parts(len(view), block))]

    def _copied_blocks(self, like: Tensor, sizes: list[int]) -> Iterator[Tensor]:
        """Blocks that are gathered, moved or converted one by one."""
        store = self.store
        assert store is not None
        indices = torch.arange(len(self), device="cpu") if self.indices is None else self.indices
        buffer = store.buffer("block", max(sizes), store.dtype, store.device)
        for part in indices.split(sizes):
            rows = store.gather(part, buffer)
            if store.device != like.device:
                rows = transfer(rows, like)
            elif store.dtype != like.dtype:
                rows = store.buffer("converted", max(sizes), like.dtype, like.device)[: len(rows)].copy_(rows)
            yield rows

    def _strided(self, like: Tensor, stride: int) -> Tensor:
        """The rows at multiples of ``stride``, not scaled; copied at most once."""
        key = "strided", like.dtype, like.device, stride
        found = self._cached.get(key)
        if found is None:
            with normal_tensors():
                found = self._rows_at(like, torch.arange(0, len(self), stride, device="cpu"))
            self._cached[key] = found
        return found

    def centre(self, like: Tensor) -> Tensor | None:
        """Centre of the rows as they are compared, if they are so far from the origin that precision is lost; else None.

        It is decided once, by one read of the host: without a centre, sums need no copies of the rows.
        """
        key = "centre", like.dtype, like.device
        if key not in self._cached:
            with normal_tensors():
                found = far_centre(self.rows(like, evenly_spaced(len(self), CENTRE_ROWS)))
                self._cached[key] = None if found is None or not bool(found.any()) else found
        return self._cached[key]

    # -- sums over the rows ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def products(self, x: Tensor) -> Tensor | None:
        """Inner products ``[n, m]`` of ``x`` with the rows as they are compared, for :meth:`distances` and their sums.

        None if these are better formed in each: of many rows, of rows that are moved or converted block by block, and of
        rows that must be centred.
        """
        if not 0 < len(self) <= FEW_ROWS or self.centre(x) is not None:
            return None
        blocks = self._plan(x)[1]
        if blocks is None:
            return None
        scale, p = self.vectors(x)[0], torch.cat([x @ rows.mT for rows in blocks], 1)
        return p if scale is None else p.mul_(scale)

    @torch.no_grad()
    def distances(self, x: Tensor, max_rows: int = BANDWIDTH_ROWS, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Distances ``[n, k]`` of ``x`` to evenly spaced rows, and their weights ``[n or 1, k]``, scaled up to all rows.

        Args:
            x: rows ``[n, d]``.
            max_rows: about this many rows are used.
            products: see :meth:`products`; computed for these rows if None.
        """
        if not len(self):
            return x.new_empty(len(x), 0), x.new_empty(1, 0)
        scale, squares, weights = self.vectors(x)
        stride = max(1, round(len(self) / max_rows))
        if products is None:
            p = x @ self._strided(x, stride).mT
            p = p if scale is None else p * scale[::stride]
        else:
            p = products[:, ::stride]
        d = (x.square().sum(-1, keepdim=True) + squares[::stride]).sub_(p, alpha=2).clamp_min_(0).sqrt_()
        share = len(self) / d.shape[1]
        return d, x.new_full((1, d.shape[1]), share) if weights is None else weights[:, ::stride] * share

    @torch.no_grad()
    def nearest(self, x: Tensor, max_rows: int) -> Tensor:
        """Sorted indices of the ``max_rows`` rows (or fewer) nearest to any row of ``x``, on its device.

        Rows of other prompts have a penalty.

        A weight ``w`` adds ``-log w`` times the mean squared distance, like a factor ``w`` of a Gaussian kernel in its
        exponent.
        """
        if len(self) <= max_rows:
            return torch.arange(len(self), device=x.device)
        d2, weights = self._squared_distances(x), self.vectors(x)[2]
        if weights is not None:
            d2 = d2 - weights.clamp_min(1e-12).log() * d2.mean()
        return d2.amin(0).topk(max_rows, largest=False).indices.sort().values

    @torch.no_grad()
    def likeliest(self, x: Tensor, sharpness: float | Tensor) -> tuple[Tensor, Tensor]:
        """Mean ``[n, d]`` of the rows that each row of ``x`` ``[n, d]`` is most like, and their mean weight ``[n]``.

        Rows count in proportion to ``w exp(sharpness z)``, with their cosines ``z`` in standard deviations of all cosines
        of that row of ``x``, since these spread less in more dimensions; as much stronger do the weights count.
        """
        scale, _, weights = self.vectors(x)
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True)
        u = x / (size + (size == 0))
        z = torch.cat([u @ rows.mT for rows in self.blocks(x)[1]], 1)
        z = z if scale is None else z * scale
        z = z - z.mean(1, keepdim=True)
        logits = sharpness * z / z.square().mean(1, keepdim=True).sqrt().clamp_min(1e-6)
        if weights is not None:
            logits = logits + (1 + sharpness) * weights.clamp_min(1e-12).log()
        shares = logits.softmax(1)
        weight = x.new_ones(len(x)) if weights is None else (shares * weights).sum(1)
        parts, mean = shares if scale is None else shares * scale, torch.zeros_like(x)
        sizes, blocks = self.blocks(x)
        for part, rows in zip(parts.split(sizes, 1), blocks, strict=True):
            mean.addmm_(part, rows)
        return mean, weight

    @torch.no_grad()
    def largest_cosine(self, x: Tensor) -> Tensor:
        """Largest cosine ``[n]`` of unit rows ``x`` ``[n, d]`` with the rows of a normalised selection; -1 if empty."""
        scale = self.vectors(x)[0]
        if scale is None or not len(self):
            return x.new_full((len(x),), -1.0)
        sizes, blocks = self.blocks(x)
        parts = [(x @ rows.mT * s).amax(1) for rows, s in zip(blocks, scale.split(sizes), strict=True)]
        return torch.stack(parts).amax(0)

    @torch.no_grad()
    def closeness(self, x: Tensor, reach: float | Tensor) -> Tensor:
        """Largest ``w (1 - d / reach)`` ``[n]`` over rows of weight ``w`` at distance ``d``; 0 if none is within reach."""
        if not len(self):
            return x.new_zeros(len(x))
        near, weights = 1 - self._squared_distances(x).clamp_min(0).sqrt() / reach, self.vectors(x)[2]
        return (near if weights is None else near * weights).amax(1).clamp_min(0)

    def _squared_distances(self, x: Tensor) -> Tensor:
        """Squared distances ``[n, m]`` to all rows as they are compared, with rounding errors, also below 0."""
        scale, squares, _ = self.vectors(x)
        p = torch.cat([x @ rows.mT for rows in self.blocks(x)[1]], 1)
        return x.square().sum(-1, keepdim=True) + squares - 2 * (p if scale is None else p * scale)

    def kernel(self, kernel: Kernel, x: Tensor) -> Tensor:
        """``k(x_i, m_j)`` ``[n, m]``, differentiable in ``x``."""
        rows = self.rows(x)
        xx = x.square().sum(-1, keepdim=True)
        yy = self.vectors(x)[1] if self.means else rows.square().sum(-1)
        found = kernel.of_products(x @ rows.mT, xx, yy)
        return kernel(x, rows) if found is None else found[0]

    @torch.no_grad()
    def kernel_gradient(self, kernel: Kernel, x: Tensor, products: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """``sum_j w_ij d k(x_i, m_j) / d x_i`` ``[n, d]``, reading each row once.

        Blocks of rows fit the CPU's cache: the products of a block with ``x`` give the kernel, and the same block is then
        added to the sum, unless the products with all rows are known, see :meth:`products`. The norms of the rows are
        known, so no scaled copy is needed. Rows far from the origin are centred block by block, since differences of
        squares would lose precision.

        Returns:
            The gradient, and the largest kernel value ``[n]`` with a row whose weight exceeds 1/2.
        """
        if not len(self):
            return torch.zeros_like(x), x.new_zeros(len(x))
        centre = self.centre(x) if kernel.stationary else None
        if isinstance(kernel, GaussianKernel | RationalQuadraticKernel) and centre is None:
            g, k = self._radial_gradient(kernel, x) if products is None else self._radial_sum(kernel, x, products)
        else:
            g, k = self._product_gradient(kernel, x, centre)
        alike = self._alike(x)
        return g, (k if alike is None else k * alike).amax(-1)

    def _alike(self, like: Tensor) -> Tensor | None:
        """1 for rows with the weight of the same prompt, and 0 for others ``[n or 1, m]``; None if all weights are 1."""
        key = "alike", like.dtype, like.device
        if key not in self._cached:
            weights = self.vectors(like)[2]
            with normal_tensors():
                self._cached[key] = None if weights is None else (weights > ALIKE).to(weights)
        return self._cached[key]

    def _radial_gradient(self, kernel: GaussianKernel | RationalQuadraticKernel, x: Tensor) -> tuple[Tensor, Tensor]:
        """The fast path, for functions of the distance; operations on all rows at once are outside of the loop."""
        assert kernel.bandwidth is not None
        scale, squares, weights = self.vectors(x)
        weights = x.new_ones(1, len(self)) if weights is None else weights
        scale = torch.ones_like(squares) if scale is None else scale
        scaled, fold, gaussian = weights * scale, 1.0, isinstance(kernel, GaussianKernel)
        d2 = x.square().sum(-1, keepdim=True) + squares  # less 2 x.m, which is subtracted block by block
        if gaussian:  # compute the exponent directly: five calls per block
            precision = kernel.bandwidth**-2
            fold = -0.5 * precision
            scaled, d2 = scaled * precision, d2.mul_(fold)
        total, (sizes, blocks) = torch.zeros_like(x), self.blocks(x)
        scale = scale * (-2 * fold)  # of the products
        parts = zip(d2.split(sizes, 1), scale.split(sizes), scaled.split(sizes, 1), blocks, strict=True)
        for block, block_scale, weight, rows in parts:
            block.addcmul_(x @ rows.mT, block_scale)
            slope = torch.exp(block) if gaussian else kernel.of_distances(block)[1]
            total.addmm_(slope.mul_(weight), rows)
        k, slope = kernel.of_distances(d2.div_(fold).clamp_min_(0))
        return total - (slope * weights).sum(-1, keepdim=True) * x, k

    def _radial_sum(self, kernel: Kernel, x: Tensor, products: Tensor) -> tuple[Tensor, Tensor]:
        """The fast path with known products: nothing but a product for each block of rows."""
        scale, squares, weights = self.vectors(x)
        d2 = (x.square().sum(-1, keepdim=True) + squares).sub_(products, alpha=2).clamp_min_(0)
        radial = kernel.of_distances(d2)
        assert radial is not None
        k, slope = radial
        slope = slope if weights is None else slope * weights
        of_stored = slope if scale is None else slope * scale
        total, (sizes, blocks) = slope.sum(-1, keepdim=True) * -x, self.blocks(x)
        for part, rows in zip(of_stored.split(sizes, 1), blocks, strict=True):
            total.addmm_(part, rows)
        return total, k

    def _product_gradient(self, kernel: Kernel, x: Tensor, centre: Tensor | None) -> tuple[Tensor, Tensor]:
        """The general path, for other kernels and for rows that must be centred."""
        scale, squares, weights = self.vectors(x)
        x = x if centre is None else x - centre
        total, along, k = torch.zeros_like(x), x.new_zeros(len(x), 1), x.new_empty(len(x), len(self))
        xx, start = x.square().sum(-1, keepdim=True), 0
        for size, rows in zip(*self.blocks(x), strict=True):
            part = slice(start, start + size)
            start += size
            w, yy = x.new_ones(1, size) if weights is None else weights[:, part], squares[part]
            if scale is not None:
                rows = rows * scale[part, None]
            if centre is not None:  # centring keeps the scatter of the samples behind a mean
                scatter = (yy - rows.square().sum(-1)).clamp_min(0) if self.means else 0
                rows = rows - centre
                yy = rows.square().sum(-1) + scatter
            found = kernel.of_products(x @ rows.mT, xx, yy)
            if found is None:
                k[:, part] = kernel(x, rows)
                total += kernel.vjp(x, rows, w.expand(len(x), size))
                continue
            k[:, part], by_product, by_square = found
            along += (w * by_square).sum(-1, keepdim=True)
            total.addmm_(w * by_product, rows)
        return total + 2 * along * x, k
