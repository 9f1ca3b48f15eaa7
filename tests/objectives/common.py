"""Sizes, kernels and the comparison with autograd that the tests of this folder share."""

import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from tests.samples import rows

D, P = 6, 3
PROMPT = GaussianKernel(1.0)


def relative_error(objective, memory):
    x, t = rows(5, D, 0).requires_grad_(), rows(5, P, 1)
    (expected,) = torch.autograd.grad(objective.value(x, t, memory), x)
    found = objective.gradient(x.detach(), t, memory).rows
    return ((found - expected).norm() / expected.norm()).item()


def filled(memory, n=7):
    memory.add(rows(n, D, 5), rows(n, P, 6))
    return memory


FEATURES = RandomFourierFeatures(GaussianKernel(2.5), D, 64)
