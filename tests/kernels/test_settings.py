"""Kernels survive JSON."""

import json

import pytest

from kspec_guidance import kernels
from kspec_guidance.kernels import CosineKernel, GaussianKernel, PolynomialKernel
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.kernels.settings import KERNELS, kernel_from_json, kernel_to_json


def test_all_public_kernels_can_be_saved():
    assert set(KERNELS) == {name for name in kernels.__all__ if name.endswith("Kernel")} - {"Kernel"}


@pytest.mark.parametrize("kernel", [None, CosineKernel(), PolynomialKernel(2, 0.5), GaussianKernel() * CosineKernel()])
def test_kernels_survive_json(kernel):
    assert kernel_from_json(json.loads(json.dumps(kernel_to_json(kernel)))) == kernel


def test_other_kernels_are_refused():
    with pytest.raises(TypeError, match="cannot be saved as settings"):
        kernel_to_json(as_kernel(lambda x, y: x @ y.mT))
    with pytest.raises(ValueError, match="unknown kernel 'Spline'"):
        kernel_from_json({"kernel": "Spline"})
