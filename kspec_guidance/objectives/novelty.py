"""Novelty: away from a fixed reference set."""

from dataclasses import dataclass, field

from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel, Kernel
from kspec_guidance.memory import Memory, Selection
from kspec_guidance.objectives.base import PROMPT_BANDWIDTH, need_prompt_features
from kspec_guidance.objectives.rke import RKE

__all__ = ["Novelty"]


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
            self._squared_prompts = need_prompt_features("Novelty", self.prompt_features).power(2)
        self._reference = self.make_memory()
        self._reference.add(self.reference, self.reference_prompts)

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        return super().value(x, t, self._reference)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        return super().gradient(x, t, self._reference, jitter)

    def _terms(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> tuple[Selection | None, Tensor]:
        selection, inside = super()._terms(x, t, memory)
        return selection, inside * 0

    def mass(self, n: int, t: Tensor | None = None, memory: Memory | None = None) -> Tensor | None:
        return super().mass(n, t, self._reference)

    def _feature_pull(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        phi, outside, inside = super()._feature_pull(x, t, memory)
        return phi, outside, inside * 0
