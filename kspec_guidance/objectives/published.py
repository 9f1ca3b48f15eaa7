"""The objectives of the authors' code of SPARKE and of MMD guidance, in its exact scale, to reproduce published steps."""

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from kspec_guidance.kernels import GaussianKernel, Kernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, Selection
from kspec_guidance.objectives.base import Gradient, Objective, Pairs, differentiable, off_diagonal
from kspec_guidance.objectives.mmd import MMD

__all__ = ["PublishedMMD", "PublishedRKE"]

SQUARED_UP_TO = 10  # number of samples, the new one included, up to which SPARKE's code squares its kernels
SPARKE_ROWS = 4000  # rows that SPARKE's script compares, the new one included
MMD_ROWS = 100  # rows at which the code of MMD guidance keeps only the newest


class Compared(NamedTuple):
    """Samples that a batch is compared with, and the weights of the pairs; constant in a run."""

    kernel: Kernel  # of samples, with the exponent of the form
    inside: Tensor  # weights of pairs within the batch [n, n], 0 on the diagonal
    selection: Selection | None  # memory rows with their weights
    size: int  # number of samples in batch and memory
    constant: Tensor  # sum over pairs within the memory, a scalar; 0 if it is not needed
    context: "Compared | None" = None  # the same with the context as the memory


