"""Random spread along the text axis and along the main direction off it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment, Real, norms


@dataclass
class GASS(Method):
    """Predictions move on their sphere, along the text's direction and along the main one off it (arXiv 2602.17200).

    ``x0 -> |x0| (x0 + |x0| (a u + b v)) / |...|``: ``u`` is the unit direction of the text, ``v`` the first principal
    direction of the batch's predictions less their components along ``u``, ``a`` and ``b`` are drawn from ``U(-r, r)`` for
    each image, once a run.

    The paper moves CLIP embeddings of decoded predictions, and then brings the pixels there by up to 60 steps of Adam and
    an encoding. CLIP's weights were not at hand, so the sphere is that of the predictions themselves: ``u`` is what the
    prompt adds to the batch's mean prediction, ``mean(cond - uncond)``, or the mean prediction itself without
    classifier-free guidance; no gradient is taken. The authors' code chooses ``v`` among ten random directions off the
    text. As there, a seed's draws are the same at all steps, so moves add up.
    """

    name = "text-axis spread"
    paper = "arXiv 2602.17200"
    tuned = {"r": Log(0.03, 5.0), "stop": Real(0.1, 1.0)}
    strength = "r"
    needs = frozenset({"prompts"})
    r: float = 0.3
    stop: float = 0.6

    def begin(self) -> None:
        self._draws: Tensor | None = None
        self._main: Tensor | None = None

    def move(self, m: Moment) -> Tensor | None:
        if m.fraction >= self.stop:
            return None
        guidance = m.guidance()
        text = m.x0 if guidance is None else guidance.direction.to(m.x0)
        rows = m.x0.flatten(1)
        u = torch.nn.functional.normalize(text.flatten(1).mean(0), dim=0)
        v = self._aligned(main_direction(rows, u))
        if self._draws is None:
            self._draws = torch.rand(2, len(rows), 1, generator=self.generator, dtype=rows.dtype).to(rows.device) * 2 - 1
        a, b = self.r * self._draws
        size = norms(rows)
        moved = rows + size * (a * u + b * v)
        return (moved * size / norms(moved) - rows).view(m.x0.shape)

    def _aligned(self, v: Tensor) -> Tensor:
        """The direction with the sign that is nearer to the last step's."""
        if self._main is not None and v @ self._main < 0:
            v = -v
        self._main = v
        return v


def main_direction(rows: Tensor, axis: Tensor) -> Tensor:
    """Unit vector ``[d]``: first principal direction of rows ``[n, d]`` less their components along the unit axis."""
    residual = rows - rows.mean(0)
    residual = residual - (residual @ axis)[:, None] * axis
    v = torch.linalg.svd(residual, full_matrices=False).Vh[0]
    return torch.nn.functional.normalize(v - (v @ axis) * axis, dim=0)
