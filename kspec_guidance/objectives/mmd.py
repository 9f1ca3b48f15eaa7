"""MMD to a reference set."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel, PolynomialKernel
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, RandomFeatureMemory, Selection
from kspec_guidance.objectives.base import Gradient, Objective, Pairs, differentiable, need_prompt_feature_map

__all__ = ["MMD"]

FEW_PROMPTS, FEW_ROWS = 4, 100  # in a batch and in memory, below which its subjects are what differs from the references


@dataclass(repr=False)
class MMD(Objective):
    """Descends the biased squared MMD between the generated samples (batch and memory) and a reference set.

    Its gradient is ``2/N^2 sum_j grad k(x, y_j) - 2/(N R) sum_r grad k(x, r)`` (Sani, Jamali, Jalali, Farnia 2026), with N
    samples in batch and memory. ``value`` is ``-MMD^2`` without the terms that do not depend on the batch.

    Args:
        reference: samples ``[m, ...]`` of the same space as the generated ones; 16 or more.
        kernel: by default the cubic polynomial kernel of KID; an open bandwidth is fitted to the reference set.
        reference_prompts: prompt features ``[m, p]``; the kernel is then multiplied by ``prompt_kernel``, and each prompt
            moves toward references of similar prompts.
        prompt_kernel: by default Gaussian with bandwidth 0.35, on unit-norm prompt features.
        feature_map: random features of the kernel (Gaussian or Laplacian): memory and reference are then one sum each.
        prompt_feature_map: random features of the prompt kernel; needed with ``feature_map`` and ``reference_prompts``.
        normalize: whether samples are scaled to norm 1 first.

    Raises:
        TypeError: for a kernel without a closed-form gradient.
        ValueError: by ``value`` and ``gradient``, for samples of another width than the references.
    """

    has_reference: ClassVar[bool] = True
    reference: Tensor
    kernel: Kernel = field(default_factory=PolynomialKernel)
    reference_prompts: Tensor | None = None
    prompt_kernel: Kernel = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))
    feature_map: RandomFourierFeatures | None = None
    prompt_feature_map: RandomFourierFeatures | None = None
    normalize: bool = False

    def __post_init__(self):
        self.kernel, self.prompt_kernel = differentiable(self.kernel), as_kernel(self.prompt_kernel)
        self.conditional = self.reference_prompts is not None
        if self.feature_map is not None and self.conditional:
            need_prompt_feature_map("a prompt-aware MMD", self.prompt_feature_map)
        self._reference = MMD.make_memory(self)
        self._reference.add(self.reference, self.reference_prompts)
        self.fitted: Kernel | None = None

    def make_memory(self) -> Memory:
        if self.feature_map is None:
            return MemoryBank()
        return RandomFeatureMemory(self.feature_map, self.prompt_feature_map if self.conditional else None, self.normalize)

    def advice(self, prompts: int, memory: Memory) -> str | None:
        if self.conditional or prompts >= FEW_PROMPTS or len(memory) >= FEW_ROWS:
            return None
        batch = "a batch of one prompt" if prompts == 1 else f"a batch of {prompts} prompts"
        return (
            f"without a baseline, {batch} differs from the references first of all in subjects, so it is spread, and its "
            "style hardly moves. For a style or domain: MMDGuidance(reference, baseline=make_baseline(pipe)), or "
            f"toward_reference(pipe, images); for a whole distribution: {FEW_PROMPTS} prompts or more in a batch, or "
            "reference_prompts="
        )

    def _check_batch(self, x: Tensor, prompt_features: Tensor | None) -> None:
        width = math.prod(self._reference.shape or ())
        if x.shape[-1] != width:
            raise ValueError(
                f"the reference set has rows of length {width}, samples have {x.shape[-1]}; encode the references with "
                "this pipeline's autoencoder at the generated resolution"
            )
        if self.conditional and prompt_features is None:
            raise ValueError("a prompt-aware MMD needs prompt features, but this call has none; omit reference_prompts")

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Pairs:
        """Pairs within the batch, with the memory and with the reference set; coefficients for random features."""
        self._check_batch(x, prompt_features)
        t = self._prompts(prompt_features)
        size = len(x) + (0 if memory is None else len(memory))
        inside = torch.ones(len(x), len(x), dtype=x.dtype, device=x.device)
        if self.feature_map is not None:
            if self.prompt_feature_map is not None and t is not None:
                psi = self.prompt_feature_map(t)
                inside = (psi @ psi.mT).to(x)
            toward = self._reference.coefficients(t, x) / (len(self._reference) * size)
            away = memory.coefficients(t, x) / size**2 if memory is not None and len(memory) else 0.0
            return Pairs(inside, coefficients=toward - away, size=size)
        if t is not None:
            inside = self.prompt_kernel(t, t).to(x)
        prompt_weights = PromptWeights(self.prompt_kernel, 1) if self.conditional else None
        reference = self._select(t, self._reference, prompt_weights)
        assert reference is not None
        if self.fitted is None:  # once, from the reference set: a fixed target needs a fixed bandwidth
            all_references = self._select(None, self._reference, None)
            assert all_references is not None
            self.fitted = self.kernel.fit(all_references.rows(x))
        return Pairs(inside, self._select(t, memory, prompt_weights), reference, size=size)

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory)
        n, m = pairs.size, len(self._reference)
        if self.feature_map is not None:
            phi = self.feature_map(x)
            return 2 * (phi * pairs.coefficients).sum() - (pairs.inside * (phi @ phi.mT)).sum() / n**2
        kernel = self.fitted
        assert kernel is not None

        def total(selection: Selection | None) -> Tensor:
            if selection is None:
                return x.new_zeros(())
            weights = selection.vectors(x)[2]
            return (selection.kernel(kernel, x) * (1.0 if weights is None else weights)).sum()

        inside = (kernel(x, x) * pairs.inside).sum() + 2 * total(pairs.selection)
        return -inside / n**2 + 2 * total(pairs.reference) / (n * m)

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Gradient:
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory) if pairs is None else pairs
        n, m = pairs.size, len(self._reference)
        if self.feature_map is not None:
            return Gradient(self.feature_map.vjp(x, 2 * (pairs.coefficients - pairs.inside @ self.feature_map(x) / n**2)))
        assert self.fitted is not None
        assert pairs.reference is not None
        g = 2 / (n * m) * pairs.reference.kernel_gradient(self.fitted, x)[0]
        g = g - 2 / n**2 * self.fitted.vjp(x, x, pairs.inside)
        if pairs.selection is not None:
            g = g - 2 / n**2 * pairs.selection.kernel_gradient(self.fitted, x)[0]
        return Gradient(g)
