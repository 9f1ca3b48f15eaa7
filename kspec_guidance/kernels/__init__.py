"""Kernels on vectors, distances and bandwidths, and the spectra of kernel matrices. Needs torch, and scipy on the host.

from kspec_guidance.kernels import GaussianKernel, median_bandwidth
"""

from kspec_guidance.kernels.base import Kernel, ProductKernel
from kspec_guidance.kernels.distances import (
    IMAGE_BANDWIDTH,
    PROMPT_BANDWIDTH,
    SAME_DISTANCE,
    l2_normalize,
    median_bandwidth,
    pairwise_distances,
)
from kspec_guidance.kernels.dot_product import CosineKernel, ExpCosineKernel, PolynomialKernel
from kspec_guidance.kernels.stationary import GaussianKernel, LaplacianKernel, RationalQuadraticKernel

__all__ = [
    "GaussianKernel",
    "CosineKernel",
    "ExpCosineKernel",
    "PolynomialKernel",
    "RationalQuadraticKernel",
    "LaplacianKernel",
    "ProductKernel",
    "Kernel",
    "median_bandwidth",
    "pairwise_distances",
    "l2_normalize",
    "IMAGE_BANDWIDTH",
    "PROMPT_BANDWIDTH",
    "SAME_DISTANCE",
]
