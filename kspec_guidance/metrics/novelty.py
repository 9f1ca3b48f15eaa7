"""Streaming KEN."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.functional.novelty import check_eta, entropy_of_mass
from kspec_guidance.kernels import Kernel
from kspec_guidance.kernels.spectrum import symmetric_eigenvalues
from kspec_guidance.metrics.base import StreamingMetric, StreamMap

__all__ = ["KENScore"]


class KENScore(StreamingMetric):
    """Kernel-based entropic novelty (Zhang et al. 2024, arXiv 2402.17287) of a stream against a reference stream.

    With the cosine kernel, the default, it is exact; with a Gaussian or Laplacian kernel it is FINC (arXiv 2412.02700):
    random Fourier features.

    Args:
        kernel: cosine by default.
        eta: modes count that are more than ``eta`` times as frequent as in the reference.
        reset_real_features: whether ``reset()`` clears the reference too, as in torchmetrics' FID.
        num_features: number of random features.
        seed: of the random features.
        groups: number of groups for :meth:`interval`.

    >>> metric = KENScore()
    >>> metric.update(torch.eye(4)[:1], real=True); metric.update(torch.eye(4))
    >>> round(metric.compute().item(), 4)  # 3 of 4 modes are new
    0.824
    """

    sums = ("moment", "moment_real")
    counts = ("count", "count_real")

    def __init__(
        self,
        kernel: Kernel | None = None,
        eta: float = 1.0,
        num_features: int = 2048,
        seed: int = 0,
        groups: int = 1,
        reset_real_features: bool = True,
        **kwargs: Any,
    ):
        super().__init__(groups, **kwargs)
        check_eta(eta)
        self.eta, self.reset_real_features = eta, reset_real_features
        self.map = StreamMap(kernel, num_features, seed)

    def update(self, x: Tensor, real: bool = False) -> None:
        """Add rows ``[n, d]`` to the samples, or to the reference if ``real``.

        Raises:
            ValueError: for NaN, or another width than before.
        """
        name = "_real" if real else ""
        self._add(f"moment{name}", f"count{name}", self._rows(x), self.map)

    def reset(self) -> None:
        """Clear the samples, and the reference unless ``reset_real_features`` is False."""
        kept = {n: getattr(self, n) for n in ("moment_real", "count_real")}
        super().reset()
        if not self.reset_real_features:
            for name, value in kept.items():
                setattr(self, name, value)

    def _of(self, count: str) -> str:
        return " of the reference (real=True)" if count == "count_real" else ""

    def difference(self, keep: Tensor | None = None) -> Tensor:
        """``C_X - eta C_ref`` ``[D, D]``; its top eigenvectors are the novel modes."""
        keep = torch.ones(self.groups, dtype=torch.bool, device=self.device) if keep is None else keep
        return self._moment("moment", "count", keep) - self.eta * self._moment("moment_real", "count_real", keep)

    def _score(self, keep: Tensor) -> Tensor:
        return entropy_of_mass(symmetric_eigenvalues(self.difference(keep)))

    def record(self) -> dict[str, Any]:
        return {**super().record(), "eta": self.eta, **self.map.record()}
