"""Random samples shared by the tests."""

import torch
from torch import Tensor


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal ``[n, d]`` from a seeded generator."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def normalize_rows(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def clustered_samples(n: int, d: int = 24, p: int = 6, prompts: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples ``[n, d]`` around one centre per prompt, and their unit prompt features ``[n, p]``."""
    g = torch.Generator().manual_seed(seed)
    centres, prompt_features = torch.randn(prompts, d, generator=g), torch.randn(prompts, p, generator=g)
    prompt_indices = torch.arange(n) % prompts
    return centres[prompt_indices] + 0.4 * torch.randn(n, d, generator=g), normalize_rows(prompt_features)[prompt_indices]
