"""MMD toward a reference set."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, Kernel, PolynomialKernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, RandomFeatureMemory, Selection
from kspec_guidance.memory.reductions import memory_kernel, memory_vjp
from kspec_guidance.objectives.base import PROMPT_BANDWIDTH, Objective, need_closed_form, need_prompt_features

__all__ = ["MMD"]


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
        need_closed_form(self.kernel)
        self.conditional = self.reference_prompts is not None
        if self.features is not None and self.conditional:
            need_prompt_features("a prompt-aware MMD", self.prompt_features)
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
        """The kernel, the rows of memory and reference that matter, and the weights of the pairs inside the batch."""
        self._check_batch(x, t)
        weigh = PromptWeights(self.prompt_kernel, 1) if self.conditional else None
        reference = self._select(t, self._reference, weigh)
        assert reference is not None
        if self.fitted is None:  # chosen once, from the reference set: a fixed target needs a fixed yardstick
            self.fitted = self.kernel.fit(self._memory_rows(x, self._reference))
        inside = self.prompt_kernel(t, t) if self.conditional and t is not None else torch.ones_like(x[:, :1])
        return self.fitted, self._select(t, memory, weigh), reference, inside

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        if self.features is not None:
            phi, inside, old, target, n = self._feature_parts(x, t, memory)
            return 2 * (phi * target).sum() / n - ((inside * (phi @ phi.mT)).sum() + 2 * (phi * old).sum()) / n**2
        kernel, rows, reference, inside = self._parts(x, t, memory)
        n, m = len(x) + (0 if memory is None else len(memory)), len(self._reference)

        def total(selection: Selection | None) -> Tensor:
            if selection is None:
                return x.new_zeros(())
            weights = 1.0 if selection.weights is None else selection.weights.to(x)
            return (memory_kernel(kernel, x, selection) * weights).sum()

        own = (kernel(x, x) * inside).sum() + 2 * total(rows)
        return -own / n**2 + 2 * total(reference) / (n * m)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x = as_float(x)
        if self.features is not None:
            phi, inside, old, target, n = self._feature_parts(x, t, memory)
            return self.features.vjp(x, 2 * (target / n - (inside @ phi + old) / n**2))
        kernel, rows, reference, inside = self._parts(x, t, memory)
        n, m = len(x) + (0 if memory is None else len(memory)), len(self._reference)

        g = 2 / (n * m) * memory_vjp(kernel, x, reference)[0] - 2 / n**2 * kernel.vjp(x, x, inside.expand(len(x), len(x)))
        return g if rows is None else g - 2 / n**2 * memory_vjp(kernel, x, rows)[0]

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
