"""Balance: moves samples toward one of several reference sets, by the witness function of the MMD."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import GaussianKernel, Kernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory
from kspec_guidance.objectives.base import Gradient, Objective, natural_rows

__all__ = ["Balance"]


@dataclass(repr=False)
class Balance(Objective):
    """Ascends ``mean_r k(x, r) - mean_s k(x, s)``, with the references r of the sample's attribute and s of all others.

    This is the witness function of the MMD between the attribute's distribution and the others' (Gretton et al. 2012,
    section 2.3): features that the reference sets share, such as subjects, cancel.

    Args:
        references: samples ``[m_a, ...]`` of each attribute.
        kernel: by default Gaussian at the median distance of all references.
        normalize: whether samples are scaled to norm 1 first.

    Raises:
        ValueError: for reference sets that differ in shape, or samples of another width.
    """

    references: Sequence[Tensor]
    kernel: Kernel = field(default_factory=GaussianKernel)
    normalize: bool = False

    def __post_init__(self) -> None:
        rows = [natural_rows(r, self.normalize) for r in self.references]
        if len({r.shape[1] for r in rows}) != 1:
            raise ValueError(f"reference sets differ in shape: {[list(r.shape[1:]) for r in self.references]}")
        self._rows = torch.cat(rows)
        self._attribute = torch.cat([torch.full((len(r),), k) for k, r in enumerate(rows)])
        self.fitted = self.kernel.fit(self._rows)
        self.wanted: list[int] = []  # the attribute of each sample of the current batch

    def _weights(self, wanted: Sequence[int]) -> Tensor:
        own = torch.as_tensor(wanted)[:, None] == self._attribute
        return own / own.sum(1, keepdim=True) - ~own / (~own).sum(1, keepdim=True)

    def _inputs(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Samples, references and their weights ``[n, m]``."""
        x = as_float(x)
        if x.shape[1] != self._rows.shape[1]:
            raise ValueError(
                f"reference sets have rows of length {self._rows.shape[1]}, samples have {x.shape[1]}; encode the "
                "references with this pipeline's autoencoder at the generated resolution"
            )
        wanted = self.wanted if len(self.wanted) == len(x) else [0] * len(x)
        return x, self._rows.to(x), self._weights(wanted).to(x)

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x, rows, weights = self._inputs(x)
        return (self.fitted(x, rows) * weights).sum()

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Any = None,
    ) -> Gradient:
        x, rows, weights = self._inputs(x)
        return Gradient(self.fitted.vjp(x, rows, weights))

    def assign(self, x: Tensor) -> list[int]:
        """The attribute of each sample ``[n, ...]``: that of the reference set with the largest mean kernel."""
        k = self.fitted(natural_rows(x, self.normalize).to(self._rows), self._rows)
        means = torch.stack([k[:, self._attribute == a].mean(1) for a in range(len(self.references))], 1)
        return means.argmax(1).tolist()
