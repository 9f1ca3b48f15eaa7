"""Guide classes register themselves, so that saved settings load as the class that saved them."""

import inspect

import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.objectives import RKE

REFERENCE = torch.randn(5, 3, 2, 2, generator=torch.Generator().manual_seed(0))


def registered():
    return [c for c in KernelGuidance._registry.values() if c.__module__.startswith("kspec_guidance.")]


@pytest.mark.parametrize("guide_class", registered(), ids=lambda c: c.__name__)
def test_registered_guide_loads_from_saved_settings(guide_class, tmp_path):
    needs_reference = "reference" in inspect.signature(guide_class).parameters
    guide = guide_class(REFERENCE, 0.3) if needs_reference else guide_class(0.3)
    guide.save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert type(loaded) is guide_class
    assert repr(loaded) == repr(guide)


def test_user_subclass_loads_from_saved_settings(tmp_path):
    class WideGuidance(KernelGuidance):
        def __init__(self, width: float):
            super().__init__(RKE(GaussianKernel(width)), 0.25, start=0.1)

    WideGuidance(2.5).save_config(tmp_path)
    loaded = KernelGuidance.from_config(tmp_path)
    assert type(loaded) is WideGuidance
    assert (loaded.terms[0].scale, loaded.terms[0].start) == (0.25, 0.1)
    assert loaded.terms[0].objective.kernel == GaussianKernel(2.5)


def test_unknown_guide_class_raises_with_known_names(tmp_path):
    config, _ = SPARKE().to_config()
    with pytest.raises(ValueError, match=r"'NotImported'.*SPARKE.*import the module"):
        KernelGuidance.from_config({**config, "guide": "NotImported"})
