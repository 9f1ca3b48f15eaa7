"""Streaming Vendi score and RKE."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.functional.vendi import entropy_of
from kspec_guidance.kernels import Kernel
from kspec_guidance.kernels.spectrum import check_order, truncate
from kspec_guidance.metrics.base import StreamingMetric, StreamMap

__all__ = ["RKEScore", "VendiScore"]


class VendiScore(StreamingMetric):
    """Vendi score of order q of a stream of feature rows, in one pass and constant memory.

    With the cosine kernel, the default, it is exact: the ``d x d`` second moment has the spectrum of the kernel matrix.
    With a Gaussian or Laplacian kernel it is FKEA (Ospanov et al. 2024, arXiv 2407.02961): random Fourier features, with an
    error that decreases as ``num_features ** -0.5``.

    Args:
        kernel: ``CosineKernel()`` by default; a Gaussian or Laplacian kernel needs its bandwidth, e.g.
            ``GaussianKernel(median_bandwidth(some_rows))``.
        order: q in (0, inf].
        truncation: number of eigenvalues kept.
        num_features: number of random features.
        seed: of the random features.
        groups: number of groups for :meth:`interval`; memory is proportional to it.

    Raises:
        ValueError: for a kernel that cannot be streamed, an order outside (0, inf], or a truncation below 1.

    >>> import torch
    >>> metric = VendiScore()
    >>> metric.update(torch.eye(4)[:2]); metric.update(torch.eye(4)[2:])
    >>> round(metric.compute().item(), 6)
    4.0
    """

    sums = ("moment",)
    plot_lower_bound = 1.0

    def __init__(
        self,
        kernel: Kernel | None = None,
        order: float = 1.0,
        truncation: int | None = None,
        num_features: int = 2048,
        seed: int = 0,
        groups: int = 1,
        **kwargs: Any,
    ):
        super().__init__(groups, **kwargs)
        self.order, self.truncation = check_order(order), truncation
        truncate(torch.ones(1), truncation)  # checks it before the first batch
        self.map = StreamMap(kernel, num_features, seed)

    def update(self, x: Tensor) -> None:
        """Add rows ``[n, d]``.

        Raises:
            ValueError: for NaN, or another width than before.
        """
        self._add("moment", "count", self._rows(x), self.map)

    def _score(self, keep: Tensor) -> Tensor:
        return entropy_of(self._moment("moment", "count", keep), self.order, self.truncation, semidefinite=True).exp()

    def record(self) -> dict[str, Any]:
        return {**super().record(), "order": self.order, "truncation": self.truncation, **self.map.record()}


class RKEScore(VendiScore):
    """RKE (Jalali et al. 2023) of a stream: :class:`VendiScore` of order 2, without eigenvalues."""

    def __init__(
        self, kernel: Kernel | None = None, num_features: int = 2048, seed: int = 0, groups: int = 1, **kwargs: Any
    ):
        super().__init__(kernel, 2.0, None, num_features, seed, groups, **kwargs)
