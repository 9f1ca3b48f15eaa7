import torch

from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import Vendi
from tests.objectives.common import PROMPT, D, P
from tests.samples import rows


def test_conditional_vendi_of_a_large_memory_uses_the_nearest_rows_of_similar_prompts():
    g = torch.Generator().manual_seed(0)
    x, t = torch.nn.functional.normalize(rows(2, D, 0)), torch.eye(2, P, dtype=torch.float64)[:1].expand(2, -1)
    near = torch.nn.functional.normalize(x.repeat(3, 1) + 0.1 * torch.randn(6, D, generator=g, dtype=torch.float64))
    far = torch.nn.functional.normalize(torch.randn(40, D, generator=g, dtype=torch.float64))
    bank, small = MemoryBank(), MemoryBank()
    for b in (bank, small):
        b.add(near, t[:1].expand(6, -1))
    bank.add(far, torch.eye(2, P, dtype=torch.float64)[1:].expand(40, -1))  # of another subject
    objective = Vendi(GaussianKernel(), 0.5, GaussianKernel(0.2), max_rows=6)
    torch.testing.assert_close(objective.gradient(x, t, bank).rows, objective.gradient(x, t, small).rows)
    torch.testing.assert_close(
        objective.pairs(x, t, bank).effective_count, torch.full((2,), 7.0), atol=1e-3, rtol=0, check_dtype=False
    )
    assert objective._matrix(x, objective.pairs(x, t, bank))[0].shape == (8, D)


def test_conditional_vendi_takes_weighted_means_too():
    x, t = torch.nn.functional.normalize(rows(3, D, 0)), torch.nn.functional.normalize(rows(3, P, 1))
    exact, means, objective = MemoryBank(), CentroidMemory(50), Vendi(GaussianKernel(0.5), 0.5, PROMPT)
    for memory in (exact, means):
        memory.add(rows(20, D, 2), rows(20, P, 3))
    torch.testing.assert_close(
        objective.gradient(x, t, exact).rows, objective.gradient(x, t, means).rows, rtol=1e-3, atol=1e-5
    )
