"""Memories that the tests of this folder fill alike."""

import torch

from kspec_guidance import MemoryBank
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import PromptWeights
from tests.samples import clustered


def bank(n=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    memory = MemoryBank("x0", "encoder-1")
    memory.add(torch.randn(n, 4, 2, 2, generator=g), torch.randn(n, 3, generator=g))
    return memory


WEIGH = PromptWeights(GaussianKernel(0.35))


def filled(n=300, **settings):
    bank = MemoryBank(**settings)
    x, t = clustered(n)
    for start in range(0, n, 7):
        bank.add(x[start : start + 7], t[start : start + 7])
    return bank, x, t
