"""The mixtures in one batch are the package's own samples."""

from dataclasses import replace

import pytest
import torch

from benchmarks.arena.batched import Setting, run
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import CALL_SEEDS
from benchmarks.easing import GUARDED
from kspec_guidance import SPARKE, KernelGuidance, VendiGuidance
from kspec_guidance.bench.methods.diverseflow import DiverseFlow
from kspec_guidance.bench.methods.oscar import OSCAR
from kspec_guidance.guidance.term import DEFAULT_TRANSFORMS
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.objectives import Vendi


@pytest.mark.parametrize(
    "setting",
    [
        Setting(),
        Setting(50),
        Setting(50, ease=1.0),
        Setting(50, ease=1.0, guard=True),
        Setting(scale=1.0, order=0.5),
        Setting(50, ease=1.0, share=0.5),
        Setting(scale=1.5, order=0.5, share=0.5),
    ],
)
def test_batched_mixture_is_the_package_on_each_case(setting: Setting) -> None:
    bed = Analytic(8, skewed=False)
    case = bed.cases("report", 1)[0]
    transforms = GUARDED if setting.guard else DEFAULT_TRANSFORMS
    with torch.no_grad():
        found = run(bed, [case], setting)[0]
        if setting == Setting():
            wanted = bed.run(case, bed.images)
        else:
            guide = (
                VendiGuidance(setting.scale, order=setting.order, cfg_share=setting.share)
                if setting.scale
                else SPARKE(variety=setting.variety, ease_cfg=setting.ease, cfg_share=setting.share, transforms=transforms)
            )
            guide.calibration = 1.0
            with guide.attach(bed.pipe):
                wanted = bed.run(case, bed.images)
    torch.testing.assert_close(found, wanted.flatten(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("recall", ["nearest", "all"])
@pytest.mark.parametrize(
    "setting",
    [
        Setting(50),
        Setting(50, images=1, calls=4),
        Setting(scale=1.0, order=0.5),
        Setting(scale=1.0, log_det=True, exponential=True),
    ],
)
def test_batched_mixture_is_the_package_over_several_calls(setting: Setting, recall: str) -> None:
    bed = Analytic(8, skewed=False)
    case, setting = bed.cases("report", 1)[0], replace(setting, recall=recall, calls=max(2, setting.calls))
    order = "logdet" if setting.log_det else setting.order
    guide = VendiGuidance(1.0, order=order, recall=recall) if setting.scale else SPARKE(variety=50, recall=recall)
    guide.calibration = 1.0
    with torch.no_grad(), guide.attach(bed.pipe):
        wanted = [
            bed.run(replace(case, seed=case.seed + CALL_SEEDS * k), setting.images or bed.images)
            for k in range(setting.calls)
        ]
    with torch.no_grad():
        found = run(bed, [case], setting)[0]
    torch.testing.assert_close(found, torch.cat(wanted).flatten(1), atol=1e-3, rtol=1e-3)


def test_batched_mixture_has_the_push_of_oscar() -> None:
    bed = Analytic(8, skewed=False)
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        found = run(bed, [case], Setting(scale=0.4, log_det=True, early=True))[0]
        wanted = bed.sample(OSCAR(weight=0.4, noise_weight=0.0), case)
    torch.testing.assert_close(found, wanted.flatten(1), atol=1e-3, rtol=1e-3)


def test_batched_mixture_has_the_push_of_the_log_determinant() -> None:
    bed = Analytic(8, skewed=False)
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        found = run(bed, [case], Setting(scale=0.4, log_det=True, exponential=True))[0]
        with VendiGuidance(0.4, order="logdet").attach(bed.pipe):
            wanted = bed.run(case, bed.images)
    torch.testing.assert_close(found, wanted.flatten(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("unit", [True, False])
def test_batched_mixture_without_projections_is_the_package(unit: bool) -> None:
    bed = Analytic(8, skewed=False)
    case, setting = bed.cases("report", 1)[0], Setting(scale=1.0, order=0.5, off_score=False, unit=unit)
    transforms = ("tangent", "bound", "fade") if unit else ("bound", "fade")
    guide = KernelGuidance(Vendi(GaussianKernel(), 0.5, normalize=unit), 1.0, stop=setting.stop, transforms=transforms)
    with torch.no_grad(), guide.attach(bed.pipe):
        wanted = bed.run(case, bed.images)
    with torch.no_grad():
        found = run(bed, [case], setting)[0]
    torch.testing.assert_close(found, wanted.flatten(1), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("setting", "method"),
    [
        (Setting(scale=0.5, log_det=True, early=True, c=20.0), OSCAR(weight=0.5, noise_weight=0.0, c=20.0)),
        (Setting(scale=0.5, dpp=0.9), DiverseFlow(weight=0.5, h=0.9)),
    ],
)
def test_batched_rivals_are_the_methods_on_each_case(setting, method):
    bed = Analytic(8, skewed=False)
    case = bed.cases("report", 1)[0]
    with torch.no_grad():
        found = run(bed, [case], setting)[0]
        with method.attach(bed.pipe):
            wanted = bed.run(case, bed.images).flatten(1)
    torch.testing.assert_close(found, wanted, atol=1e-3, rtol=1e-3)
