"""Repulsion of enriched text tokens."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.bench.methods.base import Log, Real
from kspec_guidance.bench.methods.blocks import BlockMethod, TokensOfRun
from kspec_guidance.kernels import CosineKernel
from kspec_guidance.loop.blocks import TransformerBlock


@dataclass
class ContextualRepulsion(BlockMethod):
    """The text tokens of all blocks ascend the batch's entropy (Dahary and others 2026, arXiv 2603.28762).

    The entropy is the von Neumann entropy of the cosine kernel of the flattened tokens, for the first steps. Its gradient
    is brought to the size of the tokens, since a step size in its own unit belongs to one model; and only the half with
    prompts is moved where classifier-free guidance doubles the batch. No gradient goes through blocks.
    """

    name = "contextual repulsion"
    code = "contextual"
    paper = "arXiv 2603.28762"
    tuned = {"weight": Log(0.003, 2.0), "stop": Real(0.05, 1.0)}
    strength = "weight"
    weight: float = 0.1
    stop: float = 0.3
    rounds: int = 1

    def change(self, block: TransformerBlock, tokens: TokensOfRun) -> tuple[Tensor, Tensor | None]:
        text = tokens.text
        if text is None or tokens.fraction >= self.stop:
            return tokens.image, text
        empty, rows = text[: tokens.prompted], text[tokens.prompted :].flatten(1)
        size = rows.norm(dim=1).mean()
        for _ in range(self.rounds):
            with torch.inference_mode(False), torch.enable_grad():
                x = rows.detach().clone().double().requires_grad_()
                (g,) = torch.autograd.grad(F.vendi_score(x, CosineKernel()).log(), x)
            rows = rows + self.weight / self.rounds * size * (g / g.norm(dim=1).amax().clamp_min(1e-12)).to(rows.dtype)
        return tokens.image, torch.cat([empty, rows.view_as(text[tokens.prompted :])])
