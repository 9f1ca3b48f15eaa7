"""Samples of two or three numbers: a guide that leaves out two directions says that hardly any is left."""

import warnings

import pytest
import torch

from benchmarks.arena.beds.analytic import Analytic
from kspec_guidance import SPARKE, KernelGuidance
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.objectives import Vendi


def run(dim: int, guide: KernelGuidance) -> None:
    bed = Analytic(dim)
    with torch.no_grad(), guide.attach(bed.pipe):
        bed.run(bed.cases("report", 1)[0], 4)


def test_a_guide_of_two_numbers_says_that_no_direction_is_left() -> None:
    with pytest.warns(UserWarning, match=r"samples of 2 numbers.*normalize=False.*transforms="):
        run(2, SPARKE(1.0))


@pytest.mark.parametrize(
    ("dim", "guide"),
    [
        (2, SPARKE(0.0)),
        (2, KernelGuidance(Vendi(GaussianKernel(), 0.5, normalize=False), 1.0, transforms=("bound", "fade"))),
        (8, SPARKE(1.0)),
    ],
)
def test_others_are_quiet(dim: int, guide: KernelGuidance) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(dim, guide)
