"""Maximum mean discrepancy (MMD), KID and CMMD."""

import math

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import (
    FeatureMap,
    KernelLike,
    as_kernel,
    check_matrix,
    check_pair_of_sets,
    check_widths,
    map_rows,
    on_host,
    sum_over_pairs,
)
from kspec_guidance.kernels import GaussianKernel, Kernel, PolynomialKernel, l2_normalize
from kspec_guidance.kernels.base import FunctionKernel
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.utils.precision import full_precision

__all__ = ["cmmd", "kid", "mmd"]

BLOCK_ROWS = 512  # rows of the kernel matrix of all samples that are held at once
PART_ROWS = 1024  # rows and columns of a kernel matrix that are held at once
SINGLE_ROWS = 256  # of a subset, from which on kernels in float32 save time
ROUNDING_ROWS, ROUNDING_COLUMNS = 8, 2048  # of each set, of which the rounding of float32 is measured
ROUNDING_SHARE = 0.01  # of the standard deviation of the subsets that rounding may be
NOT_FINITE = "{!r} gives NaN or infinite values for these samples; rescale them"
CMMD_BANDWIDTH, CMMD_SCALE = 10.0, 1000.0


def mmd(
    x: Tensor,
    y: Tensor,
    kernel: KernelLike | None = None,
    unbiased: bool = True,
    feature_map: FeatureMap | None = None,
    squared: bool = True,
) -> Tensor:
    """Maximum mean discrepancy ``[...]`` between two sets of samples: its square by default.

    Gretton et al. (2012), equation 3 (unbiased; can be negative) or 5 (biased). With ``PolynomialKernel()`` on Inception
    features the unbiased value is KID.

    Args:
        x: ``[..., n, d]``.
        y: ``[..., m, d]``.
        kernel: cubic polynomial by default; an unset bandwidth is the median distance over both sets.
        unbiased: equation 3 instead of 5.
        feature_map: a map whose inner products are the kernel, instead of ``kernel``: O(n + m) time.
        squared: False returns the discrepancy itself, 0 where the unbiased square is below 0.

    Raises:
        ValueError: for different widths, or fewer than two samples in a set for the unbiased estimate.
    """
    x, y = check_pair_of_sets(x, y, "y")
    n, m = x.shape[-2], y.shape[-2]
    if unbiased and min(n, m) < 2:
        raise ValueError(f"the unbiased MMD needs at least two samples in each set, got {n} and {m}; pass unbiased=False")
    if feature_map is not None:
        if isinstance(feature_map, Tensor):
            raise ValueError("feature_map must be a function for mmd, since it maps two sets; got rows")
        a, b = map_rows(feature_map, x), map_rows(feature_map, y)
        sums = a.sum(-2), a.square().sum((-2, -1)), n, b.sum(-2), b.square().sum((-2, -1)), m
        mmd2 = from_sums(*sums, unbiased)
        return mmd2 if squared else mmd2.clamp_min(0).sqrt()
    x, y = on_host(x), on_host(y)
    kernel = as_kernel(kernel or PolynomialKernel()).fit(torch.cat([x, y], dim=-2).detach())
    mmd2 = _from_kernel(x, y, kernel, unbiased)
    if not torch.isfinite(mmd2).all():
        raise ValueError(NOT_FINITE.format(kernel))
    return mmd2 if squared else mmd2.clamp_min(0).sqrt()


