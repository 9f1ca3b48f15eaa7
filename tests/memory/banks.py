"""Filled memory banks shared by the tests of this package."""

import torch

from kspec_guidance import MemoryBank
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import PromptWeights
from tests.samples import clustered_samples

PROMPT_WEIGHTS = PromptWeights(GaussianKernel(0.35))


def small_bank(n=5, seed=0):
    """``n`` samples ``[4, 2, 2]`` with prompt features ``[3]``."""
    g = torch.Generator().manual_seed(seed)
    memory = MemoryBank("x0", "encoder-1")
    memory.add(torch.randn(n, 4, 2, 2, generator=g), torch.randn(n, 3, generator=g))
    return memory


def filled_bank(n=300, **settings):
    """A bank of clustered samples added in batches of 7, the samples, and their prompt features."""
    memory = MemoryBank(**settings)
    x, t = clustered_samples(n)
    for start in range(0, n, 7):
        memory.add(x[start : start + 7], t[start : start + 7])
    return memory, x, t
