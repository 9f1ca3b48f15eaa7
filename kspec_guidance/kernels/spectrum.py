"""Eigenvalues and entropies of kernel and covariance matrices, always in float64."""

import math
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.utils.arguments import is_integer

__all__ = [
    "accumulate_gram",
    "check_order",
    "cholesky_factor",
    "cross_products",
    "eigenvalues",
    "inverse_of_factor",
    "largest_eigenvalues",
    "mirror_upper",
    "noise_level",
    "own_products",
    "own_products_of_factor",
    "renyi_entropy",
    "symmetric_eigenvalues",
    "times_factor",
    "truncate",
]

BLOCK = 512  # columns of a symmetric product that are computed at once
ROWS = 512  # that are converted to float64 at once, into memory that is used again: new memory costs more than the copy
TILE = 128  # rows and columns that are mirrored at once: a tile and its image stay in the cache
SMALL, LARGE = 96, 1500  # rows of a matrix between which eigenvalues by scipy take less time than by torch
KRYLOV_ROWS = 1000  # rows of a matrix below which all eigenvalues take no longer than the largest ones
KRYLOV_SPARE = 8  # directions of a block beside those that are asked for
KRYLOV_BLOCKS = 30  # blocks before all eigenvalues are computed instead


def check_order(order: float) -> float:
    """The order of an entropy as a float.

    Raises:
        ValueError: unless ``0 < order <= inf``.
    """
    order = float(order)
    if math.isnan(order) or order <= 0:
        raise ValueError(f"the order of an entropy must lie in (0, inf], got {order}")
    return order


def _by_scipy(x: Tensor) -> bool:
    """Whether BLAS and LAPACK of numpy and scipy compute a result of float64 rows: on the host, without a gradient.

    They are OpenBLAS. On an AMD processor it takes 0.6 of the time of torch's MKL for the eigenvalues of a thousand rows
    (as much for 2,000), and it has products that compute one triangle of a symmetric result, which torch has not. Both
    have the same accuracy.
    """
    return x.dtype == torch.float64 and _on_host(x)


def _on_host(x: Tensor) -> bool:
    """Whether numpy can compute with ``x``: it is in the host's memory and needs no gradient."""
    return x.device.type == "cpu" and not (x.requires_grad and torch.is_grad_enabled())


def _column_major(matrix: Tensor) -> Any:
    """The transpose as an array with columns first, which BLAS and LAPACK read without a copy."""
    return matrix.detach().contiguous().numpy().T


