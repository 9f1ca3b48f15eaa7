"""RKE and conditional RKE (SPARKE): descent of sums of squared kernels."""

import warnings
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel, pairwise_distances
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.kernels.distances import MEDIAN_ROWS, as_float, evenly_spaced
from kspec_guidance.kernels.stationary import weighted_median
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, RandomFeatureMemory
from kspec_guidance.objectives.base import (
    SAMPLE_BANDWIDTH,
    Gradient,
    Objective,
    Pairs,
    differentiable,
    need_prompt_feature_map,
    off_diagonal,
)
from kspec_guidance.utils.devices import transfer

__all__ = ["RKE", "ConditionalRKE"]

COINCIDENT = 1 - 2e-4  # squared kernel above which two entries are treated as one point
DISTINCT = 1e-3  # share of the largest distance below which two rows are duplicates, whose distance is rounding noise


@dataclass(repr=False)
class RKE(Objective):
    """Ascends the order-2 Renyi entropy of batch and memory, i.e. descends ``E = sum over pairs of k(x_i, x_j)^2``.

    RKE is ``n^2 / ||K||_F^2`` (Jalali, Li, Farnia, NeurIPS 2023), so its ascent is the descent of the sum of squared
    kernels; pairs within the memory are constant. ``value`` is ``-E``, each pair counted once.

    Args:
        kernel: kernel with a closed-form gradient; by default Gaussian at half the median distance of the pairs.
        feature_map: random Fourier features of the same kernel: the memory then has constant size.
        normalize: whether rows are scaled to norm 1 first.

    Raises:
        TypeError: for a kernel without a closed-form gradient.
    """

    kernel: Kernel = field(default_factory=GaussianKernel)
    feature_map: RandomFourierFeatures | None = None
    normalize: bool = True
    prompt_kernel: Kernel | None = field(default=None, init=False)
    prompt_feature_map: RandomFourierFeatures | None = field(default=None, init=False)
    measures_spread = True
    recalls = True

    def __post_init__(self):
        self.kernel = differentiable(self.kernel)
        self.prompt_kernel = None if self.prompt_kernel is None else as_kernel(self.prompt_kernel)
        self._squared_map = None if self.feature_map is None else self.feature_map.power(2)
        self._squared_prompt_map: RandomFourierFeatures | None = None
        self._warned = False

    def make_memory(self) -> Memory:
        if self._squared_map is None:
            return MemoryBank()
        return RandomFeatureMemory(self._squared_map, self._squared_prompt_map, self.normalize)

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Pairs:
        """The weights ``k_T(t_i, t_j)^2`` of all pairs; all are 1 without prompts."""
        t, inside = self._check_prompts(prompt_features, memory), off_diagonal(len(x), x)
        if self._squared_map is not None:
            return self._feature_pairs(x, t, memory, inside)
        if t is not None and self.prompt_kernel is not None:
            inside = inside * self.prompt_kernel(t, t).square().to(x)
        prompt_weights = None if self.prompt_kernel is None else PromptWeights(self.prompt_kernel)
        selection, count = self._select(t, memory, prompt_weights), inside.sum(1)
        if selection is not None:
            count = count + transfer(selection.effective_count(len(x)), count)
        return Pairs(inside, selection, effective_count=count)

    def fit(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Objective:
        if self.feature_map is not None or not self.kernel.open:
            return self
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory)
        return replace(self, kernel=self._fit(x, self._spread(_compared(x)[1], x, pairs), pairs))

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory)
        if self._squared_map is not None:
            phi = self._squared_map(x)
            outside = 0.0 if pairs.coefficients is None else (phi * pairs.coefficients).sum()
            return -outside - (pairs.inside * (phi @ phi.mT)).sum() / 2
        kernel = self._fit(x, self._spread(_compared(x.detach())[1], x, pairs), pairs)
        inside = -(kernel(x).square() * pairs.inside).sum() / 2
        if pairs.selection is None:
            return inside
        weights = pairs.selection.vectors(x)[2]
        return inside - (pairs.selection.kernel(kernel, x).square() * (1.0 if weights is None else weights)).sum()

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Pairs | None = None,
    ) -> Gradient:
        if pairs is None:
            x = as_float(x)
            pairs = self.pairs(x, prompt_features, memory)
        if self._squared_map is not None:
            if not self._warned and len(x) > 1:
                self._warned = True
                self._warn_if_unreliable(self._squared_map, float(pairwise_distances(x.detach()).median()))
            assert self.feature_map is not None
            spread = x.new_full((), (self.feature_map.kernel.bandwidth or 0.0) / SAMPLE_BANDWIDTH)
            return Gradient(self._feature_gradient(self._squared_map, x, pairs), spread=spread)
        centred, d2 = _compared(x)
        products = None if pairs.selection is None else pairs.selection.products(x)
        spread = self._spread(d2, x, pairs, products)
        kernel = self._fit(x, spread, pairs).squared()
        g, largest = self._descent(kernel, x, centred, d2, pairs, products)
        coincident = largest > COINCIDENT
        if jitter is not None:
            moved = x + jitter * coincident[:, None]
            g = torch.where(coincident[:, None], self._descent(kernel, moved, *_compared(moved), pairs)[0], g)
        return Gradient(g, pairs.effective_count, coincident, spread=spread)

    def spread(self, x: Tensor, pairs: Pairs) -> Tensor:
        return self._spread(_compared(x)[1], x, pairs)

    def _spread(self, d2: Tensor, x: Tensor, pairs: Pairs, products: Tensor | None = None) -> Tensor:
        """Median distance of the pairs, with their weights. Of a memory, about 128 evenly spaced rows are used."""
        with torch.no_grad():
            d, w = d2.sqrt(), pairs.inside
            if pairs.selection is not None:
                d_memory, w_memory = pairs.selection.distances(x, products=products)
                d, w = torch.cat([d, d_memory], 1), torch.cat([w, w_memory.expand_as(d_memory)], 1)
            return weighted_median(d, w * (d > DISTINCT * d.max()))

    def _fit(self, x: Tensor, spread: Tensor, pairs: Pairs) -> Kernel:
        """The fitted kernel; an open Gaussian gets half the median distance of the pairs.

        For other open kernels 2,048 rows of a memory are used.
        """
        if not self.kernel.open:
            return self.kernel.fit(x)
        if not isinstance(self.kernel, GaussianKernel):
            selection = pairs.selection
            rows = x[:0] if selection is None else selection.rows(x, evenly_spaced(len(selection), MEDIAN_ROWS))
            return self.kernel.fit_on_device(torch.cat([x, rows]).detach())
        median = SAMPLE_BANDWIDTH * spread
        return GaussianKernel(float(median) if x.device.type == "cpu" else median)  # type: ignore[arg-type]

    def _descent(
        self, squared: Kernel, x: Tensor, centred: Tensor, d2: Tensor, pairs: Pairs, products: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """``-dE/dx`` ``[n, d]`` and the largest squared kernel of each row with an entry of the same prompt ``[n]``."""
        radial = squared.of_distances(d2)
        if radial is not None:
            k, slope = radial
            w = pairs.inside * slope
            g = (torch.diag(w.sum(1)) - w) @ centred
        else:
            z = centred if squared.stationary else x
            products = z @ z.mT
            xx = products.diagonal()
            found = squared.of_products(products, xx[:, None], xx)
            if found is None:
                k, g = squared(x), -squared.vjp(x, x, pairs.inside)
            else:
                k, by_product, by_square = found
                g = -(pairs.inside * by_product + torch.diag(2 * (pairs.inside * by_square).sum(1))) @ z
        largest = (k * pairs.alike).amax(1)
        if pairs.selection is not None:
            memory_gradient, memory_largest = pairs.selection.kernel_gradient(squared, x, products)
            g, largest = g - memory_gradient, torch.maximum(largest, memory_largest)
        return g, largest

    def _feature_pairs(self, x: Tensor, t: Tensor | None, memory: Memory | None, inside: Tensor) -> Pairs:
        assert self._squared_map is not None
        coefficients = None if memory is None or not len(memory) else memory.coefficients(t, x)
        if self._squared_prompt_map is not None and t is not None:
            psi = self._squared_prompt_map(t)
            inside = inside * (psi @ psi.mT).to(x)
        return Pairs(inside, coefficients=coefficients)

    @staticmethod
    def _feature_gradient(squared_map: RandomFourierFeatures, x: Tensor, pairs: Pairs) -> Tensor:
        total = pairs.inside @ squared_map(x)
        return squared_map.vjp(x, -(total if pairs.coefficients is None else total + pairs.coefficients))

    @staticmethod
    def _warn_if_unreliable(squared_map: RandomFourierFeatures, typical: float) -> None:
        if squared_map.reliable(typical):
            return
        b, d, r = squared_map.kernel.bandwidth or 0.0, squared_map.input_dim, squared_map.num_features
        warnings.warn(
            f"{r} random features in {d} dimensions at bandwidth {b:.2g} (of the squared kernel; typical distance "
            f"{typical:.2g}) give poor gradients; leave feature_map=None for the exact sum, or use at least {8 * d} "
            f"features and a kernel bandwidth of at least {1.3 * typical:.2g}, or features of lower dimension",
            stacklevel=4,
        )


def _compared(x: Tensor) -> tuple[Tensor, Tensor]:
    """Centred rows ``[n, d]``, for which differences of squares keep precision, and their squared distances ``[n, n]``."""
    centred = x - x.mean(0)
    products = centred @ centred.mT
    xx = products.diagonal()
    return centred, torch.sub(xx[:, None] + xx, products, alpha=2).clamp_min(0)


@dataclass(repr=False)
class ConditionalRKE(RKE):
    """Ascends conditional RKE (SPARKE), i.e. descends ``E = sum over pairs of k(x_i, x_j)^2 k_T(t_i, t_j)^2``.

    Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173. Only images of similar prompts repel each other. Without prompt
    features it equals :class:`RKE`.

    Args:
        kernel, feature_map, normalize: see :class:`RKE`.
        prompt_kernel: by default Gaussian with bandwidth 0.35, on unit-norm prompt features.
        prompt_feature_map: random features of the prompt kernel; needed with ``feature_map``.
    """

    prompt_kernel: Kernel = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))  # type: ignore[assignment]
    prompt_feature_map: RandomFourierFeatures | None = None
    conditional = True

    def __post_init__(self):
        super().__post_init__()
        if self.feature_map is not None:
            self._squared_prompt_map = need_prompt_feature_map("ConditionalRKE", self.prompt_feature_map).power(2)