def _from_kernel(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> Tensor:
    """Squared MMD ``[...]``; kernels in the dtype of the rows, a block of a matrix at a time, and sums in float64."""

    def total(a: Tensor, b: Tensor | None) -> Tensor:
        k = kernel(a, b)
        own = k.diagonal(dim1=-2, dim2=-1).sum(-1, dtype=torch.float64) if unbiased and b is None else 0
        return k.sum((-2, -1), dtype=torch.float64) - own

    def mean_within(z: Tensor) -> Tensor:
        n = z.shape[-2]
        return sum_over_pairs(total, z, PART_ROWS) / (n * (n - 1) if unbiased else n**2)

    pairs = [(a, b) for a in x.split(PART_ROWS, dim=-2) for b in y.split(PART_ROWS, dim=-2)]
    between = torch.stack([total(a, b) for a, b in pairs]).sum(0) / (x.shape[-2] * y.shape[-2])
    return mean_within(x) + mean_within(y) - 2 * between


def from_sums(a: Tensor, aa: Tensor, n: int, b: Tensor, bb: Tensor, m: int, unbiased: bool) -> Tensor:
    """Squared MMD from sums of feature rows ``[..., D]`` and of their squared norms ``[...]``."""

    def own(total: Tensor, squares: Tensor, count: int) -> Tensor:
        s = total.square().sum(-1)
        return (s - squares) / (count * (count - 1)) if unbiased else s / count**2

    return own(a, aa, n) + own(b, bb, m) - 2 * (a * b).sum(-1) / (n * m)


def kid(
    x: Tensor, y: Tensor, kernel: KernelLike | None = None, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the unbiased MMD over random subsets (Binkowski et al. 2018, arXiv 1801.01401).

    With the cubic polynomial kernel, the default, this is the kernel inception distance of the given features.

    Large subsets of one set overlap, and their spread is smaller than that of new samples: so a subset holds at most half
    of a set. The standard deviation over such halves estimates the standard error of the MMD of the whole sets (the
    delete-half jackknife: Shao, Wu 1989); over smaller subsets it is the spread of ``subset_size`` samples, as in
    torch-fidelity and torchmetrics. If ``subset_size`` reaches the size of both sets, the mean is that of these packages,
    the MMD of the whole sets. :func:`kspec_guidance.statistics.kid_interval` gives a confidence interval.

    Kernels of float32 features are in float32, summed in float64, where their rounding is negligible: at most 1% of the
    standard deviation of the subsets. It is measured, as four times the largest error of a mean of a row of the kernel
    matrices, over the 8 rows of largest norm and 8 evenly spaced rows of each set. Everything else is in float64: features
    in float64, gradients, subsets below 256 samples, plain functions, and what exceeds this bound.

    Args:
        x: features ``[n, d]``, n of at least 4.
        y: features ``[m, d]``, m of at least 4.
        kernel: cubic polynomial by default.
        subsets: number of subsets; the standard deviation of one is NaN.
        subset_size: samples of each set in a subset, at least 2, drawn without replacement; at most half of the set.
        seed: seed of the generator that draws the subsets.

    Raises:
        ValueError: for fewer than 4 samples in a set, fewer than one subset, or a subset of fewer than 2.
    """
    if subsets < 1:
        raise ValueError(f"subsets must be at least 1, got {subsets}")
    if subset_size < 2:
        raise ValueError(f"subset_size must be at least 2, since the MMD is unbiased; got {subset_size}")
    x, y = check_matrix(x), check_matrix(y, "y")
    check_widths(x, y, "y")
    if min(len(x), len(y)) < 4:
        raise ValueError(f"subsets need at least 4 samples in each set, got {len(x)} and {len(y)}; use mmd")
    kernel = as_kernel(kernel or PolynomialKernel())
    if kernel.open:  # other kernels need no copy of all rows
        kernel = kernel.fit(torch.cat([on_host(z.detach()) for z in (x, y)]))
    g = torch.Generator().manual_seed(seed)
    draws = [[torch.randperm(len(z), generator=g)[: min(subset_size, len(z) // 2)] for z in (x, y)] for _ in range(subsets)]
    values = _in_single_precision(x, y, kernel, draws)
    if values is None:
        values = _mmd_of_subsets(on_host(x), on_host(y), kernel, draws)
    if not torch.isfinite(values).all():
        raise ValueError(NOT_FINITE.format(kernel))
    whole = subset_size >= max(len(x), len(y))
    spread = values.std() if subsets > 1 else values.new_tensor(math.nan)
    return mmd(x, y, kernel) if whole else values.mean(), spread


def _in_single_precision(x: Tensor, y: Tensor, kernel: Kernel, draws: list[list[Tensor]]) -> Tensor | None:
    """:func:`_mmd_of_subsets` with kernels in float32; None where :func:`kid` has them in float64."""
    tracked = torch.is_grad_enabled() and (x.requires_grad or y.requires_grad)
    small = len(draws) < 2 or min(len(z) for z in draws[0]) < SINGLE_ROWS
    if tracked or small or not x.dtype == y.dtype == torch.float32 or isinstance(kernel, FunctionKernel):
        return None
    with full_precision(torch.device("cpu")):
        x, y = x.cpu(), y.cpu()
        rounding = _rounding(x, y, kernel)
        if not math.isfinite(rounding):
            return None
        values = _mmd_of_subsets(x, y, kernel, draws)
    return values if rounding <= ROUNDING_SHARE * float(values.std()) else None


def _rounding(x: Tensor, y: Tensor, kernel: Kernel) -> float:
    """Bound of what float32 changes an MMD by: the mean error of a row of kernels, the largest found, in all four means."""
    errors = []
    for a in (x, y):
        longest = torch.linalg.vector_norm(a, dim=1).topk(min(ROUNDING_ROWS, len(a))).indices
        rows = a[torch.cat([longest, evenly_spaced(len(a), ROUNDING_ROWS)])]
        for b in (x, y):
            columns = b[evenly_spaced(len(b), ROUNDING_COLUMNS)]
            error = kernel(rows, columns).double() - kernel(rows.double(), columns.double())
            errors.append(error.mean(1).abs().amax())
    return 4 * float(torch.stack(errors).amax())


def _mmd_of_subsets(x: Tensor, y: Tensor, kernel: Kernel, draws: list[list[Tensor]]) -> Tensor:
    """The unbiased squared MMD ``[s]`` of pairs of subsets of equal sizes, summed in float64."""
    if len(draws) * sum(len(z) for z in draws[0]) ** 2 > (len(x) + len(y)) ** 2:
        return _in_one_pass(x, y, kernel, draws)
    return torch.stack([_from_kernel(x[i], y[j], kernel) for i, j in draws])


def _in_one_pass(x: Tensor, y: Tensor, kernel: Kernel, draws: list[list[Tensor]]) -> Tensor:
    """:func:`_mmd_of_subsets` from one pass over the kernel of all rows.

    Less work than a kernel matrix for each pair where the subsets together hold more pairs of rows than there are. Of the
    symmetric matrix the part on and above the diagonal is computed, some rows at a time.
    """
    z, n, s = torch.cat([x, y]), len(x), len(draws)
    chosen = torch.zeros(2, len(z), s, dtype=torch.float64)  # whether a row is in the subset of x, or of y
    for k, (i, j) in enumerate(draws):
        chosen[0, i, k] = 1
        chosen[1, n + j, k] = 1
    own, cross = chosen.new_zeros(2, s), chosen.new_zeros(s)
    for start in range(0, len(z), BLOCK_ROWS):
        rows = slice(start, start + BLOCK_ROWS)
        block, of_rows = kernel(z[rows]).double(), chosen[:, rows]
        sums = block @ of_rows
        own = own + (of_rows * sums).sum(1) - block.diagonal() @ of_rows
        cross = cross + (of_rows[0] * sums[1]).sum(0)
        if rows.stop < len(z):
            sums = kernel(z[rows], z[rows.stop :]).double() @ chosen[:, rows.stop :]
            own = own + 2 * (of_rows * sums).sum(1)
            cross = cross + (of_rows * sums.flip(0)).sum((0, 1))
    a, b = (len(draw) for draw in draws[0])
    return own[0] / (a * (a - 1)) + own[1] / (b * (b - 1)) - 2 * cross / (a * b)


def cmmd(x: Tensor, y: Tensor, unbiased: bool = False) -> Tensor:
    """CLIP maximum mean discrepancy (Jayasumana et al. 2024, arXiv 2401.09603): 1000 times the squared MMD of features.

    With the Gaussian kernel of bandwidth 10 on features of norm 1, as in the code of its authors, whose estimate is the
    biased one. It is CMMD for features of ViT-L/14 at 336 pixels.

    Args:
        x: features ``[..., n, d]``, scaled to norm 1 here.
        y: features ``[..., m, d]``.
        unbiased: as for :func:`mmd`; the published values are biased.

    Returns:
        ``[...]``; the biased estimate is in 0..40, which is that of opposite points.

    Raises:
        ValueError: as :func:`mmd`.

    >>> round(cmmd(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]])).item(), 4)  # 2000 (1 - exp(-2 / 200))
    19.9003
    """
    x, y = (l2_normalize(on_host(z)) for z in check_pair_of_sets(x, y, "y"))
    return CMMD_SCALE * mmd(x, y, GaussianKernel(CMMD_BANDWIDTH), unbiased)
