"""Random samples that the tests share."""

import torch
from torch import Tensor


def rows(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """``[n, d]`` standard normal, the same for the same seed."""
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=1, keepdim=True)


def clustered(n: int, d: int = 24, p: int = 6, prompts: int = 9, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Samples about a centre for each prompt, and the prompts' features; near and far prompts alike."""
    g = torch.Generator().manual_seed(seed)
    centres, texts = torch.randn(prompts, d, generator=g), torch.randn(prompts, p, generator=g)
    which = torch.arange(n) % prompts
    return centres[which] + 0.4 * torch.randn(n, d, generator=g), unit(texts)[which]
