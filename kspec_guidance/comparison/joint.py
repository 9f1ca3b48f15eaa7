"""Kernels of samples that have several modalities, such as an image and its prompt: products of one kernel for each."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures, RandomProductProjection, tensor_product
from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix, joint_gram, on_host, second_moment
from kspec_guidance.functional.modes import larger_side
from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel, LaplacianKernel, l2_normalize
from kspec_guidance.kernels.spectrum import noise_level
from kspec_guidance.utils.arguments import is_integer

__all__ = [
    "METHODS",
    "JointFeatures",
    "JointKernel",
    "Kernels",
    "Modalities",
    "as_modalities",
    "check_counts",
    "exact_rows",
    "fit_kernels",
    "joint_kernels",
    "joint_rows",
    "modalities_of",
    "random_rows",
    "sides",
    "simplest_turn",
    "strongest",
    "unit_rows",
    "upright",
]

Modalities = Tensor | Mapping[str, Tensor]
"""Rows ``[n, d]``, or rows of several modalities of the same samples by name."""

Kernels = KernelLike | Mapping[str, KernelLike | None] | None
"""A kernel for all modalities, or one for each by name; cosine where there is none."""

METHODS = ("fourier", "projection")
ROUNDING = 1e-12  # entries and variances below it are rounding errors
TIES = 1e-9  # relative difference below which values are taken as equal
SHARED = 0.5  # part of a strength that one modality must explain, to be named
TURNS = 100  # of a rotation, at most
STRONG = 0.5  # absolute entry, relative to the largest one, from which a sample is listed


def check_counts(**counts: Any) -> None:
    """Check that arguments, given by name, are integers of at least 1; None is none.

    Raises:
        ValueError: naming the first one that is not.
    """
    for name, value in counts.items():
        if value is not None and not is_integer(value, 1):
            raise ValueError(f"{name} must be at least 1, a whole number, got {value!r}")


def as_modalities(x: Modalities, name: str) -> dict[str, Tensor]:
    """Rows by modality in float64 on the host; a tensor is the one modality ``""``.

    Raises:
        TypeError: if a modality is not a tensor of real numbers.
        ValueError: for no modality, values that are not finite, or modalities of different numbers of samples.
    """
    parts = dict(x) if isinstance(x, Mapping) else {"": x}
    if not parts:
        raise ValueError(
            f"{name} has no modality; give rows [n, d], or a dict of rows such as {{'image': ..., 'text': ...}}"
        )
    found = {k: on_host(check_matrix(v, f"{name}[{k!r}]" if k else name)) for k, v in parts.items()}
    sizes = {k: len(v) for k, v in found.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"all modalities of {name} must have one row per sample, got {sizes}")
    return found


def fit_kernels(kernel: Kernels, rows: Mapping[str, Tensor]) -> list[Kernel]:
    """The kernel of each modality, with open bandwidths fitted to its rows.

    Raises:
        TypeError: for what is no kernel.
        ValueError: for kernels of other modalities.
    """
    if isinstance(kernel, Mapping):
        if set(kernel) - set(rows):
            raise ValueError(f"there are kernels for {sorted(kernel)}, and the modalities are {sorted(rows)}")
        return [as_kernel(kernel.get(name)).fit(x) for name, x in rows.items()]
    return [as_kernel(kernel).fit(x) for x in rows.values()]


def exact_rows(rows: Sequence[Tensor], kernels: Sequence[Kernel]) -> Tensor | None:
    """Rows ``[n, D]`` whose inner products are the joint kernel, for cosine kernels and D below n; else None."""
    if not all(isinstance(kernel, CosineKernel) for kernel in kernels):
        return None
    parts = [CosineKernel.features(x) for x in rows]
    found = parts[0]
    for part in parts[1:]:
        if found.shape[1] * part.shape[1] >= len(found):
            return None
        found = tensor_product(found, part)
    return found if found.shape[1] < len(found) else None


class JointFeatures:
    """Random features of the joint kernel: rows ``[n, D]`` whose inner products are close to it, to about ``D ** -0.5``.

    ``fourier``: random Fourier features of the joint rows, each modality divided by its bandwidth, for kernels that are all
    Gaussian or all Laplacian; their product is one such kernel. ``projection``: the features of each modality (rows of norm
    1 for the cosine kernel, else random Fourier features) are projected, and the projections multiplied. By default Fourier
    features where the kernels allow, else the projection; one modality with the cosine kernel is exact.

    Args:
        widths: features per row of each modality.
        kernels: one for each, with a bandwidth.
        features: D.
        method: ``fourier``, ``projection``, or None.
        seed: of the features.

    Raises:
        ValueError: for an unknown method, or kernels for which there is none.
    """

    def __init__(
        self, widths: Sequence[int], kernels: Sequence[Kernel], features: int, method: str | None = None, seed: int = 0
    ):
        if method is not None and method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        kinds = {type(kernel) for kernel in kernels}
        stationary = len(kinds) == 1 and kinds <= {GaussianKernel, LaplacianKernel}
        if method == "fourier" and not stationary:
            raise ValueError(
                f"joint Fourier features need kernels that are all Gaussian or all Laplacian, got {list(kernels)}; "
                "use method='projection'"
            )
        self.bandwidths: list[float] | None = None
        if stationary and method != "projection":
            self.bandwidths = [kernel.bandwidth for kernel in kernels]  # type: ignore[attr-defined]
            unit = replace(kernels[0], bandwidth=1.0)  # type: ignore[type-var]
            self.maps: list[Any] = [RandomFourierFeatures(unit, sum(widths), features, seed=seed)]  # type: ignore[arg-type]
            return
        self.maps = [
            _own_map(d, kernel, features, seed + k) for k, (d, kernel) in enumerate(zip(widths, kernels, strict=True))
        ]
        self.product = RandomProductProjection(
            [features if isinstance(made, RandomFourierFeatures) else d for d, made in zip(widths, self.maps, strict=True)],
            features, seed,
        ) if len(widths) > 1 else None  # fmt: skip

    def __call__(self, *rows: Tensor) -> Tensor:
        """Rows ``[n, D]`` from those of each modality."""
        if self.bandwidths is not None:
            joint = torch.cat([x / b for x, b in zip(rows, self.bandwidths, strict=True)], 1)
            return self.maps[0](joint)
        parts = [made(x) for made, x in zip(self.maps, rows, strict=True)]
        return parts[0] if self.product is None else self.product(*parts)


def unit_rows(x: Tensor, name: str = "a modality") -> Tensor:
    """Rows ``[n, d]`` at norm 1.

    Raises:
        ValueError: for rows of zeros, which have no direction.
    """
    zeros = int((x == 0).all(-1).sum())
    if zeros:
        raise ValueError(
            f"{name} has {zeros} rows of zeros, which have no direction for a cosine kernel; leave those samples out"
        )
    return l2_normalize(x)


def _own_map(width: int, kernel: Kernel, features: int, seed: int) -> Any:
    if isinstance(kernel, CosineKernel):
        return unit_rows
    if isinstance(kernel, GaussianKernel | LaplacianKernel):
        return RandomFourierFeatures(kernel, width, features, seed=seed)
    raise ValueError(f"random features are for cosine, Gaussian and Laplacian kernels, got {kernel!r}; leave out features")


def random_rows(
    rows: Sequence[Tensor], kernels: Sequence[Kernel], features: int, method: str | None = None, seed: int = 0
) -> Tensor:
    """Rows of :class:`JointFeatures`; exact ones where these are no wider, and no method is given.

    Raises:
        ValueError: as :class:`JointFeatures`.
    """
    exact = exact_rows(rows, kernels) if method is None else None
    if exact is not None and exact.shape[1] <= features:
        return exact
    return JointFeatures([x.shape[1] for x in rows], kernels, features, method, seed)(*rows)


def joint_rows(
    rows: Sequence[Tensor], kernels: Sequence[Kernel], features: int | None, method: str | None = None, seed: int = 0
) -> Tensor:
    """Rows ``[n, D]`` whose inner products are the joint kernel, with D of at most n; or :func:`random_rows`.

    Raises:
        ValueError: as :class:`JointFeatures`.
    """
    if features is not None:
        return random_rows(rows, kernels, features, method, seed)
    exact = exact_rows(rows, kernels)
    if exact is not None:
        return exact
    l, v = torch.linalg.eigh(joint_gram(rows, kernels))
    keep = l > noise_level(l)
    return v[:, keep] * l[keep].sqrt()


class JointKernel:
    """The joint kernel matrix ``K`` ``[n, n]`` of some samples, by rows ``[n, D]`` with D below n where there are such.

    Args:
        rows: rows of each modality, as of :func:`as_modalities`.
        kernel: as for :func:`fit_kernels`.
        features: number of random features; exact if None.
        seed: of random features.

    Raises:
        ValueError: as :func:`fit_kernels` and :func:`random_rows`.
    """

    def __init__(self, rows: Mapping[str, Tensor], kernel: Kernels = None, features: int | None = None, seed: int = 0):
        self.modalities, self.kernels = dict(rows), fit_kernels(kernel, rows)
        self.features, self.seed = features, seed
        parts = list(rows.values())
        self.n = len(parts[0])
        if features is None:
            self.rows = exact_rows(parts, self.kernels)
        else:
            self.rows = random_rows(parts, self.kernels, features, seed=seed)

    @cached_property
    def matrix(self) -> Tensor:
        """``K`` itself."""
        if self.rows is not None:
            return self.rows @ self.rows.mT
        return joint_gram(list(self.modalities.values()), self.kernels)

    @cached_property
    def smaller(self) -> Tensor:
        """The smaller matrix with the non-zero eigenvalues of ``K / n``."""
        return self.matrix / self.n if self.rows is None else second_moment(self.rows)

    def strength(self, x: Tensor) -> Tensor:
        """``x' K x / n`` of each row of ``x`` ``[k, n]``."""
        if self.rows is not None:
            return (x @ self.rows).square().sum(1) / self.n
        return ((x @ self.matrix) * x).sum(1) / self.n

    @cached_property
    def spread(self) -> float:
        """Standard deviation of the kernel over pairs of different samples."""
        n, pairs = self.n, self.n * (self.n - 1)
        if self.rows is None:
            total, squares = float(self.matrix.sum()), float(self.matrix.square().sum())
            own = self.matrix.diagonal()
        else:
            total, squares = float(self.rows.sum(0).square().sum()), float(n**2 * self.smaller.square().sum())
            own = self.rows.square().sum(1)
        mean, square = (total - float(own.sum())) / pairs, (squares - float(own.square().sum())) / pairs
        variance = square - mean**2
        return math.sqrt(variance) if variance > ROUNDING else 0.0

    def alone(self) -> dict[str, "JointKernel"]:
        """The kernel of each modality."""
        return {
            name: JointKernel({name: x}, {name: kernel}, self.features, self.seed)
            for (name, x), kernel in zip(self.modalities.items(), self.kernels, strict=True)
        }


