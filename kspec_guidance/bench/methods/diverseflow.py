"""DiverseFlow."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment, norms


def squared_distances(x: Tensor) -> tuple[Tensor, Tensor]:
    """``|x_i - x_j|^2`` of samples ``[n, ...]`` as ``[n, n]``, in double precision; and the median off the diagonal."""
    rows = x.flatten(1).double()
    d2 = (rows[:, None] - rows[None]).square().sum(-1)
    return d2, d2.detach()[~torch.eye(len(rows), dtype=torch.bool)].median().clamp_min(1e-12)


def dpp(x: Tensor, h: float, median: Tensor | None = None) -> Tensor:
    """``log det L - log det(L + I)`` of ``L_ij = exp(-h |x_i - x_j|^2 / (2 median))``; the median of ``x`` unless given."""
    d2, own = squared_distances(x)
    l = torch.exp(-h * d2 / (2 * (own if median is None else median)))
    eye = torch.eye(len(l), dtype=l.dtype, device=l.device)
    return torch.logdet(l + 1e-6 * eye) - torch.logdet(l + eye)


@dataclass
class DiverseFlow(Method):
    """The likelihood of a determinantal point process at the predicted targets, ascended (arXiv 2504.07894).

    The gradient with respect to the noisy samples goes through the denoiser if ``through``; its strength falls with the
    noise, and it is rescaled to the size of the noise as in the paper's experiments.
    """

    name = "DiverseFlow"
    code = "diverseflow"
    paper = "arXiv 2504.07894"
    tuned = {"weight": Log(0.01, 3.0), "h": Log(0.3, 10.0)}
    strength = "weight"
    again = True
    weight: float = 0.3
    h: float = 1.0
    through: bool = True

    def move(self, m: Moment) -> Tensor | None:
        if m.alpha < 1e-4 or m.sigma < 1e-3:
            return None
        with torch.enable_grad():
            if self.through:
                x = m.x.detach().clone().requires_grad_()
                value = dpp(m.denoise(x), self.h)
            else:
                x = m.x0.detach().clone().requires_grad_()
                value = dpp(x, self.h)
            (g,) = torch.autograd.grad(value, x)
        g = torch.nan_to_num(g.to(m.x0.dtype))
        gamma = self.weight * m.sigma  # falls with the noise level
        return gamma * m.sigma / m.alpha * norms(m.noise) * g / norms(g).amax().clamp_min(1e-12)


@dataclass
class DiverseFlowFast(DiverseFlow):
    """The same without the backward pass: the denoiser's Jacobian is taken as a multiple of the identity."""

    name = "DiverseFlow, no backward"
    code = "diverseflow-fast"
    again = False
    through: bool = False
