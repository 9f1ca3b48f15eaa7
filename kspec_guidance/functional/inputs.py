"""Input checks, and the matrices whose spectra the scores are functions of."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kspec_guidance.kernels import (
    CosineKernel,
    GaussianKernel,
    Kernel,
    LaplacianKernel,
    PolynomialKernel,
    RationalQuadraticKernel,
)
from kspec_guidance.kernels.base import FunctionKernel, KernelLike
from kspec_guidance.kernels.base import as_kernel as kernel_of
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.kernels.spectrum import accumulate_gram, mirror_upper, own_products

__all__ = [
    "FeatureMap",
    "KernelLike",
    "as_kernel",
    "check_matrix",
    "check_pair_of_sets",
    "check_paired",
    "check_samples",
    "check_widths",
    "gram",
    "joint_gram",
    "map_rows",
    "on_host",
    "smaller_matrix",
    "sum_over_pairs",
]

LARGEST = 1e150  # absolute value of features
PART_BYTES = 4 << 20  # of rows in float64 that are converted at once: more leave the cache, fewer make slow products
SEMIDEFINITE = (CosineKernel, GaussianKernel, LaplacianKernel, PolynomialKernel, RationalQuadraticKernel)
NOT_POSITIVE = 1e-3  # share of an eigenvalue, or excess of an entry, that rounding in float32 does not explain

FeatureMap = Callable[[Tensor], Tensor] | Tensor
"""A map of samples to rows ``[..., n, D]`` whose inner products are the kernel, or the rows themselves."""


class _FunctionKernel(FunctionKernel):
    """A kernel given as a function, for scores: on the host, and checked to be symmetric."""

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        k = super().__call__(x, y)
        if not torch.isfinite(k).all():
            raise ValueError("this function gives NaN or infinite values for these samples, so it is no kernel for them")
        if y is None and not torch.allclose(k, k.mT, rtol=1e-4, atol=1e-4 * float(k.detach().abs().amax())):
            raise ValueError("this function is no kernel, since k(x, y) differs from k(y, x)")
        return on_host(k)


def as_kernel(kernel: KernelLike | None) -> Kernel:
    """``kernel``, wrapped if it is a plain function; the cosine kernel if it is None.

    Raises:
        TypeError: if it is neither a kernel nor a function.
    """
    found = CosineKernel() if kernel is None else kernel_of(kernel)
    return _FunctionKernel(found.function) if isinstance(found, FunctionKernel) else found


def on_host(x: Tensor) -> Tensor:
    """``x`` in float64 in the host's memory: not every device has float64."""
    return x.cpu().double()


def _largest(x: Tensor) -> float:
    """The largest absolute value, in one pass without a copy; NaN if there is any."""
    least, most = x.detach().aminmax()
    return float(torch.maximum(-least, most))