def joint_kernels(
    a: Modalities, b: Modalities, kernel_a: Kernels, kernel_b: Kernels, features: int | None, seed: int
) -> tuple[JointKernel, JointKernel]:
    """The kernels of two embeddings of the same samples.

    Raises:
        ValueError: for different numbers of samples, or modalities.
    """
    check_counts(features=features)
    first, second = as_modalities(a, "a"), as_modalities(b, "b")
    if first.keys() != second.keys():
        names = [sorted(x) if isinstance(x, Mapping) else "one tensor" for x in (a, b)]
        raise ValueError(f"a and b must have the same modalities, got {names[0]} and {names[1]}")
    n, m = (len(next(iter(x.values()))) for x in (first, second))
    if n != m:
        raise ValueError(f"a has {n} rows and b has {m}; both must embed the same samples, in the same order")
    if n < 2:
        raise ValueError("two embeddings are compared over at least two samples, got 1")
    return JointKernel(first, kernel_a, features, seed), JointKernel(second, kernel_b, features, seed)


def modalities_of(x: Tensor, first: JointKernel, second: JointKernel) -> tuple[dict[str, Tensor], list[str]]:
    """Strengths of rows ``x`` ``[k, n]`` by each modality's own kernels, and the one that shows each in ``first`` alone.

    Its name, or ``joint`` if no modality alone explains half of the strength; nothing for a single modality.
    """
    if len(first.modalities) == 1:
        return {}, []
    mine, others = first.alone(), second.alone()
    found = {name: torch.stack([mine[name].strength(x), others[name].strength(x)], 1) for name in mine}
    excess = torch.stack([s[:, 0] - s[:, 1] for s in found.values()])  # [modalities, k]
    enough, names = SHARED * first.strength(x), list(found)
    best = excess.max(0)
    return found, [names[i] if v >= e else "joint" for v, i, e in zip(best.values, best.indices, enough, strict=True)]


