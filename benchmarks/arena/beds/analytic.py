"""Gaussian mixtures with their exact score, so there is no learning error; occupancy and likelihood are exact."""

import math
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ..pipeline import ConditionPipeline, Conditions
from .base import Bed, Case, common_scores

MODES, PROMPTS, WIDTH = 24, 16, 12
FRESH = 40  # further prompts, on which nothing was chosen
SHARP = 6.0  # how strongly a prompt chooses among the modes
COUNTS = 0.01  # a mode belongs to a prompt that gives it at least this share


class ExactDenoiser(nn.Module):
    """The noise in ``x = alpha x0 + sigma noise`` for a mixture whose weights depend on a prompt vector.

    ``log p(mode | c) = log w + SHARP m . c``; the empty prompt is ``c = 0``.
    """

    def __init__(self, dim: int, skewed: bool, std: float, scheduler: Any, seed: int = 0):
        super().__init__()
        g = torch.Generator().manual_seed(seed + dim)
        if dim == 2:
            angle = torch.arange(MODES) * (2 * math.pi / MODES * 5)  # consecutive modes are not neighbours
            centres = torch.stack([angle.cos(), angle.sin()], 1) * (1.0 + 0.9 * (torch.arange(MODES) % 3)[:, None])
        else:
            centres = torch.randn(MODES, dim, generator=g)
            centres = centres / centres.norm(dim=1, keepdim=True) * dim**0.5
        self.register_buffer("centres", centres)
        weights = torch.logspace(0, -1.6, MODES) if skewed else torch.ones(MODES)
        self.register_buffer("log_weights", (weights / weights.sum()).log())
        names = torch.randn(MODES, WIDTH, generator=g)
        self.register_buffer("names_", names / names.norm(dim=1, keepdim=True))
        self.std, self.dim, self.scheduler = std, dim, scheduler
        self.shape = (1, 1, dim)
        self.dtype = torch.float32

    def log_shares(self, c: Tensor) -> Tensor:
        """``log p(mode | c)`` ``[n, modes]``."""
        return (self.log_weights + SHARP * c @ self.names_.mT).log_softmax(-1)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True) -> tuple:
        abar = float(self.scheduler.alphas_cumprod[int(timestep)])
        alpha, sigma = abar**0.5, (1 - abar) ** 0.5
        x = sample.flatten(1)
        variance = (alpha * self.std) ** 2 + sigma**2
        away = x[:, None] - alpha * self.centres[None]
        r = (self.log_shares(encoder_hidden_states[:, 0]) - away.square().sum(-1) / (2 * variance)).softmax(-1)
        # noise = -sigma score, score = -sum_k r_k (x - alpha mu_k) / variance
        return ((sigma / variance * (r[..., None] * away).sum(1)).view(sample.shape),)


class Analytic(Bed):
    """One mixture. ``modes`` counts the prompt's modes found, ``valid`` is the share of samples inside one.

    ``on_data`` is the share inside any mode, ``agreement`` that of samples whose nearest mode is the prompt's.
    """

    has = frozenset({"guidance", "prompts"})
    images, steps, guidance_scale = 16, 30, 3.0

    def __init__(self, dim: int = 32, skewed: bool = True):
        self.name = f"mixture, {dim} dimensions, {'skewed' if skewed else 'balanced'}"
        scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, beta_schedule="scaled_linear",
                                  beta_start=0.00085, beta_end=0.012)  # fmt: skip
        self.model = ExactDenoiser(dim, skewed, 0.06 if dim == 2 else 0.1, scheduler)
        g = torch.Generator().manual_seed(5)
        vectors = torch.cat([torch.randn(n, WIDTH, generator=g) for n in (PROMPTS, FRESH)])
        vectors = torch.cat([vectors / vectors.norm(dim=1, keepdim=True), torch.zeros(1, WIDTH)])
        names = [f"prompt {k}" for k in range(PROMPTS + FRESH)]
        self.pipe = ConditionPipeline(self.model, scheduler, Conditions(names, vectors))

    def prompts(self, half: str) -> list[str]:
        names = self.pipe.conditions.names
        if half == "tune":
            return names[: PROMPTS // 2]
        return names[PROMPTS:] if self.fresh else names[PROMPTS // 2 : PROMPTS]

    def shares(self, prompt: str) -> Tensor:
        return self.model.log_shares(self.pipe.conditions.rows([prompt])[:, 0])[0].exp().detach()

    def draw(self, shares: Tensor, n: int, generator: torch.Generator) -> Tensor:
        """Exact samples ``[n, 1, 1, d]`` of a mixture with these shares."""
        k = torch.multinomial(shares, n, replacement=True, generator=generator)
        return (self.model.centres[k] + self.model.std * torch.randn(n, self.model.dim, generator=generator)).view(
            n, 1, 1, -1
        )

    def truth(self, prompt: str) -> Tensor:
        return self.draw(self.shares(prompt), 400, torch.Generator().manual_seed(7)).flatten(1)

    def rows(self, samples: Tensor) -> Tensor:
        return samples.flatten(1)

    def assign(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Nearest mode of each row, and whether the row is inside it: within the radius of 99.9% of its mass.

        The quantile of chi-square is Wilson and Hilferty's (1931).
        """
        d2 = (rows[:, None] - self.model.centres[None]).square().sum(-1) / self.model.std**2
        nearest, which = d2.min(1)
        dim = self.model.dim
        return which, nearest < dim * (1 - 2 / (9 * dim) + 3.09 * math.sqrt(2 / (9 * dim))) ** 3

    def figures(self, rows: Tensor, case: Case) -> dict[str, float]:
        shares = self.shares(case.prompt)
        which, inside = self.assign(rows)
        own, on_data = shares[which] >= COUNTS, float(inside.float().mean())
        inside = inside & own
        drawn = torch.bincount(which[inside], minlength=MODES) / len(rows)
        return {
            "modes": float(len(set(which[inside].tolist()))),
            "of": float((shares >= COUNTS).sum()),
            "valid": float(inside.float().mean()),
            "on_data": on_data,
            "agreement": float(own.float().mean()),
            "total_variation": float((drawn - shares).abs().sum() / 2),
            **common_scores(rows),
        }
