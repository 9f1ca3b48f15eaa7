"""Vendi of any order."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel
from kspec_guidance.kernels.distances import as_float, squared_distances
from kspec_guidance.kernels.spectrum import check_order, renyi_entropy
from kspec_guidance.memory import CentroidMemory, Memory, MemoryBank, PromptWeights
from kspec_guidance.memory.reductions import nearest_rows
from kspec_guidance.objectives.base import Objective, need_closed_form, off_diagonal, weighted_median

__all__ = ["Vendi"]


@dataclass
class Vendi(Objective):
    """Renyi entropy of order q (the logarithm of the Vendi score) of the batch and the nearest memory rows, ascended.

    The gradient is closed too: ``dH/dK = V diag(h'(l)) V' / N`` on the eigenpairs of ``K / N``, then the kernel's own. With
    prompts the matrix is ``K o K_T``.

    Args:
        kernel: with unit diagonal and closed form; cosine by default.
        order: q in (0, inf].
        prompt_kernel: makes it conditional.
        max_rows: memory rows that take part, those most like the batch among the rows of similar prompts, since
            eigenvalues cost ``N^3``. An open Gaussian kernel gets the median distance of all pairs that take part,
            weighted by how much their prompts are alike.
    """

    kernel: Kernel = field(default_factory=CosineKernel)
    order: float = 1.0
    prompt_kernel: Kernel | None = None
    max_rows: int = 128
    unit: bool = True

    def __post_init__(self):
        need_closed_form(self.kernel)
        check_order(self.order)
        if type(self.kernel).diagonal is not Kernel.diagonal:
            raise ValueError(f"the Vendi objective needs a kernel with k(x, x) = 1, not {self.kernel!r}")
        self.conditional = self.prompt_kernel is not None

    def mass(self, n: int, t: Tensor | None = None, memory: Memory | None = None) -> Tensor | None:
        return self._mass(n, t, memory, self.prompt_kernel)

    def _gram(self, x: Tensor, t: Tensor | None, memory: Memory | None) -> tuple[Tensor, Kernel, Tensor | float]:
        """All rows ``[N, d]``, the fitted kernel and the prompt weights ``[N, N]``; memory rows are the nearest ones."""
        t = self._prompts(t)
        weigh = None if self.prompt_kernel is None else PromptWeights(self.prompt_kernel)
        selection, rows, every = self._select(t, memory, weigh), x[:0], t
        if selection is not None and len(selection):
            pick = nearest_rows(x, selection, self.max_rows)
            rows = selection.rows(x, pick)
            if t is not None and isinstance(memory, MemoryBank | CentroidMemory):
                s = memory.prompts_at(pick if selection.places is None else selection.places[pick])
                every = None if s is None else torch.cat([t, s.to(t)])
        z = torch.cat([x, rows])
        weight: Tensor | float = 1.0
        if every is not None and self.prompt_kernel is not None:
            weight = self.prompt_kernel(every)
        return z, self._fit(z, weight), weight

    @torch.no_grad()
    def _fit(self, z: Tensor, weight: Tensor | float) -> Kernel:
        """The kernel, an open Gaussian's bandwidth set to the median distance of pairs of similar prompts."""
        if not self.kernel.open or not isinstance(self.kernel, GaussianKernel):
            return self.kernel.fit(z.detach())
        d = squared_distances(z).sqrt()
        w = off_diagonal(len(z), z) * weight * (d > 1e-3 * d.max())  # rounding keeps duplicates from distance 0
        return GaussianKernel(weighted_median(d, w) or 1.0)

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        z, kernel, weight = self._gram(as_float(x), t, memory)
        matrix = (kernel(z) * weight).double() / len(z)
        l = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).clamp_min(0)
        return renyi_entropy(l / l.sum(), self.order)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x = as_float(x)
        z, kernel, weight = self._gram(x, t, memory)
        if jitter is not None and len(z) > 1:
            d2 = squared_distances(x, z)
            d2[:, : len(x)].fill_diagonal_(float("inf"))
            z[: len(x)] += jitter * (d2.amin(1) < 1e-10)[:, None]
        matrix = (kernel(z) * weight).double() / len(z)
        l, v = torch.linalg.eigh((matrix + matrix.mT) / 2)
        slope = self._slope(l.clamp_min(0))
        outer = ((v * slope) @ v.mT / len(z)).to(x) * weight
        outer.fill_diagonal_(0)  # k(z, z) is constant
        return kernel.vjp(z[: len(x)], z, 2 * outer[: len(x)])

    def _slope(self, l: Tensor) -> Tensor:
        """``dH / dl`` on the simplex, 0 for eigenvalues that are rounding noise."""
        alive = l > len(l) * torch.finfo(l.dtype).eps * l.max()
        safe = torch.where(alive, l, 1.0)
        if self.order == 1:
            slope = -safe.log() - 1
        elif self.order == float("inf"):
            top = l == l.max()
            slope = top.to(l) / (-l.max() * top.sum())
        else:
            q = self.order
            slope = q / (1 - q) * safe.pow(q - 1) / torch.where(alive, safe.pow(q), 0).sum()
        return torch.where(alive, slope, 0)