def symmetric_eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues ``[..., n]`` of symmetric ``[..., n, n]``, ascending, in float64; only the lower triangle is read."""
    matrix = matrix.double()
    n = matrix.shape[-1]
    if not SMALL <= n <= LARGE or not _by_scipy(matrix):
        return torch.linalg.eigvalsh(matrix)
    from scipy.linalg import eigvalsh

    each = [torch.from_numpy(eigvalsh(_column_major(m), lower=False)) for m in matrix.reshape(-1, n, n)]
    return torch.stack(each).reshape(matrix.shape[:-1])


def times_factor(l: Tensor, b: Tensor) -> Tensor:
    """``L b`` ``[n, m]`` of a lower triangular ``L`` ``[n, n]``, in half of the operations of a product."""
    if min(*l.shape, *b.shape) < SMALL or not (_by_scipy(l) and _by_scipy(b)):
        return l @ b
    from scipy.linalg.blas import dtrmm

    return torch.from_numpy(dtrmm(1.0, _column_major(l), _column_major(b), side=1).T)


def eigenvalues(matrix: Tensor) -> Tensor:
    """Eigenvalues ``[..., n]`` of symmetric positive semi-definite ``[..., n, n]``, ascending, clamped to at least 0."""
    return symmetric_eigenvalues(matrix).clamp_min(0)


def largest_eigenvalues(matrix: Tensor, count: int, tolerance: float = 1e-9) -> Tensor | None:
    """The ``count`` largest eigenvalues ``[count]``, ascending, of a large semi-definite float64 matrix of trace at most 1.

    By Rayleigh-Ritz on a Krylov space of random blocks (block Lanczos with full orthogonalisation: Golub, Van Loan 2013,
    section 10.3.6). With R the residuals of the Ritz vectors, ``count`` eigenvalues differ from the Ritz values by at most
    the norm of R (Kahan 1967), which is computed, and is at most ``tolerance`` times the smallest of the result after its
    tail is added (:func:`truncate`), or 4e-14. A block has more than ``count`` directions, so it has a part in each
    eigenvector, repeated eigenvalues too, with probability 1; those that exceed the result by more than the bound have
    been found unless this part is below 1e-9.

    Returns:
        None where this is not faster than all eigenvalues: for matrices that are small, batched, or on another device,
        for many eigenvalues, and where the residuals decrease slowly, as they do without gaps between eigenvalues. None,
        too, where a gradient is needed.
    """
    n, width = matrix.shape[-1], count + KRYLOV_SPARE
    if matrix.ndim != 2 or n < KRYLOV_ROWS or 32 * width > n or not _by_scipy(matrix):
        return None
    g = torch.Generator().manual_seed(0)
    new = torch.linalg.qr(torch.randn(n, width, dtype=torch.float64, generator=g, device="cpu")).Q
    basis, images, small = new[:, :0], new[:, :0], matrix.new_zeros(0, 0)
    residuals: list[float] = []
    for k in range(KRYLOV_BLOCKS):
        image = torch.from_numpy(matrix.detach().numpy() @ new.numpy())  # in half of the time of torch's product
        side, corner = basis.mT @ image, new.mT @ image
        small = torch.cat([torch.cat([small, side], 1), torch.cat([side.mT, (corner + corner.mT) / 2], 1)])
        basis, images = torch.cat([basis, new], 1), torch.cat([images, image], 1)
        l, v = torch.linalg.eigh(small)
        l, v = l[-count:], v[:, -count:]
        residuals.append(float(torch.linalg.matrix_norm(images @ v - (basis @ v) * l)))
        least = max(tolerance * float(l[0] + (1 - l.sum()) / count), 4e-14)
        if residuals[-1] <= least:
            return l
        if k >= 8:
            rate = (residuals[-1] / residuals[-4]) ** (1 / 3)
            if rate >= 1 or k + math.log(least / residuals[-1]) / math.log(rate) > KRYLOV_BLOCKS:
                return None
        for _ in range(2):  # twice is enough, also where the image has no new direction
            image = image - basis @ (basis.mT @ image)
            image = torch.linalg.qr(image).Q
        new = image
    return None


def own_products(a: Tensor) -> Tensor:
    """``a' a`` ``[..., d, d]`` of ``[..., n, d]``: inner products of columns, half of them computed if possible."""
    if a.ndim != 2 or min(a.shape) < SMALL or not _on_host(a) or a.dtype not in (torch.float32, torch.float64):
        return a.mT @ a
    rows = a.detach().numpy()
    return torch.from_numpy(rows.T @ rows)  # numpy sees that both are the same


def cross_products(a: Tensor, b: Tensor) -> Tensor:
    """``a' b`` ``[..., d, e]`` of rows ``[..., n, d]`` and ``[..., n, e]``."""
    if a.ndim != 2 or b.ndim != 2 or min(*a.shape, *b.shape) < SMALL or not (_by_scipy(a) and _by_scipy(b)):
        return a.mT @ b
    return torch.from_numpy(a.detach().numpy().T @ b.detach().numpy())


def cholesky_factor(g: Tensor) -> Tensor | None:
    """Lower triangular ``L`` ``[..., n, n]`` with ``L L' = G``; None if there is none. Only the lower triangle is read."""
    if g.ndim != 2 or len(g) < SMALL or not _by_scipy(g):
        factor, failed = torch.linalg.cholesky_ex(g)
        return None if bool(failed.any()) else factor
    from scipy.linalg.lapack import dpotrf

    upper, failed = dpotrf(_column_major(g), lower=0, clean=1)
    return None if failed else torch.from_numpy(upper.T)


def inverse_of_factor(l: Tensor) -> Tensor:
    """The inverse of a lower triangular ``L`` ``[n, n]`` that has no zero on its diagonal."""
    if len(l) < SMALL or not _by_scipy(l):
        return torch.linalg.solve_triangular(l, torch.eye(len(l), dtype=l.dtype, device=l.device), upper=False)
    from scipy.linalg.lapack import dtrtri

    return torch.from_numpy(dtrtri(_column_major(l), lower=0)[0].T)


def own_products_of_factor(l: Tensor) -> Tensor:
    """``L' L`` ``[n, n]`` of a lower triangular ``L``, in a third of the operations; not defined above the diagonal."""
    if len(l) < SMALL or not _by_scipy(l):
        return l.mT @ l
    from scipy.linalg.lapack import dlauum

    return torch.from_numpy(dlauum(_column_major(l), lower=0)[0].T)


