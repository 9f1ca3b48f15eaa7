"""Which embeddings to combine, and how much of each: the mixture of kernels with the largest entropy."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix, on_host, unit_gram
from kspec_guidance.functional.novelty import root
from kspec_guidance.functional.simplex import SimplexSolution, minimise_on_simplex
from kspec_guidance.functional.vendi import entropy_and_log, entropy_of
from kspec_guidance.kernels import CosineKernel

__all__ = ["EntropyMixture", "max_entropy_mixture", "max_entropy_weights"]


@dataclass(frozen=True)
class EntropyMixture:
    """Weights of embeddings whose mixture of kernels has the largest entropy.

    Attributes:
        weights: one for each embedding ``[m]``; their sum is 1.
        entropy: von Neumann entropy of the mixture, in nats; its exponential is a Vendi score.
        gap: upper bound of how much larger the entropy could be.
        entropies: of the single embeddings ``[m]``, in nats.
        cosine: whether the kernels are cosines, so that :meth:`fuse` gives the features of the mixture.
    """

    weights: Tensor
    entropy: float
    gap: float
    entropies: Tensor
    cosine: bool

    def fuse(self, embeddings: Sequence[Tensor]) -> Tensor:
        """Rows ``concat_i sqrt(w_i) z_i / |z_i|`` ``[n, sum of d_i]``, whose inner products are the mixture of cosines.

        Args:
            embeddings: rows ``[n, d_i]`` of each embedding, of the same samples; they may be new ones.

        Raises:
            ValueError: for another number of embeddings, or of rows; or if the kernels are not cosines.
        """
        if not self.cosine:
            raise ValueError("only a mixture of cosine kernels has features of finite length; use kernel=None")
        if len(embeddings) != len(self.weights):
            raise ValueError(f"the mixture is of {len(self.weights)} embeddings, got {len(embeddings)}")
        rows = _check_embeddings(embeddings)
        return torch.cat([math.sqrt(w) * CosineKernel.features(z) for w, z in zip(self.weights, rows, strict=True)], -1)


def _check_embeddings(embeddings: Sequence[Tensor]) -> list[Tensor]:
    if isinstance(embeddings, Tensor) or not embeddings:
        raise ValueError("give a list of embeddings [z_1, z_2, ...], each of shape [n, d]")
    found = [on_host(check_matrix(z, f"embedding {i + 1}").detach()) for i, z in enumerate(embeddings)]
    sizes = {len(z) for z in found}
    if len(sizes) > 1:
        raise ValueError(f"the embeddings have {[len(z) for z in found]} rows; give rows of the same samples, in one order")
    return found


def max_entropy_weights(matrices: Tensor, tolerance: float = 1e-8, max_steps: int = 2000) -> SimplexSolution:
    """Weights that maximise the von Neumann entropy ``H(sum_i w_i r_i)``, ``H(r) = -tr r log r``.

    The entropy is concave, with gradient ``-tr(r_i log r) - 1``. At the maximum r, ``-tr(r_i log r) = H(r)`` for each
    matrix with a positive weight, and at most that for the others. So r has the smallest largest loss ``-tr(s log r)``
    among all s in the convex hull: the minimax principle of Grünwald and Dawid (2004) for density matrices.

    Args:
        matrices: ``[m, p, p]``, positive semi-definite and of trace 1.
        tolerance: largest duality gap, in nats.
        max_steps: eigenvalue decompositions.

    Returns:
        Weights; ``value`` is the negative entropy.

    Raises:
        ValueError: for another shape, or matrices that are not symmetric, of another trace or not positive semi-definite.

    >>> two, three = torch.diag(torch.tensor([.5, .5, 0, 0, 0])), torch.diag(torch.tensor([0, 0, 1, 1, 1]) / 3)
    >>> max_entropy_weights(torch.stack([two, three])).weights
    tensor([0.4000, 0.6000], dtype=torch.float64)
    """
    if matrices.ndim != 3 or matrices.shape[1] != matrices.shape[2] or not matrices.numel():
        raise ValueError(f"matrices must have shape [m, p, p], got {list(matrices.shape)}")
    r = on_host(matrices.detach())
    if not torch.isfinite(r).all():
        raise ValueError("the matrices contain NaN or infinite values")
    if not torch.allclose(r, r.mT, atol=1e-6):
        raise ValueError("the matrices must be symmetric")
    traces = r.diagonal(dim1=1, dim2=2).sum(-1)
    if not torch.allclose(traces, torch.ones_like(traces), atol=1e-4):
        raise ValueError(f"the matrices must have trace 1, got {[round(float(t), 4) for t in traces]}")
    lowest = float(torch.linalg.eigvalsh(r).amin())
    if lowest < -1e-4:
        raise ValueError(f"the matrices must be positive semi-definite, got an eigenvalue of {lowest:.3g}")
    flat = r.flatten(1)

    def objective(w: Tensor) -> tuple[Tensor, Tensor]:
        entropy, log = entropy_and_log((w @ flat).view_as(r[0]))
        return -entropy, flat @ log.flatten() + 1

    return minimise_on_simplex(objective, len(r), tolerance=tolerance, max_steps=max_steps)


def _density_matrices(rows: list[Tensor], kernel: KernelLike | None) -> Tensor:
    """``K_i / n`` ``[m, p, p]`` in a basis of the smaller of the sample space and the space of all features."""
    n = len(rows[0])
    if isinstance(kernel, CosineKernel | None):
        phi = [CosineKernel.features(z) / math.sqrt(n) for z in rows]
        if sum(z.shape[1] for z in phi) < n:
            whole = torch.cat(phi, dim=1)  # U R' with orthonormal columns of U
            phi = list(root(whole.mT @ whole).mT.split([z.shape[1] for z in phi], dim=1))
        return torch.stack([z @ z.mT for z in phi])
    made = as_kernel(kernel)
    return torch.stack([unit_gram(made.fit(z), z) for z in rows]) / n


def max_entropy_mixture(embeddings: Sequence[Tensor], kernel: KernelLike | None = None) -> EntropyMixture:
    """The convex combination of embeddings' kernels with the largest von Neumann entropy.

    ``max H(sum_i w_i K_i / n)`` over weights, after the maximum entropy principle for density matrices (arXiv
    2602.02117), by exponentiated gradients down to a duality gap of 1e-8. An embedding that sees nothing that the others
    miss gets weight 0. With cosine kernels the cost of a step is cubic in the smaller of n and the sum of widths; the
    mixture is the kernel of concatenated features, see :meth:`EntropyMixture.fuse`.

    Entropy cannot tell detail from noise. Kernels must be comparable: cosines of features as they come, or one bandwidth
    on one scale. With a bandwidth fitted to each embedding, an embedding of pure noise has the largest entropy and wins.

    Args:
        embeddings: rows ``[n, d_i]`` of the same n samples.
        kernel: cosine by default; the same for all embeddings.

    Raises:
        ValueError: for no embeddings, different numbers of rows, NaN, or a function that is no kernel.

    Warns:
        UserWarning: for a kernel without a bandwidth.

    >>> a, b = torch.eye(4).repeat(3, 1), torch.ones(12, 2)  # b sees no differences
    >>> max_entropy_mixture([a, b]).weights.round(decimals=3).tolist()
    [1.0, 0.0]
    """
    rows = _check_embeddings(embeddings)
    if kernel is not None and as_kernel(kernel).open:
        warnings.warn(
            f"{kernel!r} has no bandwidth, so one is fitted to each embedding; then an embedding of pure noise has the "
            "largest entropy. Give one bandwidth for features of one scale, or use the cosine kernel",
            stacklevel=2,
        )
    matrices = _density_matrices(rows, kernel)
    found = max_entropy_weights(matrices)
    return EntropyMixture(
        found.weights, -found.value, found.gap, entropy_of(matrices), isinstance(kernel, CosineKernel | None)
    )
