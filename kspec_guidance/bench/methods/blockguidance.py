"""Feature self-guidance inside a transformer block."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Real
from kspec_guidance.bench.methods.blocks import BlockMethod, TokensOfRun
from kspec_guidance.loop.blocks import TransformerBlock


@dataclass
class BlockSelfGuidance(BlockMethod):
    """The second block's image tokens descend their similarity in the batch (arXiv 2606.27371, for transformers).

    ``h <- h - weight grad log mean_ij exp(cos(h_i, h_j) / tau)`` for ``rounds`` inner steps, then the block brings them
    back to tokens that it makes: ``kept B(h) + (1 - kept) h``. Gradients are brought to the size of the tokens. Only the
    half with prompts is moved where classifier-free guidance doubles the batch. Written from a note on the paper, which
    has no code.
    """

    name = "feature self-guidance, blocks"
    code = "block-self-guidance"
    paper = "arXiv 2606.27371"
    tuned = {"weight": Log(0.001, 0.3), "stop": Real(0.05, 0.6)}
    strength = "weight"
    weight: float = 0.02
    stop: float = 0.2
    rounds: int = 30
    kept: float = 0.4
    temperature: float = 0.1

    def change(self, block: TransformerBlock, tokens: TokensOfRun) -> tuple[Tensor, Tensor | None]:
        if block.index != 1 or tokens.fraction >= self.stop:
            return tokens.image, tokens.text
        empty, rows = tokens.image[: tokens.prompted], tokens.image[tokens.prompted :].flatten(1)
        size = rows.norm(dim=1).mean()
        for _ in range(self.rounds):
            g = similarity_gradient(rows, self.temperature)
            rows = rows - self.weight * size * g / g.norm(dim=1).amax().clamp_min(1e-12)
        moved = torch.cat([empty, rows.view_as(tokens.image[tokens.prompted :])])
        back = self.kept * tokens.again(moved) + (1 - self.kept) * moved
        return torch.cat([empty, back[tokens.prompted :]]), tokens.text


def similarity_gradient(rows: Tensor, temperature: float) -> Tensor:
    """Gradient ``[n, d]`` of ``log mean exp(cos / temperature)`` over pairs of different rows ``[n, d]``."""
    length = rows.norm(dim=1, keepdim=True).clamp_min(1e-12)
    u = rows / length
    similarities = (u @ u.T / temperature).fill_diagonal_(-torch.inf)
    p = similarities.flatten().softmax(0).view_as(similarities)
    g = 2 / temperature * p @ u  # p is symmetric
    return (g - (g * u).sum(1, keepdim=True) * u) / length
