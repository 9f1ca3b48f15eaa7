"""Weights of several candidates per prompt that raise the conditional entropy and move the distribution least."""

import torch
from torch import Tensor

from kspec_guidance.comparison.joint import check_counts, joint_rows
from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix, check_paired, on_host
from kspec_guidance.functional.simplex import minimise_on_simplex
from kspec_guidance.functional.vendi import entropy_and_log
from kspec_guidance.kernels import l2_normalize
from kspec_guidance.utils.arguments import is_integer

__all__ = ["entropy_projection"]

EXACT_ROWS = 1500  # rows up to which the kernel matrix is factored


def entropy_projection(
    x: Tensor,
    t: Tensor,
    candidates: int,
    entropy_weight: float = 0.1,
    kernel: KernelLike | None = None,
    prompt_kernel: KernelLike | None = None,
    features: int | None = None,
    seed: int = 0,
) -> Tensor:
    """Weights of the candidates of each prompt: more varied given the prompts, and as close to the candidates as can be.

    For N prompts with m candidates each, weights ``p_i`` in the simplex minimise ``|1/N sum (p_ij - 1/m) z_ij|^2 - lam
    H(1/N sum p_ij z_ij z_ij')``, where z are joint features of output and prompt, and H the von Neumann entropy (the
    projection of Wu and Farnia, 2026). Conditional entropy is concave in the joint law, and the prompts' own law stays
    uniform, so the problem is convex; it is solved by exponentiated gradients down to a duality gap of 1e-8.

    Args:
        x: outputs ``[n, d]``, the m candidates of a prompt next to each other.
        t: prompt features ``[n, p]``, one row per output; or ``[n / m, p]``, one per prompt.
        candidates: m, at least 1; n is a multiple of it.
        entropy_weight: lam, at least 0; 0 gives the weights ``1 / m``.
        kernel: of outputs; cosine by default.
        prompt_kernel: of prompts; cosine by default.
        features: number of random features of the product of kernels; by default exact up to 1500 rows and 512 above.
        seed: of the random features.

    Returns:
        Weights ``[n]``, float64; those of each prompt sum to 1.

    Raises:
        ValueError: for n that is no multiple of ``candidates``, prompt features that differ within a block, NaN, a negative
            or infinite weight, or random features of a kernel that is not cosine, Gaussian or Laplacian.

    Warns:
        UserWarning: if the gap stays above 1e-8.

    >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])  # three of four candidates are alike
    >>> w = entropy_projection(x, torch.ones(4, 1), candidates=4)
    >>> bool(w[3] > 0.25), round(w.sum().item(), 6)
    (True, 1.0)
    """
    x, t = check_matrix(x), check_matrix(t, "t")
    if not is_integer(candidates, 1) or len(x) % candidates:
        raise ValueError(
            f"candidates must be an integer of at least 1 that divides the number of rows, {len(x)}, since each prompt has "
            f"as many; got {candidates!r}"
        )
    if not 0 <= entropy_weight < float("inf"):
        raise ValueError(f"entropy_weight must be finite and at least 0, got {entropy_weight}")
    check_counts(features=features)
    m = int(candidates)
    prompts = len(x) // m
    if len(t) == prompts and m > 1:
        t = t.repeat_interleave(m, 0)
    x, t = (on_host(z.detach()) for z in check_paired(x, t))
    blocks = t.view(prompts, m, -1)
    if float((blocks - blocks[:, :1]).abs().max()) > 1e-4 * float(t.abs().max()):
        raise ValueError(f"rows of t differ within a block of {m}; put the candidates of a prompt next to each other")
    if features is None and len(x) > EXACT_ROWS:
        features = 512
    kernels = [as_kernel(k).fit(rows) for k, rows in ((kernel, x), (prompt_kernel, t))]
    z = l2_normalize(joint_rows([x, t], kernels, features, seed=seed))

    def objective(p: Tensor) -> tuple[Tensor, Tensor]:
        a = p.flatten() / prompts
        moved = (a - 1 / len(z)) @ z
        entropy, log = entropy_and_log(z.mT @ (a[:, None] * z))
        slope = 2 * z @ moved + entropy_weight * ((z @ log * z).sum(1) + 1)
        return moved @ moved - entropy_weight * entropy, (slope / prompts).view(prompts, m)

    return minimise_on_simplex(objective, torch.full((prompts, m), 1 / m)).weights.flatten()
