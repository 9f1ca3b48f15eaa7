"""What all objectives share."""

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, Kernel
from kspec_guidance.kernels.distances import as_float, check_pair
from kspec_guidance.memory import CentroidMemory, Memory, MemoryBank, PromptWeights, Selection

__all__ = ["PROMPT_BANDWIDTH", "SAMPLE_BANDWIDTH", "TOLERANCE", "Objective", "natural_rows", "pull_back", "weighted_median"]

# Bandwidth of samples, in median distances of the pairs at hand, where it is left open. At 1 every pair pushes about
# alike; at one half it is the near pairs that part: more modes at the same share of valid samples
# (benchmarks/where_to_push.py, effect.py).
SAMPLE_BANDWIDTH = 0.5
PROMPT_BANDWIDTH = 0.35  # of unit-norm prompt features, as published; benchmarks/prompts.py shows what it separates

TOLERANCE = 1e-3  # memory rows left out weigh together at most this part of all, or of one row of the sample's own prompt


def _empty(x: Tensor) -> Tensor:
    return x.new_empty(0, x.shape[-1])


def off_diagonal(n: int, like: Tensor) -> Tensor:
    return 1 - torch.eye(n, dtype=like.dtype, device=like.device)


def weighted_median(values: Tensor, weights: Tensor) -> float | None:
    """The value at which half of the weight is reached; None without any weight."""
    values, order = values.flatten().sort()
    mass = weights.flatten()[order].cumsum(0)
    if not len(mass) or mass[-1] <= 0:
        return None
    return float(values[int(torch.searchsorted(mass, mass[-1] / 2).clamp(max=len(mass) - 1))])


def need_closed_form(kernel: Kernel) -> None:
    if type(kernel).vjp is Kernel.vjp:
        kernel.vjp(torch.empty(0, 1), torch.empty(0, 1), torch.empty(0, 0))  # raises with the cure


def need_prompt_features(name: str, features: RandomFourierFeatures | None) -> RandomFourierFeatures:
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

    def mass(self, n: int, t: Tensor | None = None, memory: Memory | None = None) -> Tensor | None:
        """How many samples of its own prompt each of ``n`` is held against ``[n]``; None where that has no meaning."""
        return None

    def _mass(self, n: int, t: Tensor | None, memory: Memory | None, kernel: Kernel | None) -> Tensor:
        """The squared prompt kernel summed over batch and memory ``[n]``, a sample's own left out; all count 1 without."""
        t = self._prompts(t)
        inside = off_diagonal(n, torch.empty(n, 1) if t is None else t)
        if t is not None and kernel is not None:
            inside = inside * kernel(t, t).square()
        selection = self._select(t, memory, None if kernel is None else PromptWeights(kernel))
        mass = inside.sum(1).cpu()
        return mass if selection is None else mass + selection.mass(n).to(mass)

    def _select(self, t: Tensor | None, memory: Memory | None, weigh: PromptWeights | None) -> Selection | None:
        """The memory rows that matter; None without any."""
        if memory is None or not len(memory):
            return None
        if not isinstance(memory, MemoryBank | CentroidMemory):
            raise TypeError(
                f"{type(self).__name__} without features= needs a MemoryBank or CentroidMemory, got {type(memory).__name__}"
            )
        return memory.select(t, weigh, TOLERANCE, self.unit)

    def _memory_rows(self, x: Tensor, memory: Memory | None) -> Tensor:
        selection = self._select(None, memory, None)
        return _empty(x) if selection is None else selection.rows(x)


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
