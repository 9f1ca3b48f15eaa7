"""The benchmark of start noises: its choice is that of the package, and coupled noises are standard normal each."""

import pytest
import torch

from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import Case
from benchmarks.start_noises import COUPLINGS, chosen, normal, predictions
from kspec_guidance.guidance.start import greedy_choice
from kspec_guidance.objectives import RKE


@pytest.fixture(scope="module")
def bed():
    bed = Analytic(8, False)
    bed.steps = 4
    return bed


def test_chosen_noises_are_those_of_the_package(bed):
    case = Case(bed.prompts("report")[0], 3)
    start = bed.start(case, 6).flatten(1)[None]
    more = torch.randn(2, 6, 8, generator=normal(start[0], case))
    noises = torch.cat([start, more])
    rows = torch.stack([predictions(bed, [case], z[None], "4 steps")[0] for z in noises])
    expected = noises[greedy_choice(RKE(), rows), torch.arange(6)]
    assert torch.equal(chosen(bed, [case], start, 3, "4 steps")[0], expected)


@pytest.mark.parametrize("name", COUPLINGS)
def test_coupled_noises_are_standard_normal(name):
    g = torch.Generator().manual_seed(0)
    number = 600 if name == "determinantal" else 2000  # the former takes 10 ms
    found = torch.stack([COUPLINGS[name](torch.randn(8, 4, generator=g), Case("", k)) for k in range(number)])
    assert float(found.mean((0, 1)).abs().max()) < 0.05
    assert torch.allclose(torch.cov(found.flatten(0, 1).mT), torch.eye(4), atol=0.06)
    assert float(found[:, 0].std()) == pytest.approx(1, abs=0.04)
