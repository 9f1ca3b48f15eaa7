"""RKE, conditional RKE (SPARKE) and novelty: sums of squared kernels, descended."""

import warnings
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, Kernel, pairwise_distances
from kspec_guidance.kernels.distances import ROWS, as_float, squared_distances
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, RandomFeatureMemory, Selection
from kspec_guidance.memory.reductions import distances_to_some, memory_kernel, memory_vjp
from kspec_guidance.objectives.base import (
    PROMPT_BANDWIDTH,
    SAMPLE_BANDWIDTH,
    Objective,
    need_closed_form,
    need_prompt_features,
    off_diagonal,
    weighted_median,
)

__all__ = [
    "RKE",
    "ConditionalRKE",
]


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
        need_closed_form(self.kernel)
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

    def _terms(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> tuple[Selection | None, Tensor]:
        """The memory rows that matter, with their weights, and the weights of the pairs inside the batch."""
        weigh = None if self.prompt_kernel is None else PromptWeights(self.prompt_kernel)
        inside = self._weights(t, t) if len(x) > 1 else 1.0
        return self._select(t, memory, weigh), inside * off_diagonal(len(x), x)

    def mass(self, n: int, t: Tensor | None = None, memory: Memory | None = None) -> Tensor | None:
        return (
            None if self._squared is not None else self._mass(n, self._check_prompts(t, memory), memory, self.prompt_kernel)
        )

    def _fit(self, x: Tensor, selection: Selection | None, inside: Tensor) -> Kernel:
        """The kernel, its open bandwidth set to half the median distance of pairs, weighted as the pairs are.

        Of a large memory 128 evenly spaced rows are measured.
        """
        if not self.kernel.open:
            return self.kernel.fit(x.detach())
        if not isinstance(self.kernel, GaussianKernel):
            rows = x[:0] if selection is None else selection.rows(x, selection.some(ROWS))
            return self.kernel.fit(torch.cat([x, rows]).detach())
        with torch.no_grad():
            d, w = squared_distances(x).sqrt() if len(x) > 1 else torch.zeros_like(inside), inside
            if selection is not None:
                d_out, w_out = distances_to_some(x, selection)
                d, w = torch.cat([d, d_out], 1), torch.cat([w, torch.as_tensor(w_out).to(d_out).expand_as(d_out)], 1)
            median = weighted_median(d, w * (d > 1e-3 * d.max()))  # rounding keeps duplicates from distance 0
        return GaussianKernel(SAMPLE_BANDWIDTH * (median or 1.0))

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x, t = as_float(x), self._check_prompts(t, memory)
        if self._squared is not None:
            return self._feature_value(x, t, memory)
        selection, inside = self._terms(x, t, memory)
        kernel = self._fit(x, selection, inside)
        own = -(kernel(x).square() * inside).sum() / 2
        if selection is None:
            return own
        weights = 1.0 if selection.weights is None else selection.weights.to(x)
        return own - (memory_kernel(kernel, x, selection).square() * weights).sum()

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x, t = as_float(x), self._check_prompts(t, memory)
        if self._squared is not None:
            return self._feature_gradient(x, t, memory)
        selection, inside = self._terms(x, t, memory)
        kernel = self._fit(x, selection, inside)
        squared = kernel.squared()
        g, near = torch.zeros_like(x), x.new_zeros(len(x))
        if len(x) > 1:
            g, near = -squared.vjp(x, x, inside), torch.where(inside > 0.5, squared(x), 0).amax(-1)
        if selection is not None:
            away, nearest = memory_vjp(squared, x, selection)
            g, near = g - away, torch.maximum(near, nearest)
        stuck = near > 1 - 2e-4
        if jitter is not None and bool(stuck.any()):
            moved = x + jitter * stuck[:, None]
            g[stuck] = -squared.vjp(moved[stuck], moved, inside[stuck])
            if selection is not None:
                g[stuck] -= memory_vjp(squared, moved[stuck], selection.of(stuck))[0]
        return g

    def _feature_pull(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> tuple[Tensor, Tensor | float, Tensor]:
        """Features, the memory's coefficients for each row, and the batch's own pair weights."""
        assert self._squared is not None
        outside: Tensor | float = 0.0
        if memory is not None and len(memory):
            if not isinstance(memory, RandomFeatureMemory):
                raise TypeError(f"features= needs a RandomFeatureMemory, got {type(memory).__name__}")
            outside = memory.coefficients(t, x)
        inside = off_diagonal(len(x), x)
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
            self._squared_prompts = need_prompt_features("ConditionalRKE", self.prompt_features).power(2)
