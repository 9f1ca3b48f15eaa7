"""MMD toward a reference set."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, Kernel, PolynomialKernel, as_float
from kspec_guidance.memory import Memory, MemoryBank, RandomFeatureMemory
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
