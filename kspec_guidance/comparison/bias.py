"""Diversity that a generator lacks: scores of its samples against those of held-out data, at equal numbers."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix, check_pair_of_sets, on_host
from kspec_guidance.statistics import Curve, Interval, convergence_curve, jackknife

__all__ = ["DiversityGap", "ScoreGap", "diversity_gap"]


@dataclass(frozen=True)
class ScoreGap:
    """A score of generated samples and of held-out data.

    Attributes:
        generated, held_out: the scores.
        gap: ``held_out - generated``, with its interval; above 0 the generator lacks diversity.
    """

    generated: float
    held_out: float
    gap: Interval

    @property
    def is_sure(self) -> bool:
        """Whether the interval does not contain 0."""
        return self.gap.low > 0 or self.gap.high < 0

    def __str__(self) -> str:
        return f"{self.generated:.3f} generated, {self.held_out:.3f} held out, gap {self.gap}"


@dataclass(frozen=True)
class DiversityGap:
    """Diversity of generated samples against held-out data.

    Attributes:
        n: samples of each set that were scored.
        scores: by name: ``vendi``, and ``rke``, the unbiased estimate of the distribution's score; the latter is left out
            where no two samples of a set are alike, so that it is infinite.
        generated_curve, held_out_curve: scores against the number of samples.
    """

    n: int
    scores: dict[str, ScoreGap]
    generated_curve: Curve
    held_out_curve: Curve


def diversity_gap(
    generated: Tensor,
    held_out: Tensor,
    kernel: KernelLike | None = None,
    sizes: Sequence[int] | None = None,
    repeats: int = 5,
    level: float = 0.95,
    seed: int = 0,
) -> DiversityGap:
    """How much less diverse generated samples are than held-out data (diversity bias, arXiv 2602.14682).

    The Vendi score grows with the number of samples, without a law that extrapolates it: so both sets are compared at the
    size of the smaller one, and as curves. For RKE ``E |K|_F^2 / n^2 = 1/n + (1 - 1/n) s`` exactly, so the unbiased
    estimate ``1 / s`` is used, of the same samples. Held-out means: not the data the generator was trained on, which it may
    have copied.

    Intervals are by the jackknife on each set; the variances add up, since the sets are independent.

    Args:
        generated: features ``[n, d]``.
        held_out: features of other data of the same kind ``[m, d]``.
        kernel: cosine by default; an unset bandwidth is fitted once, to both sets.
        sizes: of the subsets of the curves; by default 8, 16, ... and n.
        repeats: subsets of each size.
        level: of the intervals.
        seed: of the subsets and groups.

    Raises:
        ValueError: for fewer than 8 samples in a set, different widths, NaN, or sizes above those of the smaller set.

    >>> g = torch.Generator().manual_seed(0)
    >>> data, few = (torch.eye(10)[torch.randint(modes, (200,), generator=g)] for modes in (10, 5))
    >>> found = diversity_gap(few, data)
    >>> vendi = found.scores["vendi"]
    >>> print(round(vendi.generated), round(vendi.held_out), vendi.is_sure)
    5 10 True
    """
    x, y = check_pair_of_sets(check_matrix(generated, "generated"), check_matrix(held_out, "held_out"), "held_out")
    x, y = on_host(x.detach()), on_host(y.detach())
    n = min(len(x), len(y))
    if n < 8:
        raise ValueError(f"a gap with an interval needs at least 8 samples in each set, got {len(x)} and {len(y)}")
    k = as_kernel(kernel).fit(torch.cat([x, y]))
    g = torch.Generator().manual_seed(seed)
    x, y = (z[torch.randperm(len(z), generator=g)[:n]] for z in (x, y))
    curves = [convergence_curve(z, k, sizes, repeats, seed=seed) for z in (x, y)]
    scores = {"vendi": lambda z: F.vendi_score(z, k), "rke": lambda z: F.rke_score(z, k, unbiased=True)}
    found = {}
    for name, score in scores.items():
        if not all(math.isfinite(float(score(z))) for z in (x, y)):
            continue
        a, b = (jackknife(score, z, level=level, seed=seed) for z in (x, y))
        found[name] = ScoreGap(a.value, b.value, _difference(a, b))
    return DiversityGap(n, found, *curves)


def _difference(a: Interval, b: Interval) -> Interval:
    """``b - a`` of independent intervals: their half-widths add in squares."""
    value, se = b.value - a.value, math.hypot(a.standard_error, b.standard_error)
    half = math.hypot(a.high - a.value, b.high - b.value)
    return Interval(value, value - half, value + half, se, a.level)
