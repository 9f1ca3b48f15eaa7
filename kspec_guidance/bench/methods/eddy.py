"""EDDY."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment, Real, norms, rbf


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Inner product of each sample ``[n, ...]`` of ``a`` with that of ``b``, ``[n, 1, ...]``."""
    return (a * b).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))


def pairs(x: Tensor, s: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """RBF repulsion ``r``, its derivative along ``s`` and its divergence, each in a sample's own coordinates."""
    rows, s = x.flatten(1), s.flatten(1)
    d2, k, h = rbf(rows)
    d, k = rows.shape[1], 2 / h * k
    r = k.sum(1, keepdim=True) * rows - k @ rows
    along = (rows * s).sum(1, keepdim=True) - s @ rows.mT  # (x_i - x_j) . s_i
    w = k * along * 2 / h
    ds = k.sum(1, keepdim=True) * s - (w.sum(1, keepdim=True) * rows - w @ rows)
    div = (k * (d - 2 / h * d2)).sum(1)
    return r.view(x.shape), ds.view(x.shape), div.view(-1, *[1] * (x.ndim - 1))


@dataclass
class EDDY(Method):
    """A drift that preserves the distribution of each image (arXiv 2605.06553).

    ``b = A s + div A`` with ``A = r s' - s r'``, ``s`` the score and ``r`` a pairwise repulsion: ``r |s|^2 - s (r.s)``, the
    repulsion projected off the score, plus ``(s.grad) r + r div s - (r.grad) s - s div r``. The last three derivatives of
    the model come by finite differences and one Hutchinson probe: two extra denoiser calls at every step. Everything
    is divided by ``d / sigma^2``, the mean of ``|s|^2``, and ``r`` brought to the size of the noise.
    """

    name = "EDDY"
    code = "eddy"
    paper = "arXiv 2605.06553"
    tuned = {"weight": Log(0.01, 3.0), "stop": Real(0.3, 1.0)}
    strength = "weight"
    again = True
    weight: float = 0.3
    stop: float = 1.0
    divergence: bool = True

    def move(self, m: Moment) -> Tensor | None:
        if m.fraction >= self.stop or m.alpha < 1e-4 or m.sigma < 1e-2:
            return None
        s, d = m.score, m.x[0].numel()
        r, r_along_s, div_r = pairs(m.x, s)
        factor = norms(m.noise).mean() / norms(r).amax().clamp_min(1e-12)
        r, r_along_s, div_r = r * factor, r_along_s * factor, div_r * factor
        b = r * dot(s, s) - s * dot(r, s)
        if self.divergence:
            v, e = torch.sign(self.noise_like(m.x)), 1e-2 * max(m.sigma, 0.05)
            size = norms(r).amax().clamp_min(1e-12)
            probe = (m.denoise(m.x + e * v) - m.x0) / e
            bent = (m.denoise(m.x + e * r / size) - m.x0) * size / e
            div_s = (m.alpha * dot(v, probe) - d) / m.sigma**2
            s_along_r = (m.alpha * bent - r) / m.sigma**2
            b = b + r_along_s + r * div_s - s_along_r - s * div_r
        return self.weight * m.sigma / m.alpha * b * m.sigma**2 / d


@dataclass
class EDDYProjection(EDDY):
    """Its first two terms alone: the repulsion projected off the score, without extra denoiser calls."""

    name = "EDDY, projection only"
    code = "eddy-projection"
    again = False
    divergence: bool = False
