"""The minimum of a quadratic function over the simplex."""

import torch
from torch import Tensor

from kspec_guidance.functional.simplex import minimise_on_simplex

__all__ = ["minimise_quadratic", "nearest_psd"]

TOLERANCE, MAX_STEPS = 1e-9, 5000  # relative gap; evaluations, of which some hundreds are usual


def nearest_psd(q: Tensor) -> Tensor:
    """The symmetric part of ``q`` ``[k, k]`` with negative eigenvalues set to 0: unbiased estimates can have some.

    >>> nearest_psd(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]])
    """
    q = (q + q.mT) / 2
    values, vectors = torch.linalg.eigh(q)
    return q if float(values[0]) >= 0 else (vectors * values.clamp_min(0)) @ vectors.mT


def minimise_quadratic(q: Tensor, b: Tensor) -> Tensor:
    """Weights ``w`` ``[k]`` on the simplex that minimise ``w'Qw - b'w``, to a gap of 1e-9 of the size of Q and b.

    Args:
        q: symmetric matrix ``[k, k]``; negative eigenvalues are set to 0.
        b: ``[k]``.

    >>> minimise_quadratic(torch.diag(torch.tensor([1 / 2, 1 / 3, 1 / 5], dtype=torch.float64)), torch.zeros(3))
    tensor([0.2000, 0.3000, 0.5000], dtype=torch.float64)
    """
    q, b = nearest_psd(q.double()), b.double()
    size = max(float(q.diagonal().mean()), float(b.abs().max()), 1e-300)
    q, b = q / size, b / size

    def objective(w: Tensor) -> tuple[Tensor, Tensor]:
        gradient = 2 * q @ w - b
        return w @ (gradient - b) / 2, gradient

    return minimise_on_simplex(objective, len(b), tolerance=TOLERANCE, max_steps=MAX_STEPS).weights
