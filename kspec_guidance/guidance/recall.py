"""How a memory repels: from the rows that a noisy sample is about to repeat, beside the objective within the batch."""

import math
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.objectives import Gradient, Objective, Pairs

__all__ = ["Recall", "sharpness"]

SHARPNESS = 8.0  # of the choice of rows, where noise and signal are about equal
SHARPEST = 1e4
COINCIDENT = 7e-3  # distance of rows of norm 1 up to which they are treated as one point


def sharpness(ratio: float | Tensor) -> float | Tensor:
    """``alpha |x| / sigma^2`` times a constant, for ``sigma / alpha = ratio`` and ``|x|^2`` like ``alpha^2 + sigma^2``."""
    if isinstance(ratio, Tensor):
        squared = ratio.square().clamp_min(1e-8)
        return (SHARPNESS * (1 / squared**2 + 1 / squared).sqrt()).clamp_max(SHARPEST)
    level = max(ratio**2, 1e-8)
    return min(SHARPNESS * math.sqrt(1 / level**2 + 1 / level), SHARPEST)


class Recall:
    """The objective's ascent within the batch, and the way from memory rows, each scaled to a largest of 1.

    An early clean prediction is a mean of what the sample may become: it is about as far from all earlier samples, and
    those of a batch are alike, so a sum over the memory moves them together. What a sample becomes is decided by the noisy
    sample. If that were a memory row ``m`` with noise, ``x = alpha m + sigma e``, the likelihood of the row would grow as
    ``exp(alpha x.m / sigma^2)``; samples move away from the mean of the rows in such proportion, at first of many, later of
    the nearest. Cosines are measured in their own standard deviation, since products of images have too many dimensions.

    Args:
        objective: an objective that ``recalls``.
        pairs: with the selected rows of a memory.
    """

    def __init__(self, objective: Objective, pairs: Pairs):
        assert pairs.selection is not None
        self.objective, self.pairs, self.selection = objective, pairs, pairs.selection
        self.batch = replace(pairs, selection=None)

    @classmethod
    def of(cls, objective: Objective, pairs: Any) -> "Recall | None":
        """None without memory rows, and for means of samples, each of which stands for many."""
        selection = pairs.selection if isinstance(pairs, Pairs) else None
        return None if selection is None or selection.means or not len(selection) else cls(objective, pairs)

    @cached_property
    def share(self) -> Tensor:
        """Share of the push within the batch: below 1 if its samples have unrelated prompts."""
        return self.pairs.inside.sum(1).amax().clamp(max=1)

    def gradient(
        self, u: Tensor, prompts: Tensor | None, jitter: Tensor | None, noisy: Tensor, ratio: float | Tensor
    ) -> Gradient:
        """The ascent ``[n, d]`` at clean predictions of norm 1.

        Args:
            u: clean predictions ``[n, d]``.
            prompts: prompt features ``[n, p]``.
            jitter: as for :meth:`~kspec_guidance.objectives.Objective.gradient`.
            noisy: the noisy samples ``[n, d]``.
            ratio: their noise-to-signal ratio ``sigma / alpha``.
        """
        found = self.objective.gradient(u, prompts, None, pairs=self.batch, jitter=jitter)
        mean, weights = self.selection.likeliest(noisy, sharpness(ratio))
        away = u - mean
        same = torch.linalg.vector_norm(away, dim=1) < COINCIDENT
        if jitter is not None:
            away = away + jitter * same[:, None]
        both = torch.stack([found.rows, away])
        both = both - (both * u).sum(-1, keepdim=True) * u
        largest = torch.linalg.vector_norm(both, dim=-1).amax(1)
        inside, outside = both / (largest + (largest == 0))[:, None, None]
        same = same & (weights > 0)
        if found.coincident is not None:  # if it is on the host already, the host does not wait a second time
            same = found.coincident | same if found.coincident.device == same.device else found.coincident
        spread = self.objective.spread(u, self.pairs) if found.spread is not None else None
        return found._replace(rows=inside * self.share + outside * weights[:, None], coincident=same, spread=spread)
