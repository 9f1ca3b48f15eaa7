"""Input checks, and the matrices whose spectra the scores are functions of."""

from collections.abc import Callable

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, Kernel
from kspec_guidance.kernels.distances import as_float

__all__ = ["FeatureMap", "check_pair_of_sets", "check_paired", "check_samples", "gram", "map_rows", "smaller_matrix"]

FeatureMap = Callable[[Tensor], Tensor] | Tensor
"""A map of samples to rows ``[..., n, D]`` whose inner products are the kernel, or the rows themselves."""


def check_samples(x: Tensor, name: str = "x") -> Tensor:
    """``x`` in float32 or float64.

    Raises:
        TypeError: if it is not a tensor.
        ValueError: for fewer than two dimensions, no rows, or values that are not finite.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape [n, d], got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape [n, d], got {list(x.shape)}; flatten each sample to one row")
    if x.shape[-2] == 0:
        raise ValueError(f"{name} has no samples; a score needs at least one row")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} contains NaN or infinite values; remove those rows")
    return as_float(x)


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


def check_pair_of_sets(x: Tensor, y: Tensor, name: str = "reference") -> tuple[Tensor, Tensor]:
    """Two sets of samples in the same space, in float64.

    Raises:
        ValueError: as :func:`check_samples`, or if their widths differ.
    """
    x, y = check_samples(x), check_samples(y, name)
    if x.shape[-1] != y.shape[-1]:
        raise ValueError(
            f"x has {x.shape[-1]} features per row and {name} has {y.shape[-1]}; embed both with the same model"
        )
    return x.double(), y.double()


def map_rows(feature_map: FeatureMap, x: Tensor) -> Tensor:
    """Feature rows ``[..., n, D]`` in float64.

    Raises:
        ValueError: if the number of rows is not the number of samples.
    """
    phi = feature_map if isinstance(feature_map, Tensor) else feature_map(x)
    if phi.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"feature_map returned rows {list(phi.shape[:-1])} for samples {list(x.shape[:-1])}; return one row per sample"
        )
    return phi.double()


def gram(x: Tensor, kernel: Kernel | None) -> Tensor:
    """Kernel matrix ``[..., n, n]`` in float64 with unit diagonal: rounding in float32 would add spurious modes."""
    return (kernel or CosineKernel()).normalised(x.double())


def second_moment(phi: Tensor) -> Tensor:
    """The smaller matrix with the spectrum of ``phi phi' / n``."""
    n = phi.shape[-2]
    return (phi.mT @ phi if phi.shape[-1] < n else phi @ phi.mT) / n


def smaller_matrix(x: Tensor, kernel: Kernel | None, feature_map: FeatureMap | None) -> Tensor:
    """The smaller matrix with the spectrum of ``K / n``: the features' second moment, or the kernel matrix."""
    if feature_map is not None:
        return second_moment(map_rows(feature_map, x))
    if (kernel is None or isinstance(kernel, CosineKernel)) and x.shape[-1] < x.shape[-2]:
        return second_moment(CosineKernel.features(x.double()))
    return gram(x, kernel) / x.shape[-2]