def largest_first(values: Tensor) -> Tensor:
    """Indices of values, the largest first; those that differ by rounding alone keep their order."""
    unit = TIES * values.abs().max().clamp_min(torch.finfo(values.dtype).tiny)
    return (values / unit).round().argsort(descending=True, stable=True)


def strongest(values: Tensor, largest: Tensor | None = None, at_most: int | None = None) -> list[int]:
    """Indices of the values that are at least half of ``largest``, by default of their own maximum, the largest first."""
    order = largest_first(values)[:at_most]
    return order[values[order] >= STRONG * (values.max() if largest is None else largest)].tolist()


def sides(x: Tensor) -> tuple[list[list[int]], list[list[int]]]:
    """Samples on the positive and on the negative side of each row of ``x`` ``[k, n]``, the strongest first.

    Those whose absolute entry is at least half of the largest one.
    """
    found: tuple[list[list[int]], list[list[int]]] = ([], [])
    for row in x:
        for sign, lists in zip((1, -1), found, strict=True):
            lists.append(strongest(sign * row, row.abs().max().clamp_min(ROUNDING)))
    return found


def upright(x: Tensor) -> Tensor:
    """Rows ``[k, n]`` with the sign for which the positive one of :func:`sides` is the larger one, and so not empty."""
    listed = x.abs() >= STRONG * x.abs().amax(1, keepdim=True)
    return x * larger_side(torch.where(listed, x, 0.0))


def simplest_turn(x: Tensor) -> Tensor:
    """The rotation ``[k, k]`` of rows ``[k, n]`` for which the sum of fourth powers is largest (quartimax).

    Groups of like strength are mixed in eigenvectors; after it each row is strong at few samples (Neuhaus, Wrigley 1954).
    """
    turn, best = torch.eye(len(x), dtype=x.dtype), -1.0
    for _ in range(TURNS):
        u, s, v = torch.linalg.svd((turn @ x).pow(3) @ x.mT)
        if float(s.sum()) <= best * (1 + 1e-10):
            break
        turn, best = u @ v, float(s.sum())
    return turn
