"""Conditional scores of streamed samples and their prompts."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import check_paired
from kspec_guidance.functional.vendi import entropy_of
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.kernels.spectrum import check_order
from kspec_guidance.metrics.base import StreamingMetric, StreamMap

__all__ = ["ConditionalRKEScore", "ConditionalVendiScore", "InformationVendiScore"]


class _PromptMetric(StreamingMetric):
    """Second moments of random features of samples, prompts, and both together.

    The product of two Gaussian kernels is one Gaussian kernel of the two vectors side by side, each divided by its
    bandwidth: so joint features have the same size as the others.
    """

    sums: tuple[str, ...] = ("moment_prompts", "moment_both")
    plot_lower_bound = 1.0

    def __init__(
        self,
        kernel: GaussianKernel | None = None,
        prompt_kernel: GaussianKernel | None = None,
        order: float = 1.0,
        num_features: int = 2048,
        seed: int = 0,
        groups: int = 1,
        **kwargs: Any,
    ):
        super().__init__(groups, **kwargs)
        self.kernel, self.prompt_kernel = kernel or GaussianKernel(0.7), prompt_kernel or GaussianKernel(0.35)
        self._bandwidths = self._bandwidth("kernel", self.kernel), self._bandwidth("prompt_kernel", self.prompt_kernel)
        self.order = check_order(order)
        self.map = StreamMap(GaussianKernel(1.0), num_features, seed)

    @staticmethod
    def _bandwidth(name: str, kernel: GaussianKernel) -> float:
        if not isinstance(kernel, GaussianKernel) or kernel.bandwidth is None:
            raise ValueError(
                f"{name} must be a GaussianKernel with its bandwidth for streaming joint scores, got {kernel!r}; "
                "kspec_guidance.functional accepts any kernel"
            )
        return kernel.bandwidth

    def update(self, x: Tensor, prompt_features: Tensor) -> None:
        """Add samples ``[n, d]`` and their prompt features ``[n, p]``; both are scaled to norm 1.

        Raises:
            ValueError: for NaN, other widths than before, or different numbers of rows.
        """
        x, prompt_features = self._rows(x), self._rows(prompt_features, "prompt_features")
        if len(x) == 0 == len(prompt_features):
            return
        x, prompt_features = check_paired(x, prompt_features)
        a = l2_normalize(x) / self._bandwidths[0]
        b = l2_normalize(prompt_features) / self._bandwidths[1]
        parts = {"moment_samples": a, "moment_prompts": b, "moment_both": torch.cat([a, b.to(a)], dim=1)}
        for name in self.sums:
            self._accumulate(name, "count", self.map(parts[name]))
        self._counted(len(x), "count")

    def _entropy(self, name: str, keep: Tensor) -> Tensor:
        return entropy_of(self._moment(name, "count", keep), self.order)

    def record(self) -> dict[str, Any]:
        kernels = {"kernel": repr(self.kernel), "prompt_kernel": repr(self.prompt_kernel)}
        return {**super().record(), "order": self.order, **self.map.record(), **kernels}


class ConditionalVendiScore(_PromptMetric):
    """Conditional-Vendi ``exp(H(X, T) - H(T))`` (Jalali et al. 2024, arXiv 2411.02817) of a stream of unit-norm rows.

    Args:
        kernel, prompt_kernel: Gaussian, with bandwidths for rows of norm 1: 0.7 and 0.35 by default, within the ranges
            published for image and CLIP text features.
        order: q in (0, inf].
        num_features: number of random features.
        seed: of the random features.
        groups: number of groups for :meth:`interval`.

    >>> metric = ConditionalVendiScore(num_features=512)
    >>> metric.update(torch.eye(4), torch.ones(4, 2))
    >>> round(metric.compute().item(), 1)  # one prompt, four images at distance 1.4: two bandwidths
    3.9
    """

    def _score(self, keep: Tensor) -> Tensor:
        return (self._entropy("moment_both", keep) - self._entropy("moment_prompts", keep)).exp()


class ConditionalRKEScore(ConditionalVendiScore):
    """Conditional RKE, the objective of SPARKE: :class:`ConditionalVendiScore` of order 2, without eigenvalues."""

    def __init__(
        self,
        kernel: GaussianKernel | None = None,
        prompt_kernel: GaussianKernel | None = None,
        num_features: int = 2048,
        seed: int = 0,
        groups: int = 1,
        **kwargs: Any,
    ):
        super().__init__(kernel, prompt_kernel, 2.0, num_features, seed, groups, **kwargs)


class InformationVendiScore(_PromptMetric):
    """Information-Vendi ``exp(H(X) + H(T) - H(X, T))``: the part of the diversity that the prompts explain.

    Arguments are those of :class:`ConditionalVendiScore`.
    """

    sums = ("moment_samples", "moment_prompts", "moment_both")

    def _score(self, keep: Tensor) -> Tensor:
        h_x, h_t, h_joint = (self._entropy(name, keep) for name in self.sums)
        return (h_x + h_t - h_joint).exp()
