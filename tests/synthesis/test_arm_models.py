"""Arms with other models and LoRAs: their images, changes of the model, and the pipeline afterwards."""

from itertools import groupby

import pytest
import torch
from safetensors.torch import save_file

from kspec_guidance import SPARKE
from kspec_guidance.loop.components import denoiser_of
from kspec_guidance.selection import OneArm
from kspec_guidance.synthesis import Arm, SynthesisError
from kspec_guidance.synthesis.arm_models import ArmModels
from kspec_guidance.synthesis.store import Store
from kspec_guidance.utils.hashing import fingerprint
from tests.synthesis.small_runs import contents, make, quiet_pipeline, rows_of


def changed(part, size=0.05):
    """The embedded pipeline with other weights in one of its networks."""
    pipe = quiet_pipeline()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in getattr(pipe, part).parameters():
            p += size * p.abs().mean() * torch.randn(p.shape, generator=generator)
    return pipe


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "other"
    changed("unet").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def lora(tmp_path_factory):
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    pipe, folder = quiet_pipeline(), tmp_path_factory.mktemp("models") / "lora"
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"]))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, p in pipe.unet.named_parameters():
            if "lora" in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    state = convert_state_dict_to_diffusers(get_peft_model_state_dict(pipe.unet))
    type(pipe).save_lora_weights(folder, unet_lora_layers=state)
    return str(folder)


def images(out):
    return [(out / row["file_name"]).read_bytes() for row in rows_of(out)]


@pytest.mark.slow
def test_images_of_a_model_and_of_a_lora_are_those_of_a_pipeline_that_has_them(other, lora, tmp_path):
    arms = [Arm("own"), Arm("other", model=other), Arm("lora", lora=lora), Arm("both", model=other, lora=lora)]
    with_lora, both = quiet_pipeline(), changed("unet")
    for pipe in (with_lora, both):
        pipe.load_lora_weights(lora)
    pipe = quiet_pipeline()
    denoiser, before = denoiser_of(pipe), fingerprint(denoiser_of(pipe))
    found = []
    for k, expected in enumerate([quiet_pipeline(), changed("unet"), with_lora, both]):
        settings = {"prompts": ["heart"], "images_per_prompt": 2, "batch_size": 2, "guide": SPARKE(0), "marks": False}
        make(tmp_path / f"arm{k}", pipe, arms=arms, select=OneArm(4, k), **settings)
        make(tmp_path / f"plain{k}", expected, **settings)
        assert images(tmp_path / f"arm{k}") == images(tmp_path / f"plain{k}")
        assert denoiser_of(pipe) is denoiser
        assert fingerprint(denoiser) == before
        found.append(images(tmp_path / f"arm{k}")[0])
    assert len(set(found)) == 4


def test_models_change_seldom_and_a_change_is_a_part_of_the_cost(other, tmp_path, monkeypatch):
    changes = []
    place = ArmModels._place
    monkeypatch.setattr(ArmModels, "_place", lambda self, model: (changes.append(model), place(self, model)))
    arms, call = [Arm("own"), Arm("other", model=other)], {"num_inference_steps": 1}
    make(tmp_path, quiet_pipeline(), ["heart"], 16, 1, arms=arms, select="uniform", call=call)
    arms = [record.arm["arm"] for record in Store(tmp_path).process_records(0)]
    assert len(arms) == 16
    assert len(list(groupby(arms))) <= 4  # of two blocks of eight, each sorted from the last model on
    assert set(arms) == {"own", "other"}
    assert len(changes) >= 16


@pytest.mark.slow
def test_a_run_with_models_that_is_stopped_chooses_as_one_that_is_not(other, tmp_path):
    class Stop(Exception):
        pass

    def stop(progress):
        raise Stop

    arms = [Arm("own", cost=1.0), Arm("other", model=other, cost=1.0)]
    settings = {"prompts": ["heart"], "images_per_prompt": 12, "batch_size": 1, "arms": arms}
    make(tmp_path / "whole", **settings)
    for _ in range(3):
        with pytest.raises(Stop):
            make(tmp_path / "stopped", progress_callback=stop, **settings)
    make(tmp_path / "stopped", **settings)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "whole")


def test_models_that_cannot_be_compared_or_loaded_are_refused(other, tmp_path):
    changed("vae", 1.0).save_pretrained(tmp_path / "vae")
    pipe = quiet_pipeline()
    for arm, message in [
        (Arm("a", model=str(tmp_path / "vae")), "the vae of"),
        (Arm("a", model=str(tmp_path / "none")), "cannot load"),
        (Arm("a", lora=str(tmp_path / "none")), "cannot load"),
    ]:
        with pytest.raises(SynthesisError, match=message):
            make(tmp_path / "set", pipe, arms=[Arm("own"), arm])
    assert not (tmp_path / "set").exists()


def test_a_lora_without_weights_for_the_pipeline_is_refused(tmp_path):
    save_file(
        {"unet.other.lora_A.weight": torch.ones(2, 4), "unet.other.lora_B.weight": torch.ones(4, 2)},
        tmp_path / "lora.safetensors",
    )
    pipe = quiet_pipeline()
    before = fingerprint(pipe.unet)
    with pytest.raises(SynthesisError, match="cannot load"):
        make(tmp_path / "set", pipe, arms=[Arm("own"), Arm("a", lora=str(tmp_path / "lora.safetensors"))])
    assert fingerprint(pipe.unet) == before
    assert rows_of(tmp_path / "set") == []


def test_other_weights_of_a_model_are_other_settings(other, lora):
    arms = [Arm("own"), Arm("other", model=other), Arm("lora", lora=lora)]
    models = ArmModels(arms, quiet_pipeline())
    own, of_model, of_lora = (models.describe(arm) for arm in arms)
    assert own == {}
    assert of_model == {"denoiser": fingerprint(changed("unet").unet)}
    assert len(of_lora["lora_digest"]) == 12
