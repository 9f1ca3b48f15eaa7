"""Group inference: more candidates, of which a varied subset is kept."""

from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .base import Method, Moment, Whole


class Enough(Exception):
    """The candidates' predictions have been seen."""


def varied(rows: Tensor, n: int, first: int = 0) -> list[int]:
    """Greedy choice of ``n`` rows of which the nearest two are far apart."""
    d = torch.cdist(rows, rows)
    chosen = [first]
    while len(chosen) < n:
        nearest = d[:, chosen].amin(1)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    return chosen


@dataclass
class GroupInference(Method):
    """Candidates are denoised for a few steps, a varied subset by their predictions goes on (arXiv 2508.15773).

    In place of the paper's quadratic programme the subset is chosen greedily by the smallest distance. Its cost is
    ``candidates * look`` further denoiser calls per image.
    """

    name = "group inference"
    paper = "arXiv 2508.15773"
    tuned = {"candidates": Whole(2, 8), "look": Whole(1, 4)}
    strength = "candidates"
    candidates: int = 4
    look: int = 2

    def move(self, m: Moment) -> Tensor | None:
        self._seen = m.x0
        if m.step + 1 >= self.look:
            raise Enough
        return None

    def choose(self, bed: Any, case: Any) -> Tensor:
        """As many start noises ``[n, ...]`` as the bed makes images, out of ``candidates`` times as many."""
        m = bed.images * self.candidates
        start = bed.start(case, m)
        with suppress(Enough), self.attach(bed.pipe):
            bed.run(case, m, start)
        return start[varied(self._seen.flatten(1), bed.images)]

    def sample(self, bed: Any, case: Any) -> Tensor:
        return bed.run(case, bed.images, self.choose(bed, case))
