"""SPELL."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment


@dataclass
class SPELL(Method):
    """Sparse repellency (Kirchhof and others 2024, arXiv 2410.06025, equation 7).

    ``x0_i += sum_k relu(r / |x0_i - z_k| - 1) (x0_i - z_k)`` over the predictions of the batch: nothing happens to an image
    that is farther than ``r`` from all others. ``r`` is given in median distances of the data, which the bed gives
    (``radius_unit``, from plain samples); ``overcompensation`` multiplies the push. Told to remember, finished samples of
    earlier runs repel too.
    """

    name = "SPELL"
    code = "spell"
    paper = "arXiv 2410.06025"
    tuned = {"r": Log(0.1, 1.5), "overcompensation": Log(0.3, 2.0)}
    strength = "r"
    r: float = 0.5
    overcompensation: float = 1.0
    radius_unit: float = field(default=1.0, repr=False)
    earlier: list[Tensor] | None = field(default=None, repr=False)  # finished samples; None: they are not kept

    def remember(self) -> None:
        self.earlier = self.earlier or []

    def sample(self, bed: Any, case: Any) -> Tensor:
        self.radius_unit = bed.radius_unit()
        samples = super().sample(bed, case)
        if self.earlier is not None:
            self.earlier.append(samples)
        return samples

    def move(self, m: Moment) -> Tensor | None:
        rows = m.x0.flatten(1)
        # both samples of a pair move, each by half of the distance; a finished one stays where it is
        move = 0.5 * self._push(rows, rows)
        for finished in self.earlier or []:
            move = move + self._push(rows, finished.flatten(1).to(rows))
        return move.view(m.x0.shape)

    def _push(self, rows: Tensor, others: Tensor) -> Tensor:
        """What moves rows out of the balls around others; a row is not pushed from itself."""
        d = (rows[:, None] - others[None]).norm(dim=-1)
        push = torch.relu(self.r * self.radius_unit / d.clamp_min(1e-3 * self.radius_unit) - 1)
        if others is rows:
            push.fill_diagonal_(0)
        return self.overcompensation * (push.sum(1, keepdim=True) * rows - push @ others)
