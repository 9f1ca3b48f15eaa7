"""Shared sizes, kernels and the comparison with autograd."""

import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from tests.samples import rows

D, P = 6, 3
PROMPT_KERNEL = GaussianKernel(1.0)
FEATURE_MAP = RandomFourierFeatures(GaussianKernel(2.5), D, 64)


def relative_error(objective, memory):
    """Relative error of ``objective.gradient`` with respect to autograd of ``objective.value``."""
    x, t = rows(5, D, 0).requires_grad_(), rows(5, P, 1)
    (expected,) = torch.autograd.grad(objective.value(x, t, memory), x)
    actual = objective.gradient(x.detach(), t, memory).rows
    return ((actual - expected).norm() / expected.norm()).item()


def fill(memory, n=7):
    """Add ``n`` random rows to ``memory`` and return it."""
    memory.add(rows(n, D, 5), rows(n, P, 6))
    return memory
