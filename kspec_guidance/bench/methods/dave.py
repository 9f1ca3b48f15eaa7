"""Attenuation of the mean token."""

from dataclasses import dataclass

from torch import Tensor

from kspec_guidance.bench.methods.base import Real
from kspec_guidance.bench.methods.blocks import BlockMethod, TokensOfRun
from kspec_guidance.loop.blocks import TransformerBlock


@dataclass
class DAVE(BlockMethod):
    """The mean of a block's image tokens shrinks early in the run (Kwon, Lee and Choi 2026, arXiv 2606.06813).

    ``h - attenuation mean_l(h)`` in the blocks between a quarter and three quarters of the depth, in the first steps. The
    paper reports that this mean becomes alike for all seeds first.
    """

    name = "DAVE"
    single = True
    code = "dave"
    paper = "arXiv 2606.06813"
    tuned = {"attenuation": Real(0.0, 1.0), "stop": Real(0.05, 0.6)}
    strength = "attenuation"
    attenuation: float = 0.5
    stop: float = 0.15

    def change(self, block: TransformerBlock, tokens: TokensOfRun) -> tuple[Tensor, Tensor | None]:
        if tokens.fraction >= self.stop or not 0.25 <= block.depth <= 0.75:
            return tokens.image, tokens.text
        return tokens.image - self.attenuation * tokens.image.mean(1, keepdim=True), tokens.text
