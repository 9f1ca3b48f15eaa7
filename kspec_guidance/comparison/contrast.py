"""KODA: what one embedding groups and another does not."""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from scipy.linalg import eigh
from scipy.special import log_ndtr
from torch import Tensor

from kspec_guidance.comparison.joint import (
    JointKernel,
    Kernels,
    Modalities,
    check_counts,
    joint_kernels,
    modalities_of,
    sides,
    simplest_turn,
    upright,
)
from kspec_guidance.utils.arguments import is_number

__all__ = ["Koda", "koda"]

TOLERANCE = 1e-11  # of the dual, relative to its value
STEPS = 100  # of the dual, at most
ROUNDING = 1e-12
ALIKE = 4.0  # alike samples that a direction must hold
COHERENCE = 0.3  # mean similarity along a direction, in standard deviations of all similarities, that it must have
CONTRAST = 1.5  # alike samples, and coherence, by A over those by B that it must have
NOT_NORMAL = 1.159  # Anderson-Darling statistic that a normal sample exceeds with probability 0.005


@dataclass(frozen=True)
class Koda:
    """Directions over the samples that are coherent by embedding A while their coherence by B is bounded.

    Attributes:
        vectors: unit vectors ``[k, n]``, orthogonal; k is at most ``directions``.
        strength_a, strength_b: ``x' K_A x`` and ``x' K_B x`` of each ``[k]``, with kernel matrices divided by n. Times n
            they count samples that are alike: m for a group of m equal ones, 1 for scattered ones.
        gap: how far ``strength_a`` may be below the optimum, by duality ``[k]``.
        lam: the multiplier of the bound ``[k]``.
        eps: the bound on ``strength_b``.
        coherence_a, coherence_b: mean similarity over pairs of samples along each direction, in standard deviations of all
            similarities of the embedding ``[k]``.
        positive, negative: samples on the two sides of each direction, the strongest first. If both have some, A separates
            these two groups and B does not; if one is empty, A has a group that B scatters.
        by_modality: for several modalities, the strengths of A and of B by each one's own kernel, ``[k, 2]``.
        modality: the modality in which A sees each direction and B does not: its name, or ``joint`` if no modality alone
            shows it; empty for a single modality.
        stopped: why there are fewer directions than were asked for; empty otherwise.
    """

    vectors: Tensor
    strength_a: Tensor
    strength_b: Tensor
    gap: Tensor
    lam: Tensor
    eps: float
    coherence_a: Tensor
    coherence_b: Tensor
    positive: list[list[int]]
    negative: list[list[int]]
    by_modality: dict[str, Tensor] = field(default_factory=dict)
    modality: list[str] = field(default_factory=list)
    stopped: str = ""

    def __len__(self) -> int:
        return len(self.vectors)


