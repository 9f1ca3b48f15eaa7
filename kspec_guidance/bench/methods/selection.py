"""Group inference: a diverse subset of more candidates."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Whole
from kspec_guidance.bench.methods.starts import Start


def varied(rows: Tensor, n: int, first: int = 0) -> list[int]:
    """Indices of ``n`` rows, chosen greedily to maximise the smallest distance."""
    d = torch.cdist(rows, rows)
    chosen = [first]
    while len(chosen) < n:
        nearest = d[:, chosen].amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


@dataclass
class GroupInference(Start):
    """Candidates are denoised for a few steps, and a diverse subset by their predictions continues (arXiv 2508.15773).

    In place of the paper's quadratic programme the subset is chosen greedily by the smallest distance. It costs
    ``candidates * look`` extra denoiser calls per image.
    """

    name = "group inference"
    code = "group-inference"
    paper = "arXiv 2508.15773"
    tuned = {"candidates": Whole(2, 8), "look": Whole(1, 4)}
    strength = "candidates"
    candidates: int = 4
    look: int = 2

    def choose(self, bed: Any, case: Any) -> Tensor:
        """Start noises ``[n, ...]`` for the images of the bed, out of ``candidates`` times as many."""
        start = bed.start(case, bed.images * self.candidates)
        return start[varied(self.predictions(bed, case, start, self.look).flatten(1), bed.images)]
