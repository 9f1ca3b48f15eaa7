"""Samples of known groups by two embeddings."""

import torch
from torch import Tensor


def planted(sizes=(50,) * 6, d: int = 32, noise: float = 0.02, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Rows by A and by B, and the group of each sample.

    Six groups. B merges groups 0 and 1, and 2 and 3; it scatters group 4; both see group 5.
    """
    g = torch.Generator().manual_seed(seed)
    group, n = torch.arange(6).repeat_interleave(torch.tensor(sizes)), sum(sizes)
    first, second = (torch.nn.functional.normalize(torch.randn(6, d, generator=g), dim=1) for _ in range(2))
    scattered = torch.nn.functional.normalize(torch.randn(n, d, generator=g), dim=1)
    a = first[group] + noise * torch.randn(n, d, generator=g)
    b = second[torch.tensor([0, 0, 2, 2, 4, 5])[group]] + noise * torch.randn(n, d, generator=g)
    b[group == 4] = scattered[group == 4]
    return a.double(), b.double(), group