@torch.no_grad()
def koda(
    a: Modalities,
    b: Modalities,
    directions: int = 3,
    eps: float = 1.05,
    eps_quantile: float | None = None,
    kernel_a: Kernels = None,
    kernel_b: Kernels = None,
    features: int | None = None,
    rotate: bool = False,
    keep_noise: bool = False,
    seed: int = 0,
) -> Koda:
    """Groups of samples that embedding A sees and embedding B does not (KODA, ICML 2026, arXiv 2606.04180).

    ``max x' K_A x`` over unit vectors x with ``x' K_B x <= eps / n``, where both kernel matrices have a unit diagonal and
    are divided by n. Further directions are orthogonal to those before. Samples that B scatters completely have
    ``x' K_B x = 1 / n``: only with ``eps`` of 1 or more can a group be found that A sees and B scatters; below it, only
    groups that A separates and B merges. The paper's rule for the bound is ``eps_quantile=0.5``.

    The optimum is exact: its dual ``min over lam >= 0 of lambda_max(K_A - lam K_B) + lam eps / n`` has no gap (S-lemma),
    and is convex in one number. Where the constraint jumps over the bound, no single eigenvector is optimal, and two are
    combined. ``gap`` certifies it.

    A direction counts as noise, and ends the search, unless (1) it holds at least 4 alike samples by A,
    ``n strength_a >= 4``, and 1.5 times as many as by B: a loose bound leaves parts of groups over, which B sees as well;
    (2) its coherence by A is 0.3 standard deviations of A's similarities or more, and 1.5 times that by B; and (3) its
    entries differ from a normal sample (Anderson-Darling, p < 0.005): most directions of samples without groups look like
    one (Diaconis, Freedman 1984). In simulations (benchmarks/comparison.py, ``eps`` of 1.05) of sets without groups, and
    of groups that both see, at most 2% had a direction in 32 and more dimensions; in 16, up to 3% with the cosine kernel
    and up to 71% with a narrow one; in 8, up to 52%. It missed at most 2% of groups of 50, and 4% to 48% of groups of ten
    with the cosine kernel, the more the noisier.

    Args:
        a: rows ``[n, d]`` of the samples by embedding A; or rows by name of modality, such as ``image`` and ``text``, whose
            joint kernel is the product of theirs.
        b: the same samples by embedding B, ``[n, e]``, with the same modalities.
        directions: number of directions, at most.
        eps: bound on the coherence by B, in multiples of ``1 / n``.
        eps_quantile: the bound as a quantile of the eigenvalues of ``K_B`` instead (of its features' second moment, where
            there are features), in [0, 1].
        kernel_a: kernel of A, or one for each modality; cosine by default.
        kernel_b: kernel of B.
        features: number of random features of each embedding instead of exact kernels: O(n r^2 + r^3) instead of O(n^3).
            The cosine kernel of one modality needs none.
        rotate: turn the directions that were found, in their span, to their simplest form (quartimax; Neuhaus, Wrigley
            1954), unless one would then count as noise. Groups of like strength are mixed otherwise. The bound then holds
            for the mean of the directions, and ``lam`` and ``gap`` stay those of the search.
        keep_noise: return all directions, also those that count as noise.
        seed: of random features.

    Raises:
        TypeError: for what is no tensor, or no kernel.
        ValueError: for different numbers of samples, different modalities, values that are not finite, counts below 1, or a
            bound that no direction meets.

    >>> z = torch.eye(3).repeat_interleave(10, 0)
    >>> found = koda(z, torch.eye(3)[[0, 0, 2]].repeat_interleave(10, 0))  # B merges the first two groups
    >>> len(found), round(float(found.strength_a[0]), 6), sorted(found.positive[0] + found.negative[0]) == list(range(20))
    (1, 0.333333, True)
    """
    check_counts(directions=directions)
    first, second = joint_kernels(a, b, kernel_a, kernel_b, features, seed)
    n, bound = first.n, _bound(second, eps, eps_quantile)
    basis, form_a, form_b = _reduced(first, second)
    vectors, multipliers, gaps, stopped = torch.empty(0, n, dtype=torch.float64), list[float](), list[float](), ""
    while len(vectors) < directions:
        solved = _direction(form_a, form_b, bound) if len(form_a) else None
        if solved is None:
            least = float(np.linalg.eigvalsh(form_b)[0]) if len(form_b) else math.inf
            if not len(vectors):
                raise ValueError(
                    f"no direction has x' K_B x of at most {bound:.3g}, which is {n * bound:.3g} / n: the least is "
                    f"{least:.3g}, {n * least:.3g} / n; give a larger eps"
                )
            stopped = f"no further direction has a strength by the other embedding of at most {bound:.3g}"
            break
        y, lam, gap = solved
        x = torch.from_numpy(basis @ y)[None]
        noise = "" if keep_noise else _why_noise(x, first, second)
        if noise:
            stopped = f"direction {len(vectors) + 1} is noise: {noise}"
            break
        vectors = torch.cat([vectors, x])
        multipliers, gaps = [*multipliers, lam], [*gaps, gap]
        basis, form_a, form_b = _deflated(basis, form_a, form_b, y)
    if rotate and len(vectors) > 1:
        turned = simplest_turn(vectors) @ vectors
        if keep_noise or not any(_why_noise(x, first, second) for x in turned.split(1)):
            vectors = turned[first.strength(turned).argsort(descending=True, stable=True)]
    vectors = upright(vectors)
    by_modality, named = modalities_of(vectors, first, second)
    return Koda(
        vectors, first.strength(vectors), second.strength(vectors), torch.tensor(gaps, dtype=torch.float64),
        torch.tensor(multipliers, dtype=torch.float64), bound, _coherence(vectors, first), _coherence(vectors, second),
        *sides(vectors), by_modality, named, stopped,
    )  # fmt: skip


