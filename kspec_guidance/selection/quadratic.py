"""The minimum of a quadratic function over the simplex, exactly."""

import torch
from torch import Tensor

__all__ = ["minimise_quadratic", "nearest_psd"]

RIDGE = 1e-9  # on the diagonal, relative to its mean: one minimum where several are equal


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
    """Weights ``w`` ``[k]`` on the simplex that minimise ``w'Qw - b'w``, by an active set.

    Starts from the support of all weights. Weights that leave the simplex are dropped on the way to the minimum of the
    support; the weight whose multiplier is most negative comes back. It ends after finitely many supports (Nocedal, Wright,
    Numerical Optimization, algorithm 16.3).

    Args:
        q: symmetric matrix ``[k, k]``; negative eigenvalues are set to 0.
        b: ``[k]``.

    >>> minimise_quadratic(torch.diag(torch.tensor([1 / 2, 1 / 3, 1 / 5], dtype=torch.float64)), torch.zeros(3))
    tensor([0.2000, 0.3000, 0.5000], dtype=torch.float64)
    """
    k = len(b)
    q, b = nearest_psd(q.double()), b.double()
    size = max(float(q.diagonal().mean()), float(b.abs().max()), 1e-300)
    q, b = q / size + RIDGE * torch.eye(k, dtype=torch.float64), b / size
    w, inside = torch.full((k,), 1 / k, dtype=torch.float64), torch.ones(k, dtype=torch.bool)
    for _ in range(10 * k + 10):
        s = inside.nonzero()[:, 0]
        m = len(s)
        system = torch.zeros(m + 1, m + 1, dtype=torch.float64)
        system[:m, :m], system[:m, m], system[m, :m] = 2 * q[s][:, s], 1.0, 1.0
        aim = torch.linalg.solve(system, torch.cat([b[s], b.new_ones(1)]))[:m]
        step, here = 1.0, w[s]
        falling = aim < 0
        if bool(falling.any()):
            ratios = here[falling] / (here[falling] - aim[falling])
            step = float(ratios.min())
        moved = here + step * (aim - here)
        if step < 1.0:
            leaving = s[falling][ratios <= step + 1e-15]
            w[s] = moved
            w[leaving], inside[leaving] = 0.0, False
            continue
        w[s] = moved
        g = 2 * q @ w - b
        slack = g - g[s].mean()  # 0 on the support
        slack[s] = 0.0
        if float(slack.min()) >= -1e-12 * max(1.0, float(g.abs().max())):
            break
        inside[int(slack.argmin())] = True
    w = w.clamp_min(0)
    return w / w.sum()
