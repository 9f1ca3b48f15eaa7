"""Uncertainty of scores: intervals, comparisons of two sets, and dependence on sample size and bandwidth.

The bootstrap draws samples with replacement, which puts exact duplicates into the set and so lowers every diversity
score. Intervals here come from the jackknife, which only leaves samples out, and tests from permutations.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.functional.clusters import average_linkage, cut
from kspec_guidance.functional.inputs import KernelLike, check_pair_of_sets, check_samples, on_host
from kspec_guidance.kernels import GaussianKernel, Kernel, l2_normalize, median_bandwidth

__all__ = [
    "Comparison",
    "Curve",
    "Interval",
    "bandwidth_curve",
    "compare",
    "compare_paired",
    "convergence_curve",
    "distance_curve",
    "effective_number_interval",
    "jackknife",
    "jackknife_interval",
    "kid_interval",
]

Score = Callable[..., Tensor]

DISTANCES = [0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 1.0, 1.1, 1.2]  # between features of norm 1


@dataclass(frozen=True)
class Interval:
    """A score with its standard error and its confidence interval ``low`` to ``high`` at ``level``."""

    value: float
    low: float
    high: float
    standard_error: float
    level: float = 0.95

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


def _check_level(level: float) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, e.g. 0.95, got {level}")


def jackknife_interval(value: Tensor, left_out: Tensor, level: float = 0.95) -> Interval:
    """Interval from the scores ``left_out`` ``[g]`` of the set without each of g groups (Efron, Tibshirani 1993, ch. 11).

    ``se^2 = (g - 1) / g sum (s_i - mean s)^2``, times the Student quantile of ``g - 1`` degrees of freedom.

    Raises:
        ValueError: for a level outside (0, 1), fewer than two groups, or scores that are not finite.
    """
    from scipy.stats import t

    _check_level(level)
    g = len(left_out)
    if left_out.ndim != 1 or g < 2:
        raise ValueError(f"left_out must hold one score for each of at least 2 groups, got shape {list(left_out.shape)}")
    if not (math.isfinite(value) and bool(torch.isfinite(left_out).all())):
        raise ValueError("the score is NaN or infinite for the set or a part of it")
    se = math.sqrt((g - 1) / g * float((left_out - left_out.mean()).square().sum()))
    half = float(t.ppf((1 + level) / 2, g - 1)) * se
    return Interval(float(value), float(value) - half, float(value) + half, se, level)


def jackknife(score: Score, *sets: Tensor, groups: int = 20, level: float = 0.95, seed: int = 0) -> Interval:
    """Confidence interval of ``score(*sets)`` by leaving out one random group of rows at a time.

    Args:
        score: a function of one or more tensors with the same number of rows, e.g. ``F.vendi_score`` or
            ``lambda x, t: F.scendi_score(x, t)``.
        sets: ``[n, ...]`` each.
        groups: number of groups, at most n; each is left out once.
        level: of the interval.
        seed: of the grouping.

    Raises:
        ValueError: for fewer than 4 rows or groups, or sets of different lengths.

    >>> x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    >>> found = jackknife(F.vendi_score, x)
    >>> found.low < found.value < found.high
    True
    """
    n = len(sets[0])
    if any(len(s) != n for s in sets):
        raise ValueError(f"all sets must have the same number of rows, got {[len(s) for s in sets]}")
    groups = min(groups, n)
    if groups < 4:
        raise ValueError(f"an interval needs at least 4 rows and 4 groups, got {n} rows and {groups} groups")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    rests = [order[torch.arange(n) % groups != g] for g in range(groups)]
    left_out = torch.stack([score(*(s[rest] for s in sets)).detach().double() for rest in rests])
    return jackknife_interval(score(*sets).detach(), left_out, level)


def kid_interval(
    x: Tensor,
    y: Tensor,
    kernel: KernelLike | None = None,
    subsets: int = 50,
    subset_size: int = 500,
    level: float = 0.95,
    seed: int = 0,
) -> Interval:
    """KID with a confidence interval: :func:`~kspec_guidance.functional.kid`, and the error of its mean.

    The variance over subsets of a share f of a set, times ``f / (1 - f)``, estimates that of the whole set (Shao, Wu 1989),
    to which the error of averaging ``subsets`` of them is added. The interval is too wide for sets of equal distribution,
    where the variance decreases as ``n^-2``.

    Args:
        x: features ``[n, d]``, n of at least 4.
        y: features ``[m, d]``, m of at least 4.
        kernel: cubic polynomial by default.
        subsets: number of subsets, at least 2.
        subset_size: samples of each set in a subset; at most half of the set.
        level: of the interval.
        seed: of the subsets.

    Raises:
        ValueError: as ``kid``, for fewer than two subsets, or a level outside (0, 1).
    """
    from scipy.stats import t

    _check_level(level)
    if subsets < 2:
        raise ValueError(f"an interval needs at least 2 subsets, got {subsets}")
    value, deviation = F.kid(x, y, kernel, subsets, subset_size, seed)
    used = max(min(subset_size, len(z) // 2) / len(z) for z in (x, y))
    se = float(deviation) * math.sqrt(used / (1 - used) + 1 / subsets)
    half = float(t.ppf((1 + level) / 2, subsets - 1)) * se
    return Interval(float(value), float(value) - half, float(value) + half, se, level)


def effective_number_interval(sizes: Sequence[int] | Tensor, level: float = 0.95) -> Interval:
    """Effective number of groups, as :func:`~kspec_guidance.functional.effective_number`, with a confidence interval.

    The interval is that of the number in other sets of as many samples from the same source, with the same groups: errors
    of the grouping itself are not in it. It is the jackknife's, on the logarithm. Where the jackknife finds next to
    nothing, as for groups of equal sizes, it has the width that the number of pairs within groups leaves uncertain; and if
    all samples are in one group, or each in its own, it ends where such a set would be as rare as ``(1 - level) / 2``. In
    simulations (tests/test_statistics.py) it covers the expected number in 91% to 100% of the cases.

    Args:
        sizes: numbers of samples in each group.
        level: of the interval.

    Raises:
        ValueError: for fewer than 3 samples, or a level outside (0, 1).

    >>> found = effective_number_interval([10, 10, 10])
    >>> round(found.low, 1), found.value, round(found.high, 1)
    (2.6, 3.0, 3.4)
    """
    from scipy.stats import t

    _check_level(level)
    value, c = F.effective_number(sizes), torch.as_tensor(sizes, dtype=torch.float64)
    c = c[c > 0]
    n = float(c.sum())
    if n < 3:
        raise ValueError(f"an interval needs at least 3 samples, got {n:.0f}")
    logs = 2 * math.log(n - 1) - (c.square().sum() - 2 * c + 1).log()  # without one sample of each group
    jackknifed = (n - 1) / n * float((c * (logs - (c * logs).sum() / n).square()).sum())
    pairs = float((c * (c - 1)).sum()) / (n * (n - 1))
    triples = float((c * (c - 1) * (c - 2)).sum()) / (n * (n - 1) * (n - 2))
    second_order = 2 * (pairs - 2 * triples + pairs**2) / n**2 * value**2
    error = math.sqrt(max(jackknifed, second_order, 0.0))
    half, tail = float(t.ppf((1 + level) / 2, n - 1)) * error, (1 - level) / 2
    low, high = value * math.exp(-half), value * math.exp(half)
    if len(c) == n:  # no pair was found, so that their expected number is at most -log(tail)
        low = n**2 / (n - 2 * math.log(tail))
    if len(c) == 1:  # no other group was found, so that their share is at most this
        other = 1 - tail ** (1 / n)
        high = 1 / ((1 - other) ** 2 + other**2)
    return Interval(value, max(1.0, low), min(n, high), value * error, level)


@dataclass(frozen=True)
class Comparison:
    """Scores of two sets, and the p-value of their difference.

    Attributes:
        a, b: the scores.
        p_value: probability of a difference at least as large if both sets came from one distribution.
        n: sizes of the sets.
        test: which test.
    """

    a: float
    b: float
    p_value: float
    n: tuple[int, int]
    test: str

    @property
    def difference(self) -> float:
        """``b - a``."""
        return self.b - self.a

    def __str__(self) -> str:
        return f"{self.a:.3f} and {self.b:.3f}, difference {self.difference:+.3f}, p = {self.p_value:.3f} ({self.test})"


def compare(
    a: Tensor,
    b: Tensor,
    score: Score | None = None,
    matched: bool = False,
    permutations: int = 200,
    seed: int = 0,
) -> Comparison:
    """Permutation test of whether two sets differ in a score: rows are reassigned to two sets of the same sizes.

    Args:
        a: ``[n, d]``.
        b: ``[m, d]``.
        score: a function of one set; the Vendi score with the cosine kernel by default. Give kernels a bandwidth: an unset
            one would be fitted to each set separately.
        matched: first subsample the larger set to the size of the smaller one.
        permutations: number of permutations; the smallest p-value is ``1 / (permutations + 1)``.
        seed: of all draws.

    Raises:
        ValueError: for empty sets, different widths, fewer than one permutation, or scores that are not finite.

    Warns:
        UserWarning: for sets of different sizes without ``matched``, since diversity scores increase with it.
    """
    check_pair_of_sets(a, b, "b")
    if permutations < 1:
        raise ValueError(f"permutations must be at least 1, got {permutations}")
    score, g = score or F.vendi_score, torch.Generator().manual_seed(seed)
    n = min(len(a), len(b))
    if matched:
        a, b = (z[torch.randperm(len(z), generator=g)[:n]] for z in (a, b))
    elif len(a) != len(b):
        warnings.warn(
            f"the sets hold {len(a)} and {len(b)} samples, and diversity scores increase with size; pass matched=True",
            stacklevel=2,
        )
    both = torch.cat([a, b.to(a)])

    def finite(rows: Tensor) -> float:
        value = float(score(rows))
        if not math.isfinite(value):
            raise ValueError(f"the score is {value} for a set of {len(rows)} rows; a test needs finite scores")
        return value

    first, second = finite(a), finite(b)
    extreme = 0
    for _ in range(permutations):
        order = torch.randperm(len(both), generator=g)
        difference = finite(both[order[: len(a)]]) - finite(both[order[len(a) :]])
        extreme += abs(difference) >= abs(first - second) - 1e-12
    p = (1 + extreme) / (1 + permutations)
    return Comparison(first, second, p, (len(a), len(b)), f"{permutations} permutations of rows")


def compare_paired(a: Sequence[float], b: Sequence[float], permutations: int = 10_000, seed: int = 0) -> Comparison:
    """Sign-flip permutation test of whether paired scores, such as one per prompt, differ in the mean.

    Exact when there are at most ``permutations`` sign patterns.

    Raises:
        ValueError: for lists of different lengths, empty lists, or scores that are not finite.
    """
    x, y = torch.tensor(list(a), dtype=torch.float64), torch.tensor(list(b), dtype=torch.float64)
    if len(x) != len(y) or not len(x):
        raise ValueError(f"paired scores must be two non-empty lists of the same length, got {len(x)} and {len(y)}")
    if not (torch.isfinite(x) & torch.isfinite(y)).all():
        raise ValueError("paired scores must be finite; leave out pairs with NaN or infinite values")
    d = y - x
    if 2 ** len(d) <= permutations:
        bits = torch.arange(2 ** len(d))[:, None] >> torch.arange(len(d)) & 1
        draws, spare, test = (1 - 2 * bits).double() @ d, 0, "all sign patterns"
    else:
        g = torch.Generator().manual_seed(seed)
        signs = torch.randint(0, 2, (permutations, len(d)), generator=g).double() * 2 - 1
        draws, spare, test = signs @ d, 1, f"{permutations} sign patterns"
    extreme = int((draws.abs() >= d.sum().abs() - 1e-12).sum())
    p = (spare + extreme) / (spare + len(draws))
    return Comparison(float(x.mean()), float(y.mean()), p, (len(x), len(y)), test)


@dataclass(frozen=True)
class Curve:
    """Scores as functions of ``x``: their mean and standard deviation at each value, by name of the score.

    Subsets of more than half of a set overlap: their deviation is below that of new samples, and 0 for the whole set.
    """

    axis: str
    x: list[float]
    mean: dict[str, list[float]]
    spread: dict[str, list[float]]


def _curve(axis: str, xs: Sequence[float], draws: list[list[dict[str, float]]]) -> Curve:
    names = list(draws[0][0])
    values = {n: [torch.tensor([d[n] for d in at]) for at in draws] for n in names}
    mean = {n: [float(v.mean()) for v in at] for n, at in values.items()}
    spread = {n: [float(v.std(correction=0)) for v in at] for n, at in values.items()}
    return Curve(axis, [float(v) for v in xs], mean, spread)


def convergence_curve(
    x: Tensor,
    kernel: Kernel | None = None,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    truncation: int | None = None,
    seed: int = 0,
) -> Curve:
    """Vendi, truncated Vendi and RKE of random subsets against their size: has the score converged?

    The Vendi score may keep increasing with the number of samples; RKE and the truncated score converge.

    Args:
        x: ``[n, d]``.
        kernel: cosine by default; an unset bandwidth is fitted once, to all samples.
        sizes: of the subsets; by default 8, 16, ... and n.
        repeats: number of subsets of each size.
        truncation: eigenvalues of the truncated score, ``max(4, n // 16)`` by default.
        seed: of the subsets.

    Raises:
        ValueError: for sizes outside 1..n.
    """
    x = check_samples(x)
    n = len(x)
    if sizes is None:
        sizes = sorted({*(2**k for k in range(3, 40) if 2**k < n), n})
    if not sizes or min(sizes) < 1 or max(sizes) > n:
        raise ValueError(f"sizes must lie in 1..{n}, the number of samples, got {list(sizes)}")
    kernel = None if kernel is None else kernel.fit(x)
    t, g = truncation or max(4, n // 16), torch.Generator().manual_seed(seed)
    draws = []
    for size in sizes:
        at = []
        for _ in range(1 if size == n else repeats):
            part = x[torch.randperm(n, generator=g)[:size]]
            at.append(
                {
                    "Vendi": float(F.vendi_score(part, kernel)),
                    f"truncated Vendi, t = {t}": float(F.vendi_score(part, kernel, truncation=t)),
                    "RKE": float(F.rke_score(part, kernel)),
                }
            )
        draws.append(at)
    return _curve("samples", sizes, draws)


def distance_curve(x: Tensor, distances: Sequence[float] = DISTANCES) -> Curve:
    """Effective number of kinds against the distance up to which images are of one kind.

    A flat stretch says that the kinds are far apart, so that their number hardly depends on the distance.

    Args:
        x: features ``[n, d]``, at most a few thousand rows.
        distances: as for :func:`~kspec_guidance.functional.kinds`.
    """
    tree = average_linkage(l2_normalize(on_host(check_samples(x))))
    draws = [[{"different": F.effective_number(cut(tree, d).bincount())}] for d in distances]
    return _curve("distance", distances, draws)


def bandwidth_curve(x: Tensor, factors: Sequence[float] = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0)) -> Curve:
    """Vendi and RKE with Gaussian kernels of several bandwidths, as multiples of the median distance.

    A score near 1 or near n reflects the bandwidth rather than the set.

    Args:
        x: ``[n, d]``.
        factors: of the median distance.
    """
    x = check_samples(x)
    base = median_bandwidth(x)
    kernels = [GaussianKernel(base * f) for f in factors]
    draws = [[{"Vendi": float(F.vendi_score(x, k)), "RKE": float(F.rke_score(x, k))}] for k in kernels]
    return _curve("bandwidth", [base * f for f in factors], draws)