def _bound(kernel: JointKernel, eps: float, quantile: float | None) -> float:
    if quantile is not None:
        if not 0 <= quantile <= 1:
            raise ValueError(f"eps_quantile must lie in 0..1, got {quantile}")
        return float(torch.linalg.eigvalsh(kernel.smaller).clamp_min(0).quantile(quantile))
    if not is_number(eps) or not 0 <= eps < math.inf:
        raise ValueError(f"eps must be at least 0 and finite, a multiple of 1 / n, got {eps!r}")
    return eps / kernel.n


Array = np.ndarray[Any, Any]


def _reduced(first: JointKernel, second: JointKernel) -> tuple[Array, Array, Array]:
    """An orthonormal basis ``[n, k]``, and both kernels over n in it ``[k, k]``.

    With rows of fewer features than samples it spans them, and has one vector outside, where both kernels are 0.
    """
    n = first.n
    if first.rows is None or second.rows is None or first.rows.shape[1] + second.rows.shape[1] >= n:
        return np.eye(n), (first.matrix / n).numpy(), (second.matrix / n).numpy()
    outside = torch.randn(n, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.cat([first.rows, second.rows], 1)
    basis = torch.linalg.qr(torch.cat([rows, outside], 1)).Q
    parts = (basis.mT @ z for z in (first.rows, second.rows))
    form_a, form_b = ((z @ z.mT / n).numpy() for z in parts)
    return basis.numpy(), form_a, form_b


def _top(matrix: Array) -> tuple[float, Array]:
    """The largest eigenvalue and its vector."""
    k = len(matrix)
    values, vectors = eigh(matrix, subset_by_index=[k - 1, k - 1])
    return float(values[0]), vectors[:, 0]


def _direction(a: Array, b: Array, bound: float) -> tuple[Array, float, float] | None:
    """The unit vector of the largest ``x' a x`` with ``x' b x <= bound``, its multiplier, and the gap to the dual.

    The dual is the maximum of the lines ``x' a x - lam (x' b x - bound)``. The next ``lam`` is where the lines of a vector
    over the bound and of one within it cross, until no line is above the crossing. None if no vector is within the bound.
    """
    slack = 1e-9 * bound + 1e-15  # a coherence that equals the bound is rounded to either side of it
    values, vectors = eigh(b, subset_by_index=[0, 0])
    if values[0] > bound + slack:
        return None
    within = vectors[:, 0]
    dual, over = _top(a)
    lam = 0.0
    if over @ b @ over <= bound + slack:
        return over, lam, 0.0
    for _ in range(STEPS):
        rise, cost = over @ a @ over - within @ a @ within, over @ b @ over - within @ b @ within
        if cost <= 0:
            break
        lam = max(rise / cost, 0.0)
        crossing = over @ a @ over - lam * (over @ b @ over - bound)
        top, x = _top(a - lam * b)
        dual = min(dual, top + lam * bound)
        if top + lam * bound - crossing <= TOLERANCE * abs(dual):
            break
        if x @ b @ x > bound:
            over = x
        else:
            within = x
    x = _combined(a, b, over, within, bound)
    return x, lam, max(dual - float(x @ a @ x), 0.0)


def _combined(a: Array, b: Array, x: Array, y: Array, bound: float) -> Array:
    """The best unit vector in the plane of ``x`` and ``y`` with ``x' b x <= bound``, which ``y`` meets.

    On the circle ``cos(t / 2) x + sin(t / 2) y`` both forms are a mean and a wave in t, so the best one is at the crest of
    ``a``, or where ``b`` is at the bound.
    """
    z = y - (x @ y) * x
    if np.linalg.norm(z) < 1e-12:
        return y
    z /= np.linalg.norm(z)

    def wave(form: Array) -> tuple[float, float, float]:
        p, q, r = x @ form @ x, z @ form @ z, x @ form @ z
        return (p + q) / 2, np.hypot((p - q) / 2, r), np.arctan2(r, (p - q) / 2)

    mean_a, height_a, crest_a = wave(a)
    mean_b, height_b, crest_b = wave(b)
    places = [crest_a] if mean_b + height_b * np.cos(crest_a - crest_b) <= bound else []
    if height_b > 0:
        offset = np.arccos(np.clip((bound - mean_b) / height_b, -1, 1))
        places += [crest_b + offset, crest_b - offset]
    best = max(places, key=lambda t: mean_a + height_a * np.cos(t - crest_a))
    return np.cos(best / 2) * x + np.sin(best / 2) * z


def _deflated(basis: Array, a: Array, b: Array, y: Array) -> tuple[Array, Array, Array]:
    """The basis and both forms in the complement of the unit vector ``y``, by a reflection that maps it to an axis."""
    v = y.copy()
    v[0] += math.copysign(1.0, v[0])
    v /= np.linalg.norm(v)

    def within(form: Array) -> Array:
        half = form - 2 * np.outer(v, v @ form)
        found = (half - 2 * np.outer(half @ v, v))[1:, 1:]
        return (found + found.T) / 2

    return (basis - 2 * np.outer(basis @ v, v))[:, 1:], within(a), within(b)


def _coherence(x: Tensor, kernel: JointKernel) -> Tensor:
    """Mean of the signed kernel over pairs of samples along each row of ``x``, over the kernel's standard deviation.

    The weights are ``|x_i x_j|``; 0 if all similarities are equal.
    """
    pairs = (x.abs().sum(1).square() - 1).clamp_min(ROUNDING)
    mean = (kernel.n * kernel.strength(x) - 1) / pairs
    return mean / kernel.spread if kernel.spread else torch.zeros_like(mean)


def _why_noise(x: Tensor, first: JointKernel, second: JointKernel) -> str:
    """Why one direction ``[1, n]`` counts as noise; empty if it does not."""
    alike, seen = first.n * float(first.strength(x)), second.n * float(second.strength(x))
    if alike < ALIKE:
        return f"it holds {alike:.2f} alike samples, fewer than {ALIKE:g}"
    if alike < CONTRAST * seen:  # a loose bound leaves such parts of groups over
        return f"it holds {alike:.2f} alike samples, fewer than {CONTRAST:g} times the {seen:.2f} by the other embedding"
    coherence, other = float(_coherence(x, first)), float(_coherence(x, second))
    if coherence < max(COHERENCE, CONTRAST * other):
        return (
            f"its coherence is {coherence:.2f} standard deviations, and {other:.2f} by the other embedding; it must be "
            f"{COHERENCE:g} or more, and {CONTRAST:g} times that by the other"
        )
    statistic = _anderson_darling(x[0])
    if statistic < NOT_NORMAL:
        return f"its entries are like a normal sample (Anderson-Darling {statistic:.2f}), as they are without groups"
    return ""


def _anderson_darling(x: Tensor) -> float:
    """The statistic of normality with estimated mean and variance, corrected for small samples (Stephens 1986)."""
    n = len(x)
    z = ((x - x.mean()) / x.std()).sort().values.numpy()
    odd = np.arange(1, 2 * n, 2)
    square = -n - float((odd * (log_ndtr(z) + log_ndtr(-z[::-1]))).sum()) / n
    return square * (1 + 0.75 / n + 2.25 / n**2)
