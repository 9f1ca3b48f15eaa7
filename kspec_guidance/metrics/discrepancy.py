"""Streaming MMD."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import Kernel, PolynomialKernel
from kspec_guidance.metrics.base import StreamingMetric, StreamMap

__all__ = ["MMDScore"]


class MMDScore(StreamingMetric):
    """Squared maximum mean discrepancy of a stream and a reference stream.

    The cubic polynomial kernel of KID, the default, would need moments of order 3, ``d^3`` numbers, so
    all rows are kept, as in torchmetrics' KID. Gaussian, Laplacian and cosine kernels keep sums only.

    Args:
        kernel: ``PolynomialKernel()`` by default.
        unbiased: Gretton et al. (2012), equation 3 instead of the biased equation 5.
        num_features: number of random features.
        seed: of the random features.

    >>> from kspec_guidance.kernels import CosineKernel
    >>> metric = MMDScore(CosineKernel(), unbiased=False)
    >>> metric.update(torch.eye(2)[:1], real=True); metric.update(torch.eye(2)[1:])
    >>> metric.compute().item()
    2.0
    """

    higher_is_better = False
    counts = ("count", "count_real")

    def __init__(
        self,
        kernel: Kernel | None = None,
        unbiased: bool = True,
        num_features: int = 2048,
        seed: int = 0,
        groups: int = 1,
        **kwargs: Any,
    ):
        super().__init__(groups, **kwargs)
        self.kernel, self.unbiased = kernel or PolynomialKernel(), unbiased
        self.keeps_rows = isinstance(self.kernel, PolynomialKernel)
        self.map = None if self.keeps_rows else StreamMap(self.kernel, num_features, seed)
        if self.keeps_rows and groups > 1:
            raise ValueError(
                "groups > 1 is not available for the polynomial kernel, which keeps rows; use a Gaussian kernel"
            )
        for name in ("rows", "rows_real") if self.keeps_rows else ():
            self.add_state(name, [], dist_reduce_fx="cat", persistent=True)
        if not self.keeps_rows:
            self.sums = ("total", "total_real", "squares", "squares_real")
            for name in self.sums:
                self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def update(self, x: Tensor, real: bool = False) -> None:
        """Add rows ``[n, d]`` to the samples, or to the reference if ``real``.

        Raises:
            ValueError: for NaN, or another width than before.
        """
        x, name = self._rows(x), "_real" if real else ""
        if not len(x):
            return
        if self.map is None:
            getattr(self, f"rows{name}").append(x)
        else:
            phi = self.map(x).double()
            self._accumulate(f"total{name}", f"count{name}", torch.ones_like(phi[:, :1]), phi)
            self._accumulate(
                f"squares{name}", f"count{name}", torch.ones_like(phi[:, :1]), phi.square().sum(1, keepdim=True)
            )
        self._counted(len(x), f"count{name}")

    def _of(self, count: str) -> str:
        return " of the reference (real=True)" if count == "count_real" else ""

    def _score(self, keep: Tensor) -> Tensor:
        from kspec_guidance.functional.discrepancy import from_sums, mmd

        n, m = int(self.count[keep].sum()), int(self.count_real[keep].sum())
        for size, count in ((n, "count"), (m, "count_real")):
            if size < (2 if self.unbiased else 1):
                raise ValueError(
                    f"too few samples{self._of(count)}: {size}; the unbiased MMD needs at least two in each set"
                )
        if self.map is None:
            x, y = (torch.cat(list(r)) if isinstance(r, list) else r for r in (self.rows, self.rows_real))
            return mmd(x, y, self.kernel, self.unbiased).to(self.device)
        a, b, aa, bb = (getattr(self, name)[keep].sum(0) for name in ("total", "total_real", "squares", "squares_real"))
        return from_sums(a[0], aa[0, 0], n, b[0], bb[0, 0], m, self.unbiased)

    def record(self) -> dict[str, Any]:
        settings = {"kernel": repr(self.kernel), "features": "exact"} if self.map is None else self.map.record()
        return {**super().record(), "unbiased": self.unbiased, **settings}