def check_samples(x: Tensor, name: str = "x") -> Tensor:
    """``x`` in float32 or float64, on its device.

    Raises:
        TypeError: if it is not a dense tensor of real numbers.
        ValueError: for fewer than two dimensions, no rows or features, or values that are not finite or out of range.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape [n, d], got {type(x).__name__}")
    if x.is_complex() or x.layout != torch.strided:
        raise TypeError(f"{name} must be a dense tensor of real numbers, got {x.dtype} in layout {x.layout}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape [n, d], got {list(x.shape)}; flatten each sample to one row")
    if x.shape[-2] == 0:
        raise ValueError(f"{name} has no samples; a score needs at least one row")
    if x.shape[-1] == 0:
        raise ValueError(f"{name} has rows of length 0; a score needs at least one feature")
    x = as_float(x)
    largest = _largest(x)
    if not math.isfinite(largest):
        raise ValueError(f"{name} contains NaN or infinite values; remove those rows")
    if not (largest == 0 or 1 / LARGEST < largest < LARGEST):
        raise ValueError(f"{name} has values up to {largest:.3g}, whose squares leave the range of float64; rescale them")
    return x


def check_matrix(x: Tensor, name: str = "x") -> Tensor:
    """``x`` as by :func:`check_samples`, without batch dimensions.

    Raises:
        ValueError: as :func:`check_samples`, or for more than two dimensions.
    """
    x = check_samples(x, name)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape [n, d], got {list(x.shape)}; flatten each sample to one row")
    return x


def check_paired(x: Tensor, prompt_features: Tensor) -> tuple[Tensor, Tensor]:
    """Samples and their prompt features, one row each.

    Raises:
        ValueError: as :func:`check_samples`, or if their numbers differ.
    """
    x, prompt_features = check_samples(x), check_samples(prompt_features, "prompt_features")
    if x.shape[:-1] != prompt_features.shape[:-1]:
        raise ValueError(
            f"x has {list(x.shape[:-1])} samples and prompt_features has {list(prompt_features.shape[:-1])} rows; "
            "give one row of prompt features per sample"
        )
    return x, prompt_features


def check_widths(x: Tensor, y: Tensor, name: str) -> None:
    """Check that the rows of two sets have as many features.

    Raises:
        ValueError: if they have not.
    """
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features per row and {name} has {y.shape[-1]}; embed both with the same model"
        )


def check_pair_of_sets(x: Tensor, y: Tensor, name: str = "reference") -> tuple[Tensor, Tensor]:
    """Two sets of samples in the same space, in float64 if they are in the host's memory, else in float32 on their device.

    Raises:
        ValueError: as :func:`check_samples`, or if their widths differ.
    """
    x, y = check_samples(x), check_samples(y, name)
    if x.shape[:-2] != y.shape[:-2]:
        raise ValueError(f"x has shape {list(x.shape)} and {name} {list(y.shape)}; their batch dimensions must be the same")
    check_widths(x, y, name)
    return tuple(z.double() if z.device.type == "cpu" else z for z in (x, y))  # type: ignore[return-value]


def map_rows(feature_map: FeatureMap, x: Tensor) -> Tensor:
    """Feature rows ``[..., n, D]`` in float64, on the host. The map is called on the device of ``x``.

    Raises:
        TypeError: if the map returns no tensor.
        ValueError: if the number of rows is not the number of samples, or for values that are not finite.
    """
    phi = feature_map if isinstance(feature_map, Tensor) else feature_map(x)
    if not isinstance(phi, Tensor):
        raise TypeError(f"feature_map must return a torch.Tensor of one row per sample, got {type(phi).__name__}")
    if phi.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"feature_map returned rows {list(phi.shape[:-1])} for samples {list(x.shape[:-1])}; return one row per sample"
        )
    if phi.is_floating_point() and phi.numel() and not math.isfinite(_largest(phi)):
        raise ValueError("feature_map gives NaN or infinite values for these samples")
    return on_host(phi)


def unit_gram(kernel: Kernel, x: Tensor, y: Tensor | None = None) -> Tensor:
    """The kernel matrix ``[..., n, m]`` of a kernel scaled to ``k(x, x) = 1``.

    Raises:
        ValueError: if it is not finite: the kernel overflows, or its diagonal is not positive; or if entries exceed 1.
    """
    k = kernel.normalised(x, y)
    largest = _largest(k)
    if not math.isfinite(largest):
        raise ValueError(f"{kernel!r} gives NaN or infinite values, or a diagonal that is not positive, for these samples")
    if largest > 1 + NOT_POSITIVE:
        raise ValueError(
            f"{kernel!r} is no kernel, since |k(x, y)| is up to {largest:.3g} times sqrt(k(x, x) k(y, y)); a kernel is "
            "positive semi-definite"
        )
    return k


def joint_gram(rows: Sequence[Tensor], kernels: Sequence[Kernel]) -> Tensor:
    """The product of the kernel matrices of several modalities ``[..., n, n]``, with unit diagonal."""
    k = unit_gram(kernels[0], rows[0])
    for x, kernel in zip(rows[1:], kernels[1:], strict=True):
        k = k * unit_gram(kernel, x)
    return k


def gram(x: Tensor, kernel: KernelLike | None) -> Tensor:
    """Kernel matrix ``[..., n, n]`` in float64 with unit diagonal: rounding in float32 would add spurious modes."""
    return unit_gram(as_kernel(kernel), on_host(x))


def sum_over_pairs(block: Callable[[Tensor, Tensor | None], Tensor], x: Tensor, rows: int) -> Tensor:
    """A sum over all pairs of ``x`` ``[..., n, d]`` of a symmetric function, so that no matrix of all pairs is held.

    Args:
        block: the sum ``[...]``, in float64, over the pairs of two parts of ``x``; over those of one part, if the second is
            None.
        x: the rows.
        rows: of a part.
    """
    total, parts = torch.zeros(x.shape[:-2], dtype=torch.float64, device=x.device), x.split(rows, dim=-2)
    for i, a in enumerate(parts):
        total = total + block(a, None)
        for b in parts[i + 1 :]:
            total = total + 2 * block(a, b)
    return total


def second_moment(phi: Tensor) -> Tensor:
    """The smaller matrix with the spectrum of ``phi phi' / n``."""
    n = phi.shape[-2]
    return own_products(phi if phi.shape[-1] < n else phi.mT) / n


def cosine_moment(x: Tensor) -> Tensor:
    """The second moment of the features of the cosine kernel, of all rows of zeros as one further coordinate.

    Some rows at a time: copies of all rows, in float64 and scaled, would take longer than their products.
    """
    d = x.shape[-1]
    if x.ndim > 2 or (x.requires_grad and torch.is_grad_enabled()):
        return second_moment(CosineKernel.features(on_host(x)))
    total, zeros = torch.zeros(d, d, dtype=torch.float64), 0
    size = min(len(x), max(PART_BYTES // (8 * d), d))
    buffer = torch.empty(size, d, dtype=torch.float64)
    for part in x.detach().split(size):
        rows = buffer[: len(part)].copy_(part)
        norms = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        if not norms.all():
            zeros += int((rows == 0).all(1).sum())
            norms[norms == 0] = 1
        accumulate_gram(total, rows.div_(norms))
    mirror_upper(total)
    if zeros:
        total = torch.block_diag(total, total.new_tensor([[float(zeros)]]))
    return total.div_(x.shape[-2])


def smaller_matrix(x: Tensor, kernel: KernelLike | None, feature_map: FeatureMap | None) -> Tensor:
    """The smaller matrix with the spectrum of ``K / n``: the features' second moment, or the kernel matrix."""
    if feature_map is not None:
        return second_moment(map_rows(feature_map, x))
    if (kernel is None or isinstance(kernel, CosineKernel)) and x.shape[-1] < x.shape[-2]:
        return cosine_moment(x)
    k = gram(x, kernel)
    if k.requires_grad or not isinstance(kernel, SEMIDEFINITE):  # a function may return a matrix that is used elsewhere
        return k / x.shape[-2]
    return k.div_(x.shape[-2])
