"""Vendi of any order."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, Kernel, as_float, squared_distances
from kspec_guidance.memory import Memory, MemoryBank
from kspec_guidance.objectives.base import Objective, need_closed_form
from kspec_guidance.spectrum import check_order, renyi_entropy

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
        max_rows: memory rows that take part (those most like the batch), since eigenvalues cost ``N^3``.
    """

    kernel: Kernel = field(default_factory=CosineKernel)
    order: float = 1.0
    prompt_kernel: Kernel | None = None
    max_rows: int = 256
    unit: bool = True

    def __post_init__(self):
        need_closed_form(self.kernel)
        check_order(self.order)
        if type(self.kernel).diagonal is not Kernel.diagonal:
            raise ValueError(f"the Vendi objective needs a kernel with k(x, x) = 1, not {self.kernel!r}")
        self.conditional = self.prompt_kernel is not None

    def _gram(self, x: Tensor, t: Tensor | None, memory: Memory | None):
        """All rows ``[N, d]``, their kernel matrix and their prompt weights ``[N, N]``."""
        if memory is not None and not isinstance(memory, MemoryBank):
            raise TypeError(f"the Vendi objective needs the rows of a MemoryBank, got {type(memory).__name__}")
        rows, t = self._memory_rows(x, memory), self._prompts(t)
        s = memory.prompts if isinstance(memory, MemoryBank) and t is not None else None
        if len(rows) > self.max_rows:
            with torch.no_grad():
                near = self.kernel.fit(rows)(x, rows)
                if s is not None and t is not None and self.prompt_kernel is not None:
                    near = near * self.prompt_kernel(t, s.to(t))
                pick = near.amax(0).topk(self.max_rows).indices.sort().values
            rows, s = rows[pick], None if s is None else s[pick]
        z = torch.cat([x, rows])
        kernel = self.kernel.fit(z.detach())
        weight: Tensor | float = 1.0
        if t is not None and self.prompt_kernel is not None:
            every = t if s is None else torch.cat([t, s.to(t)])
            if len(every) == len(z):
                weight = self.prompt_kernel(every)
        return z, kernel, weight

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        z, kernel, weight = self._gram(as_float(x), t, memory)
        matrix = (kernel(z) * weight).double() / len(z)
        l = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).clamp_min(0)
        return renyi_entropy(l / l.sum(), self.order)

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x = as_float(x)
        if jitter is not None:
            old = squared_distances(x, self._memory_rows(x, memory))
            d2 = torch.cat([squared_distances(x).fill_diagonal_(1.0), old], 1)
            x = x + jitter * (d2.amin(1) < 1e-10)[:, None]
        z, kernel, weight = self._gram(x, t, memory)
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
