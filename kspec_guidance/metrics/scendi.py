"""Scendi of a stream."""

from typing import Any

from torch import Tensor

from kspec_guidance.functional.inputs import check_paired
from kspec_guidance.functional.scendi import schur_parts, unnormalised_score
from kspec_guidance.kernels import Kernel
from kspec_guidance.metrics.base import StreamingMetric, StreamMap, flat_rows

__all__ = ["ScendiScore"]


class ScendiScore(StreamingMetric):
    """Scendi (Ospanov et al. 2024, arXiv 2412.18645): variety of the images that their prompts do not explain.

    Args:
        kernel: cosine by default: exact for CLIP-like embeddings; a Gaussian or Laplacian kernel goes by random features.
        part: ``images`` for the score, ``prompts`` for the part of the variety that the prompts explain.
        num_features, seed: of the random features.
        groups: for intervals.

    >>> import torch
    >>> metric = ScendiScore()
    >>> metric.update(torch.eye(4), torch.eye(4))  # the prompts determine the images
    >>> round(metric.compute().item(), 6)
    1.0
    """

    sums = ("c_xx", "c_xt", "c_tt")
    plot_lower_bound = 1.0

    def __init__(
        self,
        kernel: Kernel | None = None,
        part: str = "images",
        num_features: int = 512,
        seed: int = 0,
        groups: int = 1,
        **kwargs: Any,
    ):
        super().__init__(groups, **kwargs)
        if part not in ("images", "prompts"):
            raise ValueError(f"part must be 'images' or 'prompts', got {part!r}")
        self.part, self.map = part, StreamMap(kernel, num_features, seed)

    def update(self, x: Tensor, t: Tensor) -> None:
        """Take in rows ``[n, d]`` and their prompts' ``[n, p]``.

        Raises:
            ValueError: for NaN, other widths than before, or different numbers of rows.
        """
        x, t = flat_rows(x), flat_rows(t, "t")
        if len(x) == 0 == len(t):
            return
        check_paired(x, t)
        a, b = self.map(x), self.map(t)
        self._accumulate("c_xx", "count", a)
        self._accumulate("c_xt", "count", a, b)
        self._accumulate("c_tt", "count", b)
        self._counted(len(x), "count")

    def _score(self, keep: Tensor) -> Tensor:
        own, explained = schur_parts(*(self._moment(name, "count", keep) for name in self.sums))
        return unnormalised_score(own if self.part == "images" else explained)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "part": self.part, **self.map.record()}