@dataclass(repr=False)
class PublishedRKE(Objective):
    """Conditional RKE of new samples given a memory, as SPARKE (arXiv 2506.10173) writes it or computes it.

    With N samples in batch and memory, and ``S = sum over pairs (i, j) of (k_ij k_T,ij)^2``, the form ``paper`` descends
    ``S / N^2`` (Algorithm 1). The form ``code`` ascends ``N^2 / S`` up to ``N = 10`` and, for more, each new sample's own
    ``N / sum_j k_ij k_T,ij``, without squares. All memory rows count, however small their weight. The code has batches of
    1; in larger ones, the other samples of the batch count as memory rows.

    With a context, ``beta`` times the same score of batch and context, without pairs within the batch, is subtracted: so
    samples stay close to those of the context that have similar prompts (``beta`` and ``F_M_real`` of the code).

    Args:
        kernel: kernel of samples of norm 1; by default Gaussian with bandwidth 0.6.
        prompt_kernel: kernel of unit-norm prompt features; by default Gaussian with bandwidth 0.3.
        form: ``code`` or ``paper``.
        context: samples to stay close to ``[m, ...]``, in the space of the generated ones.
        context_prompts: their prompt features ``[m, p]``.
        beta: weight of the context.

    Raises:
        TypeError: for a kernel without a closed-form gradient; by ``value`` and ``gradient``, for a memory without rows.
        ValueError: for another form, a kernel without a bandwidth, a ``beta`` that is negative or infinite, or a context or
            ``beta`` without the other.
    """

    kernel: Kernel = field(default_factory=lambda: GaussianKernel(0.6))
    prompt_kernel: Kernel = field(default_factory=lambda: GaussianKernel(0.3))
    form: str = "code"
    context: Tensor | None = None
    context_prompts: Tensor | None = None
    beta: float | None = None
    conditional = True

    def __post_init__(self):
        if (self.context is None) != (self.beta is None):
            raise ValueError("a context needs both context=, samples [m, ...], and their weight beta=")
        if self.beta is not None and not 0 <= self.beta < math.inf:
            raise ValueError(f"beta is the weight of the context and must be finite and at least 0, got {self.beta!r}")
        self._context = MemoryBank()
        if self.context is not None:
            self._context.add(self.context, self.context_prompts)
        if self.form not in ("code", "paper"):
            raise ValueError(f"form must be 'code' or 'paper', got {self.form!r}")
        for name, kernel in (("kernel", self.kernel), ("prompt_kernel", self.prompt_kernel)):
            if kernel.open:
                raise ValueError(f"{name} needs a bandwidth, as published settings have fixed ones; got {kernel!r}")
        self.kernel = differentiable(self.kernel)

    def make_memory(self) -> Memory:
        return MemoryBank(limit=SPARKE_ROWS - 1) if self.form == "code" else MemoryBank()

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Compared:
        """The weights ``k_T(t_i, t_j)`` of all pairs, squared where the form squares them; all are 1 without prompts."""
        if memory is not None and not isinstance(memory, MemoryBank):
            raise TypeError(f"published guides need the rows of a MemoryBank, got a {type(memory).__name__}")
        found = self._compare(x, prompt_features, memory, off_diagonal(len(x), x))
        if self.context is None:
            return found
        none_inside = x.new_zeros(len(x), len(x))
        return found._replace(context=self._compare(x, prompt_features, self._context, none_inside))

    def _compare(self, x: Tensor, prompt_features: Tensor | None, memory: MemoryBank | None, inside: Tensor) -> Compared:
        """The pairs of a batch and a memory; those within the batch have the weights ``inside`` ``[n, n]``, or less."""
        t = self._check_prompts(prompt_features, memory)
        size = len(x) + (0 if memory is None else len(memory))
        power = 1 if self.form == "code" and size > SQUARED_UP_TO else 2
        kernel = self.kernel.squared() if power == 2 else self.kernel
        weights = PromptWeights(self.prompt_kernel, power)
        if t is not None:
            inside = inside * weights(t, t).to(x)
        selection, constant = None, x.new_zeros(())
        if memory is not None and len(memory):
            selection = memory.select(t, weights, 0.0, self.normalize)
            if self.form == "code" and power == 2:
                every = memory.select(None if t is None else memory.prompts, weights, 0.0, self.normalize)
                constant = self._total(kernel, every.rows(x), every).sum()
        return Compared(kernel, inside, selection, size, constant)

    @staticmethod
    def _total(kernel: Kernel, x: Tensor, selection: Selection | None) -> Tensor:
        """Weighted sum ``[n]`` of the kernel over the rows of a selection."""
        if selection is None or not len(selection):
            return x.new_zeros(len(x))
        weights = selection.vectors(x)[2]
        return (selection.kernel(kernel, x) * (1.0 if weights is None else weights)).sum(1)

    def _sums(self, x: Tensor, others: Tensor, found: Compared) -> tuple[Tensor, Tensor]:
        """Weighted sums ``[n]`` over the batch ``others``, and over the memory."""
        return (found.kernel(x, others) * found.inside).sum(1), self._total(found.kernel, x, found.selection)

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """The objective; in the form without squares, a sample is constant in the scores of the others."""
        x = as_float(x)
        found = self.pairs(x, prompt_features, memory)
        value = self._score(x, found)
        if self.beta is not None and found.context is not None:
            value = value - self.beta * self._score(x, found.context)
        return value

    def _score(self, x: Tensor, found: Compared) -> Tensor:
        n = found.size
        if self.form == "code" and n > SQUARED_UP_TO:
            inside, outside = self._sums(x, x.detach(), found)
            return (n / (1 + inside + outside)).sum()
        inside, outside = self._sums(x, x, found)
        total = len(x) + inside.sum() + 2 * outside.sum() + found.constant
        return -total / n**2 if self.form == "paper" else n**2 / total

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Compared | None = None,
    ) -> Gradient:
        x = as_float(x)
        found = self.pairs(x, prompt_features, memory) if pairs is None else pairs
        rows = self._ascent(x, found)
        if self.beta is not None and found.context is not None:
            rows = rows - self.beta * self._ascent(x, found.context)
        return Gradient(rows)

    def _ascent(self, x: Tensor, found: Compared) -> Tensor:
        """The derivative of the score ``[n, d]``."""
        n, inside, outside = found.size, *self._sums(x, x, found)
        g = found.kernel.vjp(x, x, found.inside)
        if found.selection is not None:
            g = g + found.selection.kernel_gradient(found.kernel, x)[0]
        if self.form == "paper":
            return -2 / n**2 * g
        if n > SQUARED_UP_TO:
            return -n * (1 + inside + outside).pow(-2)[:, None] * g
        total = len(x) + inside.sum() + 2 * outside.sum() + found.constant
        return -2 * n**2 / total**2 * g


@dataclass(repr=False)
class PublishedMMD(MMD):
    """MMD as in the authors' code (arXiv 2601.08379): a sample with nothing to be compared with is not guided.

    The memory of :meth:`make_memory` keeps only its newest row when it has 100.
    """

    def make_memory(self) -> Memory:
        return MemoryBank(limit=MMD_ROWS, forget="restart")

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Gradient:
        pairs = self.pairs(as_float(x), prompt_features, memory) if pairs is None else pairs
        found = super().gradient(x, prompt_features, memory, jitter=jitter, pairs=pairs)
        return found if pairs.size > 1 else Gradient(torch.zeros_like(found.rows))
