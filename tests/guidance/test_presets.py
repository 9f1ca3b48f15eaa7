import re

import numpy as np
import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, VendiGuidance
from kspec_guidance.objectives import ConditionalRKE, Vendi

CALL = {"num_inference_steps": 6, "guidance_scale": 5.0}


@pytest.mark.parametrize("name", list(SPARKE.PRESETS))
def test_preset_guides_and_round_trips_config(name, pipe, tmp_path):
    def generate(guide):
        with guide.attach(pipe):
            generators = [torch.Generator().manual_seed(k) for k in range(3)]
            return pipe("heart", num_images_per_prompt=3, generator=generators, output_type="latent", **CALL).images

    guide = SPARKE.preset(name)
    images = generate(guide)
    assert guide.report().steps_guided > 0
    assert not torch.allclose(images, generate(SPARKE(0.0)), atol=1e-2)
    guide.save_config(tmp_path)
    assert torch.equal(images, generate(KernelGuidance.from_config(tmp_path)))


def test_preset_accepts_scale_and_unknown_name_raises():
    assert SPARKE.preset("vivid", scale=0.25).terms[0].scale == 0.25
    assert isinstance(SPARKE.preset("vivid").terms[0].objective, Vendi)
    with pytest.raises(ValueError, match="choose one of default, safe, vivid, explore, faithful, few-step, published"):
        SPARKE.preset("loud")


def test_sparke_is_conditional_rke_and_vendi_guidance_takes_order():
    assert isinstance(SPARKE().terms[0].objective, ConditionalRKE)
    objective = VendiGuidance(order=0.5).terms[0].objective
    assert isinstance(objective, Vendi)
    assert objective.order == 0.5
    assert objective.conditional
    assert type(SPARKE.preset("vivid")) is VendiGuidance
    with pytest.raises(ValueError, match="order"):
        VendiGuidance(order=-1.0)
    with pytest.raises(TypeError, match=r"SPARKE\(\) has no argument 'order'; .*use VendiGuidance\(order=...\)"):
        SPARKE(order=0.5)


@pytest.mark.parametrize(
    ("make_guide", "message"),
    [
        (lambda: SPARKE(strength=1), "SPARKE() has no argument 'strength'; did you mean scale=?"),
        (lambda: SPARKE(chain=("bound",)), "did you mean transforms=?"),
        (lambda: SPARKE(prompt_kernels=None), "did you mean prompt_kernel=?"),
        (lambda: VendiGuidance(features=None), "VendiGuidance() has no argument 'features'; did you mean feature_map=?"),
        (lambda: MMDGuidance(torch.ones(2, 3), bandwidth=1.0), "kernel=GaussianKernel(bandwidth)"),
        (lambda: SPARKE(xyzzy=1), "its arguments are scale, kernel"),
    ],
)
def test_unknown_argument_suggests_correction(make_guide, message):
    with pytest.raises(TypeError, match=re.escape(message)):
        make_guide()


@pytest.mark.parametrize("make", [np.float32, np.float64, torch.tensor], ids=["float32", "float64", "tensor"])
def test_numbers_of_numpy_and_torch_are_numbers(make, tmp_path):
    settings = {"start": make(0.25), "stop": make(0.5), "sigma_interval": (make(0.0), make(8.0)), "ease_cfg": make(1.0)}
    guide = SPARKE(variety=make(25.0), every=np.int64(2), seed=np.int64(3), **settings)
    guide.save_config(tmp_path)
    same = SPARKE(variety=25.0, every=2, seed=3, start=0.25, stop=0.5, sigma_interval=(0.0, 8.0), ease_cfg=1.0)
    assert repr(SPARKE.from_config(tmp_path)) == repr(guide) == repr(same)
    assert repr(VendiGuidance(make(0.5), order=make(0.5))) == repr(VendiGuidance(0.5, order=0.5))


@pytest.mark.parametrize("value", [float("nan"), -1, "0.5", True, [0.5], torch.tensor([0.5]), {}, 1j], ids=str)
@pytest.mark.parametrize("name", ["scale", "variety", "start", "stop", "every", "sigma_interval", "ease_cfg", "transforms"])
def test_wrong_values_are_named_with_what_was_expected(name, value):
    with pytest.raises(ValueError, match=rf"{name}.*( got |; known are )"):
        SPARKE(**{name: value})


def test_other_wrong_values_are_named():
    with pytest.raises(ValueError, match=r"seed must be an integer, got 0\.5"):
        SPARKE(seed=0.5)
    with pytest.raises(TypeError, match="memory must be a memory such as MemoryBank"):
        SPARKE(memory="bank.safetensors")
    for order in (None, [0.5], True):
        with pytest.raises(ValueError, match=r"order must be a number in \(0, inf\] or 'logdet', got "):
            VendiGuidance(order=order)
    with pytest.raises(ValueError, match="unknown preset"):
        SPARKE.preset(["vivid"])
