"""Kernels as JSON: the class by name and its parameters."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from kspec_guidance.kernels.base import Kernel, ProductKernel
from kspec_guidance.kernels.dot_product import CosineKernel, ExpCosineKernel, PolynomialKernel
from kspec_guidance.kernels.stationary import GaussianKernel, LaplacianKernel, RationalQuadraticKernel

__all__ = ["KERNELS", "kernel_from_json", "kernel_to_json"]

KERNELS: dict[str, Any] = {
    kind.__name__: kind
    for kind in (
        GaussianKernel,
        CosineKernel,
        ExpCosineKernel,
        PolynomialKernel,
        RationalQuadraticKernel,
        LaplacianKernel,
        ProductKernel,
    )
}


def kernel_to_json(kernel: Kernel | None) -> dict[str, Any] | None:
    """A kernel of this package as JSON; None for None.

    Raises:
        TypeError: for any other kernel.

    >>> kernel_to_json(GaussianKernel(0.5))
    {'kernel': 'GaussianKernel', 'bandwidth': 0.5}
    """
    if kernel is None:
        return None
    if type(kernel) not in KERNELS.values():
        raise TypeError(f"{kernel!r} cannot be saved as settings; use a kernel of kspec_guidance.kernels")
    values = {f.name: getattr(kernel, f.name) for f in dataclasses.fields(kernel) if f.init}  # type: ignore[arg-type]
    named = {k: kernel_to_json(v) if isinstance(v, Kernel) else v for k, v in values.items()}
    return {"kernel": type(kernel).__name__, **named}


def kernel_from_json(value: Mapping[str, Any] | None) -> Kernel | None:
    """The kernel of :func:`kernel_to_json`.

    Raises:
        ValueError: for an unknown name.
    """
    if value is None:
        return None
    if value["kernel"] not in KERNELS:
        raise ValueError(f"unknown kernel {value['kernel']!r} in the settings; known are {', '.join(sorted(KERNELS))}")
    named = {k: kernel_from_json(v) if isinstance(v, Mapping) else v for k, v in value.items() if k != "kernel"}
    return KERNELS[value["kernel"]](**named)
