"""SPEC: the difference of two embeddings' kernel matrices, with both signs."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance.comparison.joint import Kernels, Modalities, check_counts, joint_kernels, modalities_of, sides, upright
from kspec_guidance.functional.novelty import SignedSpectrum, check_eta

__all__ = ["Spec", "spec"]

ROUNDING = 1e-9  # eigenvalues below it, of a difference of matrices of trace 1, are rounding errors


@dataclass(frozen=True)
class Spec:
    """Eigenvectors of the difference of two kernel matrices, from what A groups more to what B groups more.

    Attributes:
        values: ``[2 modes]``, falling. Positive ones say that A groups these samples and B less so, negative ones the
            reverse.
        vectors: unit vectors over the samples ``[2 modes, n]``, and 0 where the value is 0.
        positive, negative: samples on the two sides of each vector, the strongest first.
        distance: the largest absolute eigenvalue, 0 for equal kernels: what SPEC-align makes small.
        modality: for several modalities, the one in which the embedding that groups a vector does so and the other does
            not, as of :func:`koda`; empty for a single modality.
    """

    values: Tensor
    vectors: Tensor
    positive: list[list[int]]
    negative: list[list[int]]
    distance: float
    modality: list[str] = field(default_factory=list)


@torch.no_grad()
def spec(
    a: Modalities,
    b: Modalities,
    modes: int = 3,
    eta: float = 1.0,
    kernel_a: Kernels = None,
    kernel_b: Kernels = None,
    features: int | None = None,
    seed: int = 0,
) -> Spec:
    """What two embeddings of the same samples group differently (Jalali et al. 2025, SPEC, ICML).

    The eigenvectors of ``(K_A - eta K_B) / n`` with the largest and with the smallest eigenvalues. A group of a share p of
    the samples that A splits into equal halves and B merges has the eigenvalues p / 2 (the contrast of the halves) and
    -p / 2 (their sum). A group that both see, one more strongly, is returned as well: :func:`koda` bounds what B sees.

    Args:
        a: rows ``[n, d]`` of the samples by embedding A, or rows by name of modality.
        b: the same samples by embedding B, ``[n, e]``.
        modes: number of eigenvectors of each sign.
        eta: weight of B's kernel.
        kernel_a: kernel of A, or one for each modality; cosine by default. Choose bandwidths so that both kernels have
            like largest eigenvalues; else the difference is that of the bandwidths.
        kernel_b: kernel of B.
        features: number of random features of each embedding instead of exact kernels, as for :func:`koda`.
        seed: of random features.

    Raises:
        TypeError: for what is no tensor, or no kernel.
        ValueError: for different numbers of samples, different modalities, values that are not finite, or no modes.

    >>> z = torch.eye(3).repeat_interleave(4, 0)
    >>> found = spec(z, torch.eye(3)[[0, 0, 2]].repeat_interleave(4, 0), modes=1)  # B merges the first two of three groups
    >>> [round(v, 6) for v in found.values.tolist()], spec(z, z).distance
    ([0.333333, -0.333333], 0.0)
    """
    check_eta(eta)
    check_counts(modes=modes)
    first, second = joint_kernels(a, b, kernel_a, kernel_b, features, seed)
    n = first.n
    if first.rows is not None and second.rows is not None and first.rows.shape[1] + second.rows.shape[1] < n:
        rows = torch.cat([first.rows, eta**0.5 * second.rows], 1) / n**0.5
        sign = torch.cat([torch.ones(first.rows.shape[1]), -torch.ones(second.rows.shape[1])]).to(rows)
        values, inner = SignedSpectrum.apply(rows.mT @ rows, sign, True)
        columns = rows @ (sign[:, None] * inner)
    else:
        values, columns = torch.linalg.eigh((first.matrix - eta * second.matrix) / n)
    values = torch.where(values.abs() > ROUNDING, values, 0.0)
    k, order = min(modes, len(values) // 2), values.argsort(descending=True)
    chosen = torch.cat([order[:k], order[len(order) - k :]])
    vectors = upright(torch.nn.functional.normalize(columns[:, chosen], dim=0).T)
    vectors = torch.where(values[chosen, None] == 0, 0.0, vectors)
    more, less = modalities_of(vectors[:k], first, second)[1], modalities_of(vectors[k:], second, first)[1]
    return Spec(values[chosen], vectors, *sides(vectors), float(values.abs().max()), more + less)
