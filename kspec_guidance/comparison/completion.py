"""A kernel matrix from part of its entries."""

import warnings

import numpy as np
import torch
from torch import Tensor

from kspec_guidance.functional.inputs import on_host

__all__ = ["complete_kernel"]

ACCURATE = 1e-6  # largest difference from an observed value that is no failure
SAME = 1e-4  # difference of two values of one pair, or of the diagonal from 1, that is rounding


class _ImpossibleError(Exception):
    """No completion exists."""


def _check(k: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """Values and mask, both symmetric, with a diagonal of 1 that is observed."""
    if not isinstance(k, Tensor) or k.ndim != 2 or k.shape[0] != k.shape[1] or not k.numel():
        shape = list(k.shape) if isinstance(k, Tensor) else type(k).__name__
        raise ValueError(f"K must be a tensor of shape [n, n], got {shape}")
    if not isinstance(observed, Tensor) or observed.shape != k.shape or observed.dtype != torch.bool:
        found = f"{list(observed.shape)} of {observed.dtype}" if isinstance(observed, Tensor) else type(observed).__name__
        raise ValueError(f"observed must be a boolean tensor of shape {list(k.shape)}, got {found}")
    mask = observed.detach().cpu()
    values = torch.where(mask, on_host(k.detach()), 0.0)
    if not torch.isfinite(values).all():
        raise ValueError("K contains NaN or infinite values at observed entries; unobserved ones may hold anything")
    diagonal = torch.where(mask.diagonal(), values.diagonal(), 1.0)
    if float((diagonal - 1).abs().max()) > SAME:
        raise ValueError("the diagonal of K must be 1: divide entries by sqrt(k(x, x) k(y, y))")
    if float(values.abs().max()) > 1 + SAME:
        raise ValueError(
            f"entries of a kernel matrix with unit diagonal are at most 1, got {float(values.abs().max()):.4g}"
        )
    both = mask & mask.mT
    if float(torch.where(both, values - values.mT, 0.0).abs().max()) > SAME:
        raise ValueError("observed entries (i, j) and (j, i) differ; a kernel matrix is symmetric")
    values = torch.where(both, (values + values.mT) / 2, values + values.mT)
    return values.fill_diagonal_(1.0), (mask | mask.mT).fill_diagonal_(True)


def complete_kernel(K: Tensor, observed: Tensor, max_steps: int = 5000) -> Tensor:
    """The kernel matrix of largest entropy with the observed entries and unit diagonal.

    ``max H(K / n)``, ``H(r) = -tr r log r``, over positive semi-definite completions (the maximum entropy principle of
    arXiv 2602.02117). Its dual is smooth and has no constraints: ``min log tr exp(S) - sum S_ij K_ij / n`` over symmetric S
    that are zero where nothing was observed, with ``K = n exp(S) / tr exp(S)``. So the *logarithm* of the result is sparse
    where maximum determinant completion has a sparse inverse. Solved by L-BFGS, with one eigenvalue decomposition a step.

    Nothing observed gives the identity; samples with no chain of observed pairs between them get 0.

    Args:
        K: values ``[n, n]``; entries that are not observed are ignored and may be NaN. The diagonal is 1.
        observed: boolean mask ``[n, n]``; an entry counts for its mirror image too. The diagonal is always known.
        max_steps: iterations of L-BFGS.

    Returns:
        The completed matrix ``[n, n]``, float64.

    Raises:
        ValueError: for other shapes, NaN at observed entries, values that are not symmetric, above 1 or not 1 on the
            diagonal; or if no completion is positive semi-definite.

    Warns:
        UserWarning: if the observed entries are not met to 1e-6, as where only singular matrices have them.

    >>> chain = torch.tensor([[1.0, 0.6, 0.0], [0.6, 1.0, 0.6], [0.0, 0.6, 1.0]])
    >>> round(complete_kernel(chain, chain > 0)[0, 2].item(), 4)
    0.208
    """
    from scipy.optimize import OptimizeResult, minimize

    k, mask = _check(K, observed)
    n = len(k)
    if mask.all():
        lowest = float(torch.linalg.eigvalsh(k)[0])
        if lowest < -SAME * n:
            raise ValueError(
                f"all entries are observed, and K is not positive semi-definite: its eigenvalues go down to {lowest:.3g}"
            )
        return k
    rows, columns = mask.triu().nonzero(as_tuple=True)
    twice = torch.where(rows == columns, 1.0, 2.0).double()
    target = k[rows, columns]

    def completion(theta: np.ndarray) -> tuple[Tensor, Tensor]:
        s = torch.zeros_like(k)
        s[rows, columns] = s[columns, rows] = torch.from_numpy(theta)
        l, v = torch.linalg.eigh(s)
        log_trace = l.logsumexp(0)
        return log_trace, n * (v * (l - log_trace).exp()) @ v.mT

    def dual(theta: np.ndarray) -> tuple[float, np.ndarray]:
        log_trace, found = completion(theta)
        value = log_trace - (twice * torch.from_numpy(theta) * target).sum() / n
        return float(n * value), (twice * (found[rows, columns] - target)).numpy()

    def stop(intermediate_result: OptimizeResult) -> None:
        if intermediate_result.fun < -1e-6 * n:  # it bounds the entropy of each completion, which is at least 0
            raise _ImpossibleError

    start = np.zeros(len(rows))
    try:
        options = {"maxiter": max_steps, "maxfun": 2 * max_steps, "maxcor": 30, "gtol": 1e-10, "ftol": 0.0}
        found = minimize(dual, start, jac=True, method="L-BFGS-B", options=options, callback=stop)
    except _ImpossibleError:
        raise ValueError(
            "no positive semi-definite matrix has these entries: the largest entropy of a completion is below 0. "
            "Check the values, or observe fewer of them"
        ) from None
    result = completion(found.x)[1]
    result = (result + result.mT) / 2
    residual = float((result[rows, columns] - target).abs().max())
    if residual > ACCURATE:
        warnings.warn(
            f"the completed matrix differs from observed entries by up to {residual:.2g} after {found.nit} steps: only a "
            "singular matrix, or none, has these entries",
            stacklevel=2,
        )
    return result
