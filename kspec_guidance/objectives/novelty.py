"""Novelty: away from a fixed reference set."""

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel
from kspec_guidance.memory import Memory
from kspec_guidance.objectives.base import Pairs, need_prompt_feature_map
from kspec_guidance.objectives.rke import RKE

__all__ = ["Novelty"]


@dataclass(repr=False)
class Novelty(RKE):
    """Descends ``E = sum_r k(x, r)^2`` over a fixed reference set; pairs with batch and memory are not included.

    Args:
        kernel, feature_map, normalize: see :class:`~kspec_guidance.objectives.RKE`.
        reference: samples ``[m, ...]`` of the same space as the generated ones.
        reference_prompts: prompt features ``[m, p]``; only references of similar prompts then repel.
        prompt_kernel, prompt_feature_map: see :class:`~kspec_guidance.objectives.ConditionalRKE`; used with
            ``reference_prompts``.

    Raises:
        ValueError: without ``reference``.
    """

    has_reference: ClassVar[bool] = True
    prompt_kernel: Kernel | None = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))
    prompt_feature_map: RandomFourierFeatures | None = None
    reference: Tensor | None = None
    reference_prompts: Tensor | None = None
    recalls = False  # its selection are references, of which all repel

    def __post_init__(self):
        super().__post_init__()
        self.conditional = self.reference_prompts is not None
        if self.reference is None:
            raise ValueError("Novelty needs reference=, a tensor [m, ...] of samples to avoid")
        if not self.conditional:
            self.prompt_kernel = None
        elif self.feature_map is not None:
            self._squared_prompt_map = need_prompt_feature_map("Novelty", self.prompt_feature_map).power(2)
        self._reference = self.make_memory()
        self._reference.add(self.reference, self.reference_prompts)

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Pairs:
        """Pairs with the reference set only; ``effective_count`` includes the batch."""
        found = super().pairs(x, prompt_features, self._reference)
        return Pairs(torch.zeros_like(found.inside), found.selection, None, found.coefficients, found.effective_count)
