"""Noise on the prompt: CADS, and the unscheduled noise of seed-variance nodes."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Method, Real


@dataclass
class CADS(Method):
    """Condition-annealed sampling (Sadat and others 2023, arXiv 2310.17347, equations 3 to 5).

    ``y' = sqrt(g) y + s sqrt(1 - g) e`` with ``g`` from 0 at ``t >= tau2`` to 1 at ``t <= tau1``, rescaled to the mean and
    deviation of ``y`` and mixed by ``psi``; ``t`` runs from 1 (noise) to 0.
    """

    name = "CADS"
    single = True
    code = "cads"
    paper = "arXiv 2310.17347"
    tuned = {"s": Real(0.0, 1.0), "tau1": Real(0.2, 0.9), "psi": Real(0.0, 1.0)}
    strength = "s"
    needs = frozenset({"prompts"})
    s: float = 0.25
    tau1: float = 0.6
    tau2: float = 0.9
    psi: float = 1.0

    def condition(self, states: Tensor, fraction: float) -> Tensor:
        t, tau2 = 1 - fraction, max(self.tau2, self.tau1 + 0.05)
        g = min(1.0, max(0.0, (tau2 - t) / (tau2 - self.tau1)))
        if g == 1:
            return states
        noisy = g**0.5 * states + self.s * (1 - g) ** 0.5 * self.noise_like(states)
        mean, std = states.mean((1, 2), keepdim=True), states.std((1, 2), keepdim=True)
        again = (noisy - noisy.mean((1, 2), keepdim=True)) / noisy.std((1, 2), keepdim=True).clamp_min(1e-6) * std + mean
        return self.psi * again + (1 - self.psi) * noisy


@dataclass
class SeedVariance(Method):
    """One noise on the prompt embedding for the first part of the steps, as the nodes that users run do."""

    name = "seed variance"
    single = True
    code = "seed-variance"
    paper = "seed-variance nodes"
    tuned = {"noise": Real(0.0, 2.0), "until": Real(0.1, 1.0)}
    strength = "noise"
    needs = frozenset({"prompts"})
    noise: float = 0.5
    until: float = 0.5

    def begin(self) -> None:
        self._noises: dict[torch.Size, Tensor] = {}

    def condition(self, states: Tensor, fraction: float) -> Tensor:
        if fraction >= self.until:
            return states
        if states.shape not in self._noises:
            self._noises[states.shape] = self.noise_like(states)
        size = states.flatten(1).std(1).view(-1, 1, 1) if states[0].numel() > 1 else torch.ones(1, device=states.device)
        return states + self.noise * size * self._noises[states.shape]
