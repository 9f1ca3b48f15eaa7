import pytest
import torch

from kspec_guidance import SPARKE, KernelGuidance
from kspec_guidance.guidance.presets import PRESETS
from kspec_guidance.objectives import ConditionalRKE, Vendi

CALL = {"num_inference_steps": 6, "guidance_scale": 5.0}


@pytest.mark.parametrize("name", list(PRESETS))
def test_every_preset_moves_images_and_is_saved_and_loaded(name, pipe, tmp_path):
    def run(guide):
        with guide.attach(pipe):
            generators = [torch.Generator().manual_seed(k) for k in range(3)]
            return pipe("heart", num_images_per_prompt=3, generator=generators, output_type="latent", **CALL).images

    guide = KernelGuidance.preset(name)
    made = run(guide)
    assert guide.report().steps_guided > 0
    guide.save_config(tmp_path)
    assert torch.equal(made, run(KernelGuidance.from_config(tmp_path)))


def test_presets_take_other_settings_and_name_themselves_when_unknown():
    assert KernelGuidance.preset("vivid", scale=0.25).terms[0].scale == 0.25
    assert isinstance(KernelGuidance.preset("vivid").terms[0].objective, Vendi)
    with pytest.raises(ValueError, match="choose one of default, safe, vivid, few-step, published"):
        KernelGuidance.preset("loud")


def test_order_two_is_conditional_rke_and_others_are_entropies():
    assert isinstance(SPARKE().terms[0].objective, ConditionalRKE)
    objective = SPARKE(order=0.5).terms[0].objective
    assert isinstance(objective, Vendi)
    assert objective.order == 0.5
    assert objective.conditional
    with pytest.raises(ValueError, match="order"):
        SPARKE(order=-1.0)
    with pytest.raises(ValueError, match="order 2"):
        SPARKE(order=1.0, features=object())
