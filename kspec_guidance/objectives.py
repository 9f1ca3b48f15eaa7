"""Guidance objectives: what is to grow, and the direction in which it grows.

An objective sees the feature rows of the batch being made, ``x`` ``[n, d]``, their prompts' features ``t`` ``[n, p]`` (rows
of norm 1) or None, and the memory. ``value`` is differentiable by autograd; ``gradient`` is the same derivative in closed
form, and what guidance uses. Both are to be ascended. Pairs inside the batch count as much as pairs with the memory.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import (
    CosineKernel,
    GaussianKernel,
    Kernel,
    PolynomialKernel,
    as_float,
    check_pair,
    pairwise_distances,
    squared_distances,
)
from kspec_guidance.memory import Memory, MemoryBank, RandomFeatureMemory
from kspec_guidance.spectrum import check_order, renyi_entropy

__all__ = ["MMD", "RKE", "ConditionalRKE", "Novelty", "Objective", "Vendi"]

# Bandwidth of samples, in median distances of the pairs at hand, where it is left open. At 1 every pair pushes about
# alike; at one half it is the near pairs that part: more modes at the same share of valid samples
# (benchmarks/where_to_push.py, effect.py).
SAMPLE_BANDWIDTH = 0.5
PROMPT_BANDWIDTH = 0.35  # of unit-norm prompt features, as published; benchmarks/prompts.py shows what it separates


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0, x.shape[-1])


def _off_diagonal(n: int, like: Tensor) -> Tensor:
    return 1 - torch.eye(n, dtype=like.dtype, device=like.device)


def weighted_median(values: Tensor, weights: Tensor) -> float | None:
    """The value at which half of the weight is reached; None without any weight."""
    values, order = values.flatten().sort()
    mass = weights.flatten()[order].cumsum(0)
    if not len(mass) or mass[-1] <= 0:
        return None
    return float(values[int(torch.searchsorted(mass, mass[-1] / 2).clamp(max=len(mass) - 1))])


def _need_closed_form(kernel: Kernel) -> None:
    if type(kernel).vjp is Kernel.vjp:
        kernel.vjp(torch.empty(0, 1), torch.empty(0, 1), torch.empty(0, 0))  # raises with the cure


def _need_prompt_features(name: str, features: RandomFourierFeatures | None) -> RandomFourierFeatures:
    if features is None:
        raise ValueError(
            f"{name} with features= also needs prompt_features=RandomFourierFeatures(prompt_kernel, width, ...)"
        )
    return features


class Objective:
    """Base class. ``unit`` says whether features are rows of norm 1 (so that moves turn, and do not scale, a sample)."""

    unit: bool = True
    conditional: bool = False  # whether prompts are used

    def make_memory(self) -> Memory:
        return MemoryBank()

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Scalar to be ascended, differentiable in ``x``."""
        raise NotImplementedError

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        """``d value / d x`` ``[n, d]``; a row that coincides with another entry is first moved by its ``jitter`` row."""
        raise NotImplementedError

    def _prompts(self, t: Tensor | None) -> Tensor | None:
        return t if self.conditional else None

    def _memory_rows(self, x: Tensor, memory: Memory | None) -> Tensor:
        if memory is None or not len(memory):
            return _empty(x)
        if not isinstance(memory, MemoryBank):
            raise TypeError(f"{type(self).__name__} without features= needs a MemoryBank, got {type(memory).__name__}")
        rows = memory.unit() if self.unit else memory.x
        return rows.to(x)


