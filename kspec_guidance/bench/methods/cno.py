"""Contrastive noise optimisation."""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.bench.methods.base import Log, Whole
from kspec_guidance.bench.methods.starts import Start


@dataclass
class CNO(Start):
    """The start noises descend InfoNCE of their first predictions (Kim, Um and Ye 2026, arXiv 2510.03813).

    ``-f(x_i, ref_i) / (gamma tau) + log sum_j exp(f(x_i, x_j) / tau)`` with cosine similarity ``f`` of pooled predictions,
    the predictions of the first noises as references, and ``gamma = 1 / (tau log(n - 1) + 1)``. No gradient goes through
    the network, so predictions move with the noise in a straight line. Costs ``rounds`` denoiser calls an image.
    """

    name = "CNO"
    code = "cno"
    paper = "arXiv 2510.03813"
    tuned = {"rate": Log(0.003, 0.5), "rounds": Whole(1, 6)}
    strength = "rate"
    rate: float = 0.03
    rounds: int = 3
    temperature: float = 0.1

    def choose(self, bed: Any, case: Any) -> Tensor:
        z = bed.start(case, bed.images).clone().requires_grad_()
        optimizer = torch.optim.Adam([z], lr=self.rate)
        reference = None
        for _ in range(self.rounds):
            x0 = self.predictions(bed, case, z.detach())
            with torch.enable_grad():  # the arena runs without
                x = pooled(x0 + z - z.detach())
                reference = x.detach() if reference is None else reference
                optimizer.zero_grad()
                contrast(x, reference, self.temperature).backward()
            optimizer.step()
        return z.detach()


def pooled(x: Tensor) -> Tensor:
    """Unit rows ``[n, d]``; images at a quarter of their size, but at least 4 x 4, as 16 x 16 of 64 x 64 in the paper."""
    if x.ndim == 4 and min(x.shape[-2:]) > 4:
        x = nn.functional.adaptive_avg_pool2d(x, max(4, x.shape[-1] // 4))
    return nn.functional.normalize(x.flatten(1), dim=1)


def contrast(x: Tensor, reference: Tensor, temperature: float) -> Tensor:
    """The loss of unit rows ``[n, d]`` and their references."""
    gamma = 1 / (temperature * math.log(max(len(x) - 1, 1)) + 1)
    attraction = (x * reference).sum(1) / (gamma * temperature)
    return (torch.logsumexp(x @ x.T / temperature, 1) - attraction).mean()
