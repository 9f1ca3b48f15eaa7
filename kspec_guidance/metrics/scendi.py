"""Streaming Scendi."""

from typing import Any

from torch import Tensor

from kspec_guidance.functional.inputs import check_paired
from kspec_guidance.functional.scendi import schur_parts, unnormalised_score
from kspec_guidance.kernels import Kernel
from kspec_guidance.metrics.base import StreamingMetric, StreamMap

__all__ = ["ScendiScore"]


class ScendiScore(StreamingMetric):
    """Scendi (Ospanov et al. 2024, arXiv 2412.18645): diversity of the images that their prompts do not explain.

    Args:
        kernel: cosine by default: exact, for embeddings such as CLIP's. Gaussian and Laplacian kernels use random
            features.
        part: ``images`` for the score, ``prompts`` for the part of the diversity that the prompts explain.
        num_features: number of random features.
        seed: of the random features.
        groups: number of groups for :meth:`interval`.

    >>> import torch
    >>> metric = ScendiScore()
    >>> metric.update(torch.eye(4), torch.eye(4))  # the prompts determine the images
    >>> round(metric.compute().item(), 6)
    1.0
    """

    sums, crossed = ("c_xx", "c_xt", "c_tt"), ("c_xt",)
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

    def update(self, x: Tensor, prompt_features: Tensor) -> None:
        """Add samples ``[n, d]`` and their prompt features ``[n, p]``.

        Raises:
            ValueError: for NaN, other widths than before, or different numbers of rows.
        """
        x, prompt_features = self._rows(x), self._rows(prompt_features, "prompt_features")
        if len(x) == 0 == len(prompt_features):
            return
        check_paired(x, prompt_features)
        a, b = self.map(x), self.map(prompt_features)
        self._accumulate("c_xx", "count", a)
        self._accumulate("c_xt", "count", a, b)
        self._accumulate("c_tt", "count", b)
        self._counted(len(x), "count")

    def _score(self, keep: Tensor) -> Tensor:
        own, explained = schur_parts(*(self._moment(name, "count", keep) for name in self.sums))
        return unnormalised_score(own if self.part == "images" else explained)

    def record(self) -> dict[str, Any]:
        return {**super().record(), "part": self.part, **self.map.record()}
