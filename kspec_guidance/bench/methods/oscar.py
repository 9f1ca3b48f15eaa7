"""OSCAR."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment, norms, without


@dataclass
class OSCAR(Method):
    """Volume of the features at the predicted end points, and noise, both orthogonal to the velocity (arXiv 2510.09060).

    Ascends ``log det(I + c G)``, ``G`` the Gram matrix of unit-norm predictions of the end points; both parts are projected
    by ``P = I - v v' / |v|^2``, and the noise falls with the square of sigma.
    """

    name = "OSCAR"
    code = "oscar"
    paper = "arXiv 2510.09060"
    tuned = {"weight": Log(0.01, 3.0), "noise_weight": Log(0.001, 0.5), "c": Log(0.3, 30.0)}
    strength = "weight"
    weight: float = 0.3
    noise_weight: float = 0.05
    c: float = 4.0

    def velocity(self, m: Moment) -> Tensor:
        """Direction from noise to data ``[n, ...]``."""
        return m.x0 - m.noise

    def move(self, m: Moment) -> Tensor | None:
        if m.alpha < 1e-4 or m.sigma < 1e-3:
            return None
        with torch.enable_grad():
            x = m.x0.detach().clone().requires_grad_()
            f = torch.nn.functional.normalize(x.flatten(1).double(), dim=1)
            value = torch.logdet(torch.eye(len(f), dtype=f.dtype, device=f.device) + self.c * f @ f.mT)
            (g,) = torch.autograd.grad(value, x)
        g = without(g, self.velocity(m))
        gate = m.sigma**2
        return self.weight * gate / m.alpha * norms(m.noise) * g / norms(g).amax().clamp_min(1e-12)

    def after(self, m: Moment, latents: Tensor) -> Tensor:
        noise = without(self.noise_like(latents), self.velocity(m))
        return latents + self.noise_weight * m.sigma**2 * noise
