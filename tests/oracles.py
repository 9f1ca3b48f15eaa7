"""Inputs whose scores are known in closed form."""

import torch


def clusters(groups: int, each: int, dtype=torch.float64) -> torch.Tensor:
    """``groups`` orthogonal points, each ``each`` times: every order's Vendi score by the cosine kernel is ``groups``."""
    return torch.eye(groups, dtype=dtype).repeat_interleave(each, dim=0)


def two_points(cosine: float) -> tuple[torch.Tensor, tuple[float, float]]:
    """Two unit vectors with that cosine; the eigenvalues of K / 2 are ``(1 -+ cosine) / 2``."""
    x = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64)
    return x, ((1 - cosine) / 2, (1 + cosine) / 2)
