"""Checks for user-defined kernels, scores and objectives, and inputs whose scores are known in closed form.

    from kspec_guidance.testing import check_kernel
    check_kernel(MyKernel(0.5))

Each check raises an AssertionError that names the property that does not hold. pytest is not needed.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kspec_guidance.kernels import Kernel
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import Objective

__all__ = ["check_kernel", "check_objective", "check_score", "clusters", "two_points"]

WIDTHS = (1, 3, 7)


def clusters(groups: int, each: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """``groups`` orthogonal points, each repeated ``each`` times ``[groups * each, groups]``.

    The Vendi score of every order with the cosine kernel is ``groups``: the spectrum is ``1 / groups``, ``groups`` times.

    >>> from kspec_guidance import functional as F
    >>> round(float(F.vendi_score(clusters(5, 3), order=0.5)), 6)
    5.0
    """
    return torch.eye(groups, dtype=dtype).repeat_interleave(each, dim=0)


def two_points(cosine: float) -> tuple[Tensor, tuple[float, float]]:
    """Two unit vectors ``[2, 2]`` with the given cosine, and the eigenvalues ``(1 -+ cosine) / 2`` of ``K / 2``."""
    x = torch.tensor([[1.0, 0.0], [cosine, (1 - cosine**2) ** 0.5]], dtype=torch.float64)
    return x, ((1 - cosine) / 2, (1 + cosine) / 2)


def _rows(n: int, d: int, seed: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _same(a: Tensor, b: Tensor, law: str, rtol: float = 1e-7, atol: float = 1e-10) -> None:
    if a.shape != b.shape or not torch.allclose(a, b, rtol=rtol, atol=atol):
        off = f"off by {float((a - b).abs().max()):.2e}" if a.shape == b.shape else f"shapes {[*a.shape]} and {[*b.shape]}"
        raise AssertionError(f"{law}: {off}")


def check_kernel(kernel: Kernel, d: int = 6) -> None:
    """Check symmetry, positive semi-definiteness, ``diagonal``, ``squared`` and ``vjp`` (against autograd).

    An unset bandwidth is fitted first.

    Args:
        kernel: the kernel to check.
        d: width of the random rows, in float64.

    Raises:
        AssertionError: naming the property that does not hold.
    """
    kernel = kernel.fit(_rows(20, d, 0))
    for n in WIDTHS:
        x, y = _rows(n, d, n), _rows(n + 2, d, n + 1)
        k = kernel(x)
        _same(k, k.mT, "k(x, y) = k(y, x)")
        _same(kernel(x, y), kernel(y, x).mT, "k(x, y) = k(y, x)")
        _same(torch.diagonal(k), kernel.diagonal(x), "diagonal(x) = k(x, x)")
        _same(kernel.squared()(x, y), kernel(x, y) ** 2, "squared() is k^2")
        lowest = float(torch.linalg.eigvalsh(k)[0])
        if lowest < -1e-9 * float(k.abs().max()) * n:
            raise AssertionError(f"the kernel matrix is positive semi-definite: its smallest eigenvalue is {lowest:.2e}")
        if type(kernel).vjp is not Kernel.vjp:
            weight, leaf = _rows(n, n + 2, 9), x.clone().requires_grad_()
            (expected,) = torch.autograd.grad((weight * kernel(leaf, y)).sum(), leaf)
            _same(kernel.vjp(x, y, weight), expected, "vjp is the derivative")
            (expected,) = torch.autograd.grad((kernel(leaf, y) ** 3).sum(), leaf)
            _same(kernel.vjp(x, y, lambda k: 3 * k**2), expected, "vjp is the derivative, weight a function of k")


def check_score(score: Callable[[Tensor], Tensor | float]) -> None:
    """Check an effective number: 1 for copies, k for k distant groups, invariant to order and to repetition of the set.

    Args:
        score: a function of rows ``[n, d]``.

    Raises:
        AssertionError: naming the property that does not hold.
    """

    def of(x: Tensor) -> float:
        return float(score(x))

    def need(found: float, expected: float, law: str) -> None:
        if not abs(found - expected) <= 1e-4 * max(1.0, abs(expected)):
            raise AssertionError(f"{law}: expected {expected:g}, found {found:g}")

    need(of(torch.ones(5, 4, dtype=torch.float64)), 1.0, "copies of one sample have score 1")
    for groups in (2, 5):
        need(of(1e3 * clusters(groups, 3)), groups, f"{groups} distant orthogonal groups of copies have score {groups}")
    x = _rows(9, 4, 0)
    need(of(x.flip(0)), of(x), "the order of samples does not matter")
    need(of(torch.cat([x, x])), of(x), "repeating the whole set does not change the score")


def check_objective(objective: Objective, d: int = 6, p: int = 3) -> None:
    """Check ``gradient`` against autograd of ``value``: alone, with prompts, and with a memory.

    Set the bandwidths first: ``gradient`` treats a fitted bandwidth as a constant, autograd does not.

    Args:
        objective: the objective to check.
        d: width of the random samples, in float64.
        p: width of the random prompt features.

    Raises:
        AssertionError: naming the case.
    """
    bank = MemoryBank()
    bank.add(_rows(8, d, 5), _rows(8, p, 6))
    for n in (2, 5):
        for name, t, memory in (
            ("alone", None, None), ("with prompts", _rows(n, p, 2), None), ("with a memory", _rows(n, p, 2), bank),
        ):  # fmt: skip
            x = _rows(n, d, n).requires_grad_()
            (expected,) = torch.autograd.grad(objective.value(x, t, memory), x)
            found = objective.gradient(x.detach(), t, memory).rows
            _same(found, expected, f"gradient is the derivative of value, {name}, n = {n}", 1e-5, 1e-9)