def noise_level(spectrum: Tensor) -> Tensor:
    """Size ``[..., 1]`` below which eigenvalues ``[..., n]`` are rounding errors: ``n`` rounding units of the largest.

    At least 100 units, since a small matrix can be a sum over many samples.
    """
    return max(spectrum.shape[-1], 100) * torch.finfo(spectrum.dtype).eps * spectrum.abs().amax(-1, keepdim=True)


def renyi_entropy(spectrum: Tensor, order: float = 1.0) -> Tensor:
    """Renyi entropy ``[...]`` in nats of a spectrum ``[..., n]`` that sums to 1.

    ``log(sum l^q) / (1 - q)``; Shannon's ``-sum l log l`` at ``q = 1``; ``-log max l`` at infinity. Eigenvalues below
    :func:`noise_level` are ignored: their share would grow as q goes to 0.

    >>> renyi_entropy(torch.tensor([0.5, 0.5]), order=2).exp().item()
    2.0
    """
    order = check_order(order)
    l = spectrum.double()
    if math.isinf(order):
        return -l.amax(-1).log()
    nonzero = l > noise_level(l)
    safe = torch.where(nonzero, l, torch.ones_like(l))
    if order == 1:
        return -torch.where(nonzero, safe * safe.log(), 0).sum(-1)
    if abs(order - 1) < 0.1:  # sum l^q = 1 + sum l (l^(q - 1) - 1), without the cancellation
        return torch.where(nonzero, safe * torch.expm1((order - 1) * safe.log()), 0).sum(-1).log1p() / (1 - order)
    return torch.where(nonzero, order * safe.log(), -math.inf).logsumexp(-1) / (1 - order)


def truncate(spectrum: Tensor, truncation: int | None) -> Tensor:
    """The t largest eigenvalues ``[..., t]``, each raised by ``(1 - their sum) / t`` (Ospanov, Farnia 2024).

    The whole spectrum must sum to 1; eigenvalues that were not computed, e.g. by a Nystrom map, are part of the tail.

    Raises:
        ValueError: for a truncation below 1.
    """
    if truncation is None:
        return spectrum
    if not is_integer(truncation, 1):
        raise ValueError(f"truncation must be an integer, and keep at least 1 eigenvalue; got {truncation!r}")
    top = spectrum.topk(min(truncation, spectrum.shape[-1]), dim=-1).values
    return top + (1 - top.sum(-1, keepdim=True)) / top.shape[-1]


def mirror_upper(matrix: Tensor) -> None:
    """Copy what is above the diagonal of ``[d, d]`` to the places below, in place."""
    if matrix.device.type != "cpu":
        matrix.copy_(matrix.triu() + matrix.triu(1).mT)
        return
    for i in range(0, len(matrix), TILE):
        rows = slice(i, i + TILE)
        square = matrix[rows, rows]
        square.copy_(square.triu() + square.triu(1).mT)
        for j in range(i + TILE, len(matrix), TILE):
            matrix[j : j + TILE, rows] = matrix[rows, j : j + TILE].mT


def accumulate_gram(total: Tensor, a: Tensor, b: Tensor | None = None) -> None:
    """Add ``a' b`` in float64 to ``total`` ``[D, E]``, in place; ``a' a`` if ``b`` is None.

    Of the symmetric ``a' a`` only the part on and above the diagonal is sure to be added, which saves half of the work:
    call :func:`mirror_upper` before what is below is read. Products are in float64, since rounding in float32 would appear
    as thousands of small modes.
    """
    if b is not None:
        total.addmm_(a.double().mT, b.double())
    elif total.is_contiguous() and _on_host(a):
        from scipy.linalg.blas import dsyrk

        parts, buffer = [a], None
        if a.dtype != torch.float64:
            parts, buffer = a.split(ROWS), a.new_empty(min(len(a), ROWS), a.shape[1], dtype=torch.float64)
        for part in parts if len(a) else ():
            part = part if buffer is None else buffer[: len(part)].copy_(part)
            # ``total`` is contiguous, so ``c`` is not a copy, and is written in place
            dsyrk(1.0, _column_major(part), beta=1.0, c=_column_major(total), lower=1, overwrite_c=1)
    else:
        a = a.double()
        for i in range(0, a.shape[1], BLOCK):
            total[i : i + BLOCK, i:].addmm_(a[:, i : i + BLOCK].mT, a[:, i:])
