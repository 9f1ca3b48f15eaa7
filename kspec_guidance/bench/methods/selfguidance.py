"""Feature self-guidance."""

from dataclasses import dataclass

from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment, Real, norms
from kspec_guidance.guidance.spaces import Activations
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.loop.context import CallContext
from kspec_guidance.objectives import RKE


@dataclass
class SelfGuidance(Method):
    """Disperses features of the denoiser's middle block inside the batch (arXiv 2606.27371).

    Then the prediction is brought back to its own channel statistics, as the paper brings features back to those of the
    batch. Dispersion is the descent of the summed squared Gaussian kernel of unit-norm features; the gradient goes through
    half of the denoiser.
    """

    name = "feature self-guidance"
    code = "self-guidance"
    paper = "arXiv 2606.27371"
    tuned = {"weight": Log(0.01, 2.0), "stop": Real(0.3, 1.0)}
    strength = "weight"
    needs = frozenset({"features"})
    weight: float = 0.2
    stop: float = 0.6

    def move(self, m: Moment) -> Tensor | None:
        if m.fraction >= self.stop:
            return None
        rows, pullback = Activations().features(m.x, CallContext(m.pipe), m.call)
        centred = rows - rows.mean(0)
        u = l2_normalize(centred)
        g = RKE(GaussianKernel()).gradient(u).rows
        g = (g - (g * u).sum(1, keepdim=True) * u) / norms(centred)
        g = pullback(g - g.mean(0)).view(m.x0.shape).to(m.x0.dtype)
        moved = m.x0 + self.weight * norms(m.x0) * g / norms(g).amax().clamp_min(1e-12)
        if m.x0.ndim == 4:
            axes = (2, 3)
            mean, std = m.x0.mean(axes, keepdim=True), m.x0.std(axes, keepdim=True)
            now, spread = moved.mean(axes, keepdim=True), moved.std(axes, keepdim=True).clamp_min(1e-6)
            moved = (moved - now) / spread * std + mean
        return moved - m.x0
