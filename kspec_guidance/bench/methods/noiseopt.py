"""Start noises that are optimised through the denoiser."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Moment, Whole
from kspec_guidance.bench.methods.diverseflow import dpp, squared_distances
from kspec_guidance.bench.methods.starts import Enough, Start
from kspec_guidance.guidance.spaces import make_space
from kspec_guidance.guidance.spaces.pixels import Pixels
from kspec_guidance.loop.components import autoencoder_of
from kspec_guidance.loop.context import CallContext


@dataclass
class NoiseOptimisation(Start):
    """The start noises ascend the variety of what the model makes of them (Harrington and others 2026, arXiv 2601.00090).

    Adam ascends the log-likelihood of a determinantal point process of the images' features plus ``prior`` times the
    log-density of the noises' norms, through decoder and denoiser. Features are the decoded first predictions at 16 x 16
    pixels, in place of DINO's patches of a few-step sampler's images, and there is no reward of quality; without a
    decoder, features are the first predictions themselves. Costs one denoiser call an image, and
    ``rounds`` further ones with their backward passes.
    """

    name = "noise optimisation"
    paper = "arXiv 2601.00090"
    tuned = {"rate": Log(0.003, 0.5), "rounds": Whole(1, 6)}
    strength = "rate"
    rate: float = 0.03
    rounds: int = 3
    prior: float = 0.1

    def choose(self, bed: Any, case: Any) -> Tensor:
        return self.predictions(bed, case, bed.start(case, bed.images))

    def move(self, m: Moment) -> Tensor | None:
        self._found = self.optimised(m)
        raise Enough

    def optimised(self, m: Moment) -> Tensor:
        """The start noises ``[n, ...]`` after the ascent, given the first step of a run from others."""
        unit = float(getattr(m.scheduler, "init_noise_sigma", 1.0))
        z = (m.x / unit).detach().clone().requires_grad_()
        space = Pixels(chunk=16) if autoencoder_of(m.pipe) is not None else make_space("x0")
        optimizer, context, median = torch.optim.Adam([z], lr=self.rate, maximize=True), CallContext(m.pipe), None
        for _ in range(self.rounds):
            with torch.enable_grad():  # the arena runs without
                x0 = m.denoise(z * unit)
                rows, pullback = space.features(x0.detach(), context, m.call)
                rows = rows.detach().double().requires_grad_()
                median = squared_distances(rows)[1] if median is None else median
                (g,) = torch.autograd.grad(dpp(rows, 1.0, median), rows)
                (z.grad,) = torch.autograd.grad(x0, z, pullback(g.to(x0)).view(x0.shape))
            z.grad += self.prior * norm_score(z.detach())
            optimizer.step()
        return z.detach()


def norm_score(z: Tensor) -> Tensor:
    """Gradient of the log-density of the norms of standard normal vectors ``[n, ...]``: of a chi distribution."""
    square = z.flatten(1).square().sum(1).view(-1, *[1] * (z.ndim - 1))
    return ((z[0].numel() - 1) / square - 1) * z
