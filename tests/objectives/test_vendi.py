import torch

from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryBank
from kspec_guidance.objectives import Vendi
from tests.objectives.common import PROMPT_KERNEL, D, P
from tests.samples import rows


def test_conditional_vendi_selects_rows_of_similar_prompts_up_to_max_rows():
    g = torch.Generator().manual_seed(0)
    x, t = torch.nn.functional.normalize(rows(2, D, 0)), torch.eye(2, P, dtype=torch.float64)[:1].expand(2, -1)
    neighbours = torch.nn.functional.normalize(x.repeat(3, 1) + 0.1 * torch.randn(6, D, generator=g, dtype=torch.float64))
    others = torch.nn.functional.normalize(torch.randn(40, D, generator=g, dtype=torch.float64))
    bank, neighbour_bank = MemoryBank(), MemoryBank()
    for memory in (bank, neighbour_bank):
        memory.add(neighbours, t[:1].expand(6, -1))
    bank.add(others, torch.eye(2, P, dtype=torch.float64)[1:].expand(40, -1))  # of an orthogonal prompt
    objective = Vendi(GaussianKernel(), 0.5, GaussianKernel(0.2), max_rows=6)
    torch.testing.assert_close(objective.gradient(x, t, bank).rows, objective.gradient(x, t, neighbour_bank).rows)
    torch.testing.assert_close(
        objective.pairs(x, t, bank).effective_count, torch.full((2,), 7.0), atol=1e-3, rtol=0, check_dtype=False
    )
    assert objective._rows(x, objective.pairs(x, t, bank))[0].shape == (8, D)


def test_conditional_vendi_accepts_centroid_memory():
    x, t = torch.nn.functional.normalize(rows(3, D, 0)), torch.nn.functional.normalize(rows(3, P, 1))
    exact, centroids, objective = MemoryBank(), CentroidMemory(50), Vendi(GaussianKernel(0.5), 0.5, PROMPT_KERNEL)
    for memory in (exact, centroids):
        memory.add(rows(20, D, 2), rows(20, P, 3))
    torch.testing.assert_close(
        objective.gradient(x, t, exact).rows, objective.gradient(x, t, centroids).rows, rtol=1e-3, atol=1e-5
    )
