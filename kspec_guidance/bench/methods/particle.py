"""Particle guidance."""

from dataclasses import dataclass

from torch import Tensor, nn

from kspec_guidance.bench.methods.base import Log, Method, Moment, Real, norms, repulsion


@dataclass
class Particle(Method):
    """A fixed joint potential (Corso and others 2023, arXiv 2310.13102, section 4 and equation 5).

    ``log Phi = -sum_ij exp(-|x_i - x_j|^2 / h_i)``, ``h_i = median_i^2 / log(n - 1)``, on the noisy samples; its gradient
    is added to the score, so the clean prediction moves by ``weight sigma^2 / alpha`` times it. The kernel's own gradient
    shrinks as distances grow, so it is brought to the size of the score first, which keeps one weight for all noise levels.
    """

    name = "particle guidance"
    code = "particle"
    paper = "arXiv 2310.13102"
    tuned = {"weight": Log(0.01, 3.0), "stop": Real(0.3, 1.0)}
    strength = "weight"
    weight: float = 0.3
    stop: float = 1.0

    def rows(self, m: Moment) -> Tensor:
        """What the kernel compares ``[n, ...]``."""
        return m.x

    def move(self, m: Moment) -> Tensor | None:
        if m.fraction >= self.stop or m.alpha < 1e-4:
            return None
        g = self.back(repulsion(self.rows(m)), m)
        largest = norms(g).amax().clamp_min(1e-12)
        return self.weight * m.sigma / m.alpha * norms(m.noise) * g / largest

    def back(self, g: Tensor, m: Moment) -> Tensor:
        """A gradient of :meth:`rows` in the shape of the samples."""
        return g


@dataclass
class PooledParticle(Particle):
    """The same in a pooled space of the clean prediction, where the kernel compares layout and colour, not noise."""

    name = "particle guidance, pooled"
    code = "particle-pooled"

    def rows(self, m: Moment) -> Tensor:
        if m.x0.ndim != 4 or min(m.x0.shape[-2:]) < 4:
            return m.x0
        return nn.functional.avg_pool2d(m.x0, 2)

    def back(self, g: Tensor, m: Moment) -> Tensor:
        if g.shape == m.x.shape:
            return g
        return nn.functional.interpolate(g, m.x.shape[-2:]) / 4
