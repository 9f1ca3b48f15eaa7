"""Balance: toward one of several reference sets, by the witness function of the MMD."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.kernels import GaussianKernel, Kernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory
from kspec_guidance.objectives.base import Objective, natural_rows

__all__ = ["Balance"]


@dataclass
class Balance(Objective):
    """Ascend ``mean_r k(x, r) - mean_s k(x, s)``, r the references of the sample's own attribute, s those of all others.

    That is the witness function of the MMD between the attribute's distribution and the others' (Gretton et al. 2012,
    section 2.3): what the two reference sets share, their subjects, drops out of it.

    Args:
        references: ``[m_a, ...]`` for each attribute.
        kernel: Gaussian at the median distance of all references by default.
    """

    references: Sequence[Tensor]
    kernel: Kernel = field(default_factory=GaussianKernel)
    unit: bool = False

    def __post_init__(self) -> None:
        rows = [natural_rows(r, self.unit) for r in self.references]
        if len({r.shape[1] for r in rows}) != 1:
            raise ValueError(f"reference sets differ in shape: {[list(r.shape[1:]) for r in self.references]}")
        self._rows = torch.cat(rows)
        self._owner = torch.cat([torch.full((len(r),), k) for k, r in enumerate(rows)])
        self.fitted = self.kernel.fit(self._rows)
        self.wanted: list[int] = []

    def _weights(self, wanted: Sequence[int]) -> Tensor:
        own = torch.as_tensor(wanted)[:, None] == self._owner
        return own / own.sum(1, keepdim=True) - ~own / (~own).sum(1, keepdim=True)

    def _check(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = as_float(x)
        if x.shape[1] != self._rows.shape[1]:
            raise ValueError(
                f"reference sets hold rows of {self._rows.shape[1]} numbers, samples have {x.shape[1]}; encode the "
                "references with this pipeline's autoencoder at the resolution that is generated"
            )
        wanted = self.wanted if len(self.wanted) == len(x) else [0] * len(x)
        return x, self._rows.to(x), self._weights(wanted).to(x)

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x, rows, weights = self._check(x)
        return (self.fitted(x, rows) * weights).sum()

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x, rows, weights = self._check(x)
        return self.fitted.vjp(x, rows, weights)

    def assign(self, x: Tensor) -> list[int]:
        """The attribute of each sample ``[n, ...]``: that of the reference set with the largest mean kernel."""
        k = self.fitted(natural_rows(x, self.unit).to(self._rows), self._rows)
        means = torch.stack([k[:, self._owner == a].mean(1) for a in range(len(self.references))], 1)
        return means.argmax(1).tolist()
