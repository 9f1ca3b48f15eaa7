"""Start noise with more power at low frequencies."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.methods.base import Real
from kspec_guidance.bench.methods.starts import Start


@dataclass
class PinkNoise(Start):
    """Amplitudes of the start noise fall as ``1 / f^exponent`` (Harrington and others 2026, arXiv 2601.00090).

    Layout and colour are decided at low frequencies, and these vary more. Each channel keeps unit variance, and the lowest
    frequency of the grid stands for the mean. Costs nothing.
    """

    name = "pink noise"
    single = True
    code = "pink-noise"
    paper = "arXiv 2601.00090"
    tuned = {"exponent": Real(0.0, 1.0)}
    strength = "exponent"
    needs = frozenset({"images"})
    exponent: float = 0.2

    def choose(self, bed: Any, case: Any) -> Tensor:
        start = bed.start(case, bed.images)
        x = start.float()
        h, w = x.shape[-2:]
        f = (torch.fft.fftfreq(h)[:, None].square() + torch.fft.rfftfreq(w).square()).sqrt().to(x.device)
        gain = f.clamp_min(1 / max(h, w)) ** -self.exponent
        both_halves = torch.ones(gain.shape[-1], device=x.device)
        both_halves[1 : (w + 1) // 2] = 2  # columns of rfft that stand for two
        gain = gain / ((gain.square() * both_halves).sum() / (h * w)).sqrt()
        return torch.fft.irfft2(torch.fft.rfft2(x) * gain, s=(h, w)).to(start.dtype)
