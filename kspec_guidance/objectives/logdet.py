"""The log determinant of a kernel matrix."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.kernels import ExpCosineKernel, Kernel
from kspec_guidance.kernels.distances import as_float, squared_distances
from kspec_guidance.memory import Memory
from kspec_guidance.objectives.base import Gradient
from kspec_guidance.objectives.vendi import NearRows, VendiPairs

__all__ = ["LogDet"]


@dataclass(repr=False)
class LogDet(NearRows):
    """Ascends ``log det(I + c K)`` of the batch and its nearest memory rows: given the memory, up to a constant.

    The determinant is the likelihood of a set under a determinantal point process (Kulesza, Taskar 2012,
    arXiv 1207.6083); OSCAR (arXiv 2510.09060) ascends it with the cosine kernel. Its gradient ``c (I + c K)^-1`` in ``K``
    is bounded, so copies of one sample need no care, and needs no eigenvalues and no copy to the host. With prompts the
    matrix is ``K o K_T``.

    Args:
        kernel: kernel with unit diagonal and a closed-form gradient; by default ``ExpCosineKernel()``, which has no
            bandwidth. An open Gaussian kernel gets the median distance of the pairs, as in
            :class:`~kspec_guidance.objectives.Vendi`.
        strength: c > 0; eigenvalues well below ``1 / c`` count for nothing.
        prompt_kernel, max_rows, normalize: see :class:`~kspec_guidance.objectives.Vendi`.

    Raises:
        TypeError: for a kernel without a closed-form gradient.
        ValueError: for a kernel whose diagonal is not 1, or a strength that is not positive.
    """

    kernel: Kernel = field(default_factory=ExpCosineKernel)
    strength: float = 4.0
    prompt_kernel: Kernel | None = None
    max_rows: int = 128
    normalize: bool = True

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.strength < float("inf"):
            raise ValueError(f"strength must be a positive finite number, got {self.strength!r}")

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        z, weights = self._rows(x, self.pairs(x, prompt_features, memory))
        kernel = self._fit(z, squared_distances(z.detach()), weights)
        return torch.logdet(self._shifted(kernel(z) * weights))

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: VendiPairs | None = None,
    ) -> Gradient:
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory) if pairs is None else pairs
        z, k, coincident, weights, kernel = self._matrix(x, pairs, jitter)
        outer = self.strength * torch.linalg.inv_ex(self._shifted(k)).inverse * weights
        outer.fill_diagonal_(0)  # k(z, z) is constant
        return Gradient(kernel.vjp(z[: len(x)], z, 2 * outer[: len(x)]), pairs.effective_count, coincident)

    def _shifted(self, k: Tensor) -> Tensor:
        return torch.eye(len(k), dtype=k.dtype, device=k.device) + self.strength * k