@dataclass
class RKE(Objective):
    """Order-2 Renyi entropy of batch and memory together: descend ``E = sum over pairs of k(x_i, x_j)^2``.

    RKE is ``n^2 / ||K||_F^2`` (Jalali et al. 2023), so its ascent is the descent of the squared kernel's sum; pairs within
    the memory are constant. ``value`` is ``-E``, each pair counted once.

    Args:
        kernel: with a closed form; Gaussian at half the median distance of the pairs at hand by default.
        features: random Fourier features of the same kernel: the memory then has constant size.
    """

    kernel: Kernel = field(default_factory=GaussianKernel)
    features: RandomFourierFeatures | None = None
    unit: bool = True
    prompt_kernel: Kernel | None = field(default=None, init=False)
    prompt_features: RandomFourierFeatures | None = field(default=None, init=False)

    def __post_init__(self):
        _need_closed_form(self.kernel)
        self._squared = None if self.features is None else self.features.power(2)
        self._squared_prompts = None
        self._warned = False

    def make_memory(self) -> Memory:
        if self._squared is None:
            return MemoryBank()
        return RandomFeatureMemory(self._squared, self._squared_prompts, self.unit)

    def _weights(self, t: Tensor | None, s: Tensor | None) -> Tensor | float:
        """``k_T(t, s)^2`` ``[n, m]``."""
        if self.prompt_kernel is None or t is None:
            return 1.0
        return self.prompt_kernel(t, s).square()

    def _check_prompts(self, t: Tensor | None, memory: Memory | None) -> Tensor | None:
        t = self._prompts(t)
        known = memory.prompt_dim if memory is not None and len(memory) else None
        if t is not None and known is not None and t.shape[-1] != known:
            raise ValueError(
                f"prompt features have width {t.shape[-1]}, those in memory {known}; "
                "use one text encoder with one memory, or clear() the memory"
            )
        return t

    def _terms(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        """Memory rows and the weights of the pairs with them and inside the batch."""
        rows = self._memory_rows(x, memory)
        s = memory.prompts if isinstance(memory, MemoryBank) and len(memory) else None
        use = t if s is not None else None
        outside = self._weights(use, None if s is None or use is None else s.to(use))
        inside = self._weights(t, t) * _off_diagonal(len(x), x)
        return rows, outside, inside

    def _fit(self, x: Tensor, rows: Tensor, outside: Tensor | float, inside: Tensor) -> Kernel:
        """The kernel, its open bandwidth set to half the median distance of pairs, weighted as the pairs are."""
        if getattr(self.kernel, "bandwidth", 0) is not None or not isinstance(self.kernel, GaussianKernel):
            return self.kernel.fit(torch.cat([x, rows]).detach())
        with torch.no_grad():
            d_in, d_out = squared_distances(x).sqrt(), squared_distances(x, rows).sqrt()
            w_out = outside if isinstance(outside, Tensor) else torch.full_like(d_out, outside)
            d, w = torch.cat([d_in, d_out], 1), torch.cat([inside, w_out.to(d_out)], 1)
            median = weighted_median(d, w * (d > 1e-3 * d.max()))  # rounding keeps duplicates from distance 0
        return GaussianKernel(SAMPLE_BANDWIDTH * (median or 1.0))

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x, t = as_float(x), self._check_prompts(t, memory)
        if self._squared is not None:
            return self._feature_value(x, t, memory)
        rows, outside, inside = self._terms(x, t, memory)
        kernel = self._fit(x, rows, outside, inside)
        return -(kernel(x, rows).square() * outside).sum() - (kernel(x).square() * inside).sum() / 2

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x, t = as_float(x), self._check_prompts(t, memory)
        if self._squared is not None:
            return self._feature_gradient(x, t, memory)
        rows, outside, inside = self._terms(x, t, memory)
        kernel = self._fit(x, rows, outside, inside)
        stuck = torch.zeros(len(x), dtype=torch.bool, device=x.device)

        def slope(weight: Tensor | float) -> Callable[[Tensor], Tensor]:
            def derivative(k: Tensor) -> Tensor:
                stuck.logical_or_(((k > 1 - 1e-4) & (weight * torch.ones_like(k) > 0.5)).any(-1))
                return -2 * weight * k

            return derivative

        g = kernel.vjp(x, rows, slope(outside)) + kernel.vjp(x, x, slope(inside))
        if jitter is not None and bool(stuck.any()):
            moved = x + jitter * stuck[:, None]
            g_moved = kernel.vjp(moved, rows, lambda k: -2 * outside * k)
            g_moved = g_moved + kernel.vjp(moved, moved, lambda k: -2 * inside * k)
            g = torch.where(stuck[:, None], g_moved, g)
        return g

    def _feature_pull(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> tuple[Tensor, Tensor | float, Tensor]:
        """Features, the memory's coefficients for each row, and the batch's own pair weights."""
        assert self._squared is not None
        outside: Tensor | float = 0.0
        if memory is not None and len(memory):
            if not isinstance(memory, RandomFeatureMemory):
                raise TypeError(f"features= needs a RandomFeatureMemory, got {type(memory).__name__}")
            outside = memory.coefficients(t, x)
        inside = _off_diagonal(len(x), x)
        if self._squared_prompts is not None and t is not None:
            psi = self._squared_prompts(t)
            inside = inside * (psi @ psi.mT).to(x)
        if not self._warned and len(x) > 1:
            self._warned = True
            with torch.no_grad():
                typical = float(pairwise_distances(x).median())
            if not self._squared.reliable(typical):
                b, d, r = self._squared.kernel.bandwidth or 0.0, self._squared.input_dim, self._squared.num_features
                warnings.warn(
                    f"{r} random features in {d} dimensions at bandwidth {b:.2g} (of the squared kernel; typical distance "
                    f"{typical:.2g}) give poor gradients; leave features=None for the exact sum, or use at least {8 * d} "
                    f"features and a kernel bandwidth of at least {1.3 * typical:.2g}, or features of lower dimension",
                    stacklevel=4,
                )
        return self._squared(x), outside, inside

    def _feature_value(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> Tensor:
        phi, outside, inside = self._feature_pull(x, t, memory)
        return -(phi * outside).sum() - (inside * (phi @ phi.mT)).sum() / 2

    def _feature_gradient(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> Tensor:
        phi, outside, inside = self._feature_pull(x, t, memory)
        assert self._squared is not None
        return self._squared.vjp(x, -(outside + inside @ phi))


@dataclass
class ConditionalRKE(RKE):
    """SPARKE: conditional RKE, ``E = sum over pairs of k(x_i, x_j)^2 k_T(t_i, t_j)^2`` descended.

    Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173. Only images of similar prompts repel each other. Without prompt
    features it is :class:`RKE`.

    Args:
        prompt_kernel: Gaussian of bandwidth 0.35 on unit-norm prompt features by default.
        prompt_features: random features of the prompt kernel; needed with ``features``.
    """

    prompt_kernel: Kernel = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))  # type: ignore[assignment]
    prompt_features: RandomFourierFeatures | None = None
    conditional = True

    def __post_init__(self):
        super().__post_init__()
        if self.features is not None:
            self._squared_prompts = _need_prompt_features("ConditionalRKE", self.prompt_features).power(2)


@dataclass
class Novelty(RKE):
    """Away from a fixed reference set: ``E = sum_r k(x, r)^2`` descended; the batch and the memory do not matter.

    Args:
        reference: rows ``[m, d]`` (or any shape ``[m, ...]``), of the same space as what is generated.
        reference_prompts: prompt features ``[m, p]``; with them only references of similar prompts repel.
        prompt_kernel, prompt_features: as for :class:`ConditionalRKE`, used with ``reference_prompts``.
    """

    prompt_kernel: Kernel | None = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))
    prompt_features: RandomFourierFeatures | None = None
    reference: Tensor | None = None
    reference_prompts: Tensor | None = None

    def __post_init__(self):
        super().__post_init__()
        self.conditional = self.reference_prompts is not None
        if self.reference is None:
            raise ValueError("Novelty needs reference=, a tensor [m, ...] of samples to stay away from")
        if not self.conditional:
            self.prompt_kernel = None
        elif self.features is not None:
            self._squared_prompts = _need_prompt_features("Novelty", self.prompt_features).power(2)
        self._reference = self.make_memory()
        self._reference.add(self.reference, self.reference_prompts)

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        return super().value(x, t, self._reference)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        return super().gradient(x, t, self._reference, jitter)

    def _terms(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        rows, outside, inside = super()._terms(x, t, memory)
        return rows, outside, inside * 0

    def _feature_pull(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        phi, outside, inside = super()._feature_pull(x, t, memory)
        return phi, outside, inside * 0


@dataclass
class MMD(Objective):
    """Toward a reference set: descend the biased squared MMD between it and all that was generated, batch and memory.

    ``2/N^2 sum_j grad k(x, y_j) - 2/(N R) sum_r grad k(x, r)`` (Sani, Jamali, Jalali, Farnia 2026), N counting batch and
    memory. ``value`` is ``-MMD^2``; terms that do not depend on the batch are left out.

    Args:
        reference: ``[m, ...]`` samples of the same space as what is generated; 16 and more.
        kernel: the cubic polynomial kernel (KID's) by default.
        reference_prompts: prompt features ``[m, p]``: the kernel becomes the product with ``prompt_kernel``, and each
            prompt is drawn to the references of similar prompts.
        features: random features of the kernel (Gaussian or Laplacian): memory and reference become one sum each.
        prompt_features: random features of the prompt kernel; needed with ``features`` and ``reference_prompts``.
        unit: whether samples are scaled to norm 1 first.
    """

    reference: Tensor
    kernel: Kernel = field(default_factory=PolynomialKernel)
    reference_prompts: Tensor | None = None
    prompt_kernel: Kernel = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))
    features: RandomFourierFeatures | None = None
    prompt_features: RandomFourierFeatures | None = None
    unit: bool = False

    def __post_init__(self):
        _need_closed_form(self.kernel)
        self.conditional = self.reference_prompts is not None
        if self.features is not None and self.conditional:
            _need_prompt_features("a prompt-aware MMD", self.prompt_features)
        self._reference = self.make_memory()
        self._reference.add(self.reference, self.reference_prompts)
        self.fitted: Kernel | None = None

    def make_memory(self) -> Memory:
        if self.features is None:
            return MemoryBank()
        return RandomFeatureMemory(self.features, self.prompt_features if self.conditional else None, self.unit)

    def _check_batch(self, x: Tensor, t: Tensor | None) -> None:
        width = math.prod(self._reference.shape or ())
        if x.shape[-1] != width:
            raise ValueError(
                f"the reference set holds rows of {width} numbers, samples have {x.shape[-1]}; encode the references with "
                "this pipeline's autoencoder at the resolution that is generated"
            )
        if self.conditional and t is None:
            raise ValueError("a prompt-aware MMD needs prompt features, which this call lacks; leave reference_prompts out")

    def _parts(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        self._check_batch(x, t)
        assert isinstance(self._reference, MemoryBank)
        rows, reference = self._memory_rows(x, memory), self._memory_rows(x, self._reference)
        if self.fitted is None:  # chosen once, from the reference set: a fixed target needs a fixed yardstick
            self.fitted = self.kernel.fit(reference)
        if not self.conditional:
            return self.fitted, rows, reference, 1.0, 1.0, 1.0
        assert t is not None
        s, r = memory.prompts if isinstance(memory, MemoryBank) else None, self._reference.prompts
        assert r is not None
        k_batch, k_ref = self.prompt_kernel(t, t), self.prompt_kernel(t, r.to(t))
        k_mem = 1.0 if s is None else self.prompt_kernel(t, s.to(t))
        return self.fitted, rows, reference, k_batch, k_mem, k_ref

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        if self.features is not None:
            phi, inside, old, target, n = self._feature_parts(x, t, memory)
            return 2 * (phi * target).sum() / n - ((inside * (phi @ phi.mT)).sum() + 2 * (phi * old).sum()) / n**2
        kernel, rows, reference, w_batch, w_mem, w_ref = self._parts(x, t, memory)
        n, m = len(x) + len(rows), len(reference)
        own = (kernel(x, x) * w_batch).sum() + 2 * (kernel(x, rows) * w_mem).sum()
        return -own / n**2 + 2 * (kernel(x, reference) * w_ref).sum() / (n * m)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x = as_float(x)
        if self.features is not None:
            phi, inside, old, target, n = self._feature_parts(x, t, memory)
            return self.features.vjp(x, 2 * (target / n - (inside @ phi + old) / n**2))
        kernel, rows, reference, w_batch, w_mem, w_ref = self._parts(x, t, memory)
        n, m = len(x) + len(rows), len(reference)

        def flat(weight: Tensor | float, c: float):
            return lambda k: c * weight * torch.ones_like(k)

        return (
            kernel.vjp(x, x, flat(w_batch, -2 / n**2))
            + kernel.vjp(x, rows, flat(w_mem, -2 / n**2))
            + kernel.vjp(x, reference, flat(w_ref, 2 / (n * m)))
        )

    def _feature_parts(
        self, x: Tensor, t: Tensor | None, memory: Memory | None
    ) -> tuple[Tensor, Tensor, Tensor | float, Tensor, int]:
        """Features of the batch, its own pair weights, coefficients of memory and references, and the number made."""
        self._check_batch(x, t)
        assert self.features is not None
        assert isinstance(self._reference, RandomFeatureMemory)
        inside, n = torch.ones(len(x), len(x), dtype=x.dtype, device=x.device), len(x)
        old: Tensor | float = 0.0
        if self.conditional and self.prompt_features is not None and t is not None:
            psi = self.prompt_features(t)
            inside = (psi @ psi.mT).to(x)
        if memory is not None and len(memory):
            if not isinstance(memory, RandomFeatureMemory):
                raise TypeError(f"features= needs a RandomFeatureMemory, got {type(memory).__name__}")
            old, n = memory.coefficients(t, x), n + len(memory)
        return self.features(x), inside, old, self._reference.coefficients(t, x) / len(self._reference), n


@dataclass
class Vendi(Objective):
    """Renyi entropy of order q (the logarithm of the Vendi score) of the batch and the nearest memory rows, ascended.

    The gradient is closed too: ``dH/dK = V diag(h'(l)) V' / N`` on the eigenpairs of ``K / N``, then the kernel's own. With
    prompts the matrix is ``K o K_T``.

    Args:
        kernel: with unit diagonal and closed form; cosine by default.
        order: q in (0, inf].
        prompt_kernel: makes it conditional.
        max_rows: memory rows that take part (those most like the batch), since eigenvalues cost ``N^3``.
    """

    kernel: Kernel = field(default_factory=CosineKernel)
    order: float = 1.0
    prompt_kernel: Kernel | None = None
    max_rows: int = 256
    unit: bool = True

    def __post_init__(self):
        _need_closed_form(self.kernel)
        check_order(self.order)
        if type(self.kernel).diagonal is not Kernel.diagonal:
            raise ValueError(f"the Vendi objective needs a kernel with k(x, x) = 1, not {self.kernel!r}")
        self.conditional = self.prompt_kernel is not None

    def _gram(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        """All rows ``[N, d]``, their kernel matrix and their prompt weights ``[N, N]``."""
        rows, t = self._memory_rows(x, memory), self._prompts(t)
        s = memory.prompts if isinstance(memory, MemoryBank) and t is not None else None
        if len(rows) > self.max_rows:
            with torch.no_grad():
                near = self.kernel.fit(rows)(x, rows)
                if s is not None and t is not None and self.prompt_kernel is not None:
                    near = near * self.prompt_kernel(t, s.to(t))
                pick = near.amax(0).topk(self.max_rows).indices.sort().values
            rows, s = rows[pick], None if s is None else s[pick]
        z = torch.cat([x, rows])
        kernel = self.kernel.fit(z.detach())
        weight: Tensor | float = 1.0
        if t is not None and self.prompt_kernel is not None:
            every = t if s is None else torch.cat([t, s.to(t)])
            if len(every) == len(z):
                weight = self.prompt_kernel(every)
        return z, kernel, weight

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        z, kernel, weight = self._gram(as_float(x), t, memory)
        matrix = (kernel(z) * weight).double() / len(z)
        l = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).clamp_min(0)
        return renyi_entropy(l / l.sum(), self.order)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x = as_float(x)
        if jitter is not None:
            old = squared_distances(x, self._memory_rows(x, memory))
            d2 = torch.cat([squared_distances(x).fill_diagonal_(1.0), old], 1)
            x = x + jitter * (d2.amin(1) < 1e-10)[:, None]
        z, kernel, weight = self._gram(x, t, memory)
        matrix = (kernel(z) * weight).double() / len(z)
        l, v = torch.linalg.eigh((matrix + matrix.mT) / 2)
        slope = self._slope(l.clamp_min(0))
        outer = ((v * slope) @ v.mT / len(z)).to(x) * weight
        outer.fill_diagonal_(0)  # k(z, z) is constant
        return kernel.vjp(z[: len(x)], z, 2 * outer[: len(x)])

    def _slope(self, l: Tensor) -> Tensor:
        """``dH / dl`` on the simplex, 0 for eigenvalues that are rounding noise."""
        alive = l > len(l) * torch.finfo(l.dtype).eps * l.max()
        safe = torch.where(alive, l, 1.0)
        if self.order == 1:
            slope = -safe.log() - 1
        elif self.order == float("inf"):
            top = l == l.max()
            slope = top.to(l) / (-l.max() * top.sum())
        else:
            q = self.order
            slope = q / (1 - q) * safe.pow(q - 1) / torch.where(alive, safe.pow(q), 0).sum()
        return torch.where(alive, slope, 0)


def natural_rows(x: Tensor, unit: bool) -> Tensor:
    """Samples ``[n, ...]`` as feature rows ``[n, d]``, scaled to norm 1 if asked."""
    rows = as_float(x).flatten(1)
    return CosineKernel.unit(rows)[0] if unit else rows


def pull_back(x: Tensor, g: Tensor, unit: bool) -> Tensor:
    """The gradient in ``x`` ``[n, ...]`` from that in its feature rows ``[n, d]``."""
    if unit:
        u, norm = CosineKernel.unit(as_float(x).flatten(1))
        u, g = check_pair(u, g)
        g = (g - (g * u).sum(-1, keepdim=True) * u) / norm
    return g.view(x.shape)
