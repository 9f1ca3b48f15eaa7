"""The Vendi score of any order."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.kernels.distances import as_float, squared_distances
from kspec_guidance.kernels.spectrum import check_order, renyi_entropy
from kspec_guidance.kernels.stationary import weighted_median
from kspec_guidance.memory import Memory, PromptWeights
from kspec_guidance.objectives.base import Gradient, Objective, Pairs, differentiable, off_diagonal
from kspec_guidance.objectives.rke import DISTINCT
from kspec_guidance.utils.devices import transfer
from kspec_guidance.utils.transfer import read

__all__ = ["Vendi"]

COINCIDENT = 1e-10  # squared distance below which two entries are treated as one point
ROUNDING = 16  # likewise below this number of rounding units of the squared norm


@dataclass(frozen=True)
class VendiPairs(Pairs):
    """Pairs of a Vendi objective, with the prompt features ``[n, p]`` of the batch."""

    prompts: Tensor | None = None


class NearRows(Objective):
    """Base class of functions of the kernel matrix of a batch and the memory rows nearest to it.

    A subclass has the fields ``kernel``, ``prompt_kernel``, ``max_rows`` and ``normalize`` of :class:`Vendi`.
    """

    kernel: Kernel
    prompt_kernel: Kernel | None
    max_rows: int
    recalls = True

    def __post_init__(self):
        self.kernel = differentiable(self.kernel)
        self.prompt_kernel = None if self.prompt_kernel is None else as_kernel(self.prompt_kernel)
        if type(self.kernel).diagonal is not Kernel.diagonal:
            raise ValueError(f"the {type(self).__name__} objective needs a kernel with k(x, x) = 1, got {self.kernel!r}")
        self.conditional = self.prompt_kernel is not None

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> VendiPairs:
        """Prompt weights within the batch, and the relevant memory rows."""
        t, inside = self._prompts(prompt_features), off_diagonal(len(x), x)
        if t is not None and self.prompt_kernel is not None:
            inside = inside * self.prompt_kernel(t, t).square().to(x)
        prompt_weights = None if self.prompt_kernel is None else PromptWeights(self.prompt_kernel)
        selection, count = self._select(t, memory, prompt_weights), inside.sum(1)
        if selection is not None:
            count = count + transfer(selection.effective_count(len(x)), count)
        return VendiPairs(inside, selection, effective_count=count, prompts=t)

    def _rows(self, x: Tensor, pairs: VendiPairs) -> tuple[Tensor, Tensor | float]:
        """All rows ``[N, d]`` and the prompt weights ``[N, N]``; memory rows are the nearest ones."""
        selection, rows, prompts = pairs.selection, x[:0], pairs.prompts
        if selection is not None and len(selection):
            nearest = selection.nearest(x, self.max_rows)
            rows = selection.rows(x, nearest)
            if prompts is not None:
                memory_prompts = selection.prompts(prompts, nearest)
                prompts = None if memory_prompts is None else torch.cat([prompts, memory_prompts])
        z = torch.cat([x, rows])
        weights: Tensor | float = 1.0
        if prompts is not None and self.prompt_kernel is not None:
            weights = self.prompt_kernel.fit_on_device(prompts)(prompts).to(z)
        return z, weights

    @torch.no_grad()
    def _fit(self, z: Tensor, d2: Tensor, weights: Tensor | float) -> Kernel:
        """The fitted kernel; an open Gaussian gets the median distance of pairs of similar prompts."""
        if not self.kernel.open or not isinstance(self.kernel, GaussianKernel):
            return self.kernel.fit_on_device(z.detach())
        d = d2.sqrt()
        w = off_diagonal(len(z), z) * weights * (d > DISTINCT * d.max())
        return GaussianKernel(weighted_median(d, w))  # type: ignore[arg-type]

    def fit(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Objective:
        if not self.kernel.open:
            return self
        x = as_float(x)
        z, weights = self._rows(x, self.pairs(x, prompt_features, memory))
        return replace(self, kernel=self._fit(z, squared_distances(z), weights))  # type: ignore[type-var]

    def _matrix(
        self, x: Tensor, pairs: VendiPairs, jitter: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | float, Kernel]:
        """All rows ``[N, d]``, their matrix, the rows ``[n]`` that coincide, prompt weights, and the fitted kernel."""
        n, (z, weights) = len(x), self._rows(x, pairs)
        d2 = squared_distances(z)
        kernel, others = self._fit(z, d2, weights), d2[:n].clone()
        others[:, :n].fill_diagonal_(float("inf"))
        rounding = ROUNDING * torch.finfo(x.dtype).eps * (1.0 if self.normalize else x.square().sum(1))
        coincident = others.amin(1) < rounding + COINCIDENT
        if jitter is not None:
            z[:n] += jitter * coincident[:, None]
            d2 = squared_distances(z)
        k = kernel.of_distances(d2)[0] if isinstance(kernel, GaussianKernel) else kernel(z)
        return z, k * weights, coincident, weights, kernel


@dataclass(repr=False)
class Vendi(NearRows):
    """Ascends the Renyi entropy of order q (the logarithm of the Vendi score) of the batch and its nearest memory rows.

    The gradient is in closed form: ``dH/dK = V diag(h'(l)) V' / N`` from the eigenpairs of ``K / N``, followed by the
    gradient of the kernel. With prompts the matrix is ``K o K_T``.

    Args:
        kernel: kernel with unit diagonal and a closed-form gradient; cosine by default. An open Gaussian kernel gets the
            median distance of the pairs, weighted by the similarity of their prompts.
        order: q in (0, inf].
        prompt_kernel: kernel of prompt features; None ignores prompts.
        max_rows: maximum number of memory rows, the nearest to the batch with similar prompts, since eigenvalues cost
            ``N^3``.
        normalize: whether rows are scaled to norm 1 first.

    Raises:
        TypeError: for a kernel without a closed-form gradient.
        ValueError: for a kernel whose diagonal is not 1, or an order outside (0, inf].
    """

    kernel: Kernel = field(default_factory=CosineKernel)
    order: float = 1.0
    prompt_kernel: Kernel | None = None
    max_rows: int = 128
    normalize: bool = True

    def __post_init__(self):
        super().__post_init__()
        check_order(self.order)

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        z, weights = self._rows(x, self.pairs(x, prompt_features, memory))
        kernel = self._fit(z, squared_distances(z.detach()), weights)
        matrix = (kernel(z) * weights).cpu().double() / len(z)
        l = torch.linalg.eigvalsh((matrix + matrix.mT) / 2).clamp_min(0)
        return renyi_entropy(l / l.sum(), self.order)

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
        n, pairs = len(x), self.pairs(x, prompt_features, memory) if pairs is None else pairs
        z, k, coincident, weights, kernel = self._matrix(x, pairs, jitter)
        matrix, coincident = read(k, coincident)  # the host computes eigenvalues, in float64
        outer = transfer(self._matrix_gradient(matrix.double() / len(z)), x) * weights
        outer.fill_diagonal_(0)  # k(z, z) is constant
        g, finite = kernel.vjp(z[:n], z, 2 * outer[:n]), bool(torch.isfinite(matrix).all())
        return Gradient(g, pairs.effective_count, coincident > 0, finite)

    def _matrix_gradient(self, matrix: Tensor) -> Tensor:
        """``dH / dK`` ``[N, N]`` of ``K / N``; NaN for a matrix that is not finite."""
        if not bool(torch.isfinite(matrix).all()):
            return torch.full_like(matrix, float("nan"))
        l, v = torch.linalg.eigh((matrix + matrix.mT) / 2)
        return (v * self._slope(l.clamp_min(0))) @ v.mT / len(matrix)

    def _slope(self, l: Tensor) -> Tensor:
        """``dH / dl`` on the simplex, 0 for eigenvalues that are rounding noise."""
        nonzero = l > len(l) * torch.finfo(l.dtype).eps * l.max()
        safe = torch.where(nonzero, l, 1.0)
        if self.order == 1:
            slope = -safe.log() - 1
        elif self.order == float("inf"):
            top = l == l.max()
            slope = top.to(l) / (-l.max() * top.sum())
        else:
            q = self.order
            slope = q / (1 - q) * safe.pow(q - 1) / torch.where(nonzero, safe.pow(q), 0).sum()
        return torch.where(nonzero, slope, 0)
