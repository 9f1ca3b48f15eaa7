import json

import pytest
import torch
from safetensors.torch import save_file

from kspec_guidance.bench import models
from kspec_guidance.bench.models import RECIPES, choose_offload, find_recipe

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def free(monkeypatch):
    """Sets the gigabytes that devices have free."""
    return lambda gigabytes: monkeypatch.setattr(models, "_free", lambda device: int(gigabytes * 1e9))


def test_recipes_are_found_by_short_name_and_by_id():
    assert find_recipe("sdxl") == find_recipe("stabilityai/stable-diffusion-xl-base-1.0") == (RECIPES["sdxl"], True)


def test_a_folder_takes_the_settings_of_its_class_and_the_size_of_its_own_weights(tmp_path):
    (tmp_path / "unet").mkdir()
    save_file({"w": torch.zeros(1000, 500, dtype=torch.float16)}, tmp_path / "unet" / "x.safetensors")
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionXLPipeline"}))
    recipe, own = find_recipe(str(tmp_path))
    assert not own
    assert (recipe.model, recipe.call) == (
        str(tmp_path),
        {"num_inference_steps": 50, "guidance_scale": 5.0},
    )  # its own size
    assert recipe.billions == {"unet": 0.0005}
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "NewPipeline"}))
    recipe, _ = find_recipe(str(tmp_path))
    assert (recipe.pipeline, recipe.has, recipe.one_call) == ("NewPipeline", frozenset(), False)


@pytest.mark.parametrize("model", ["sdxll", "nobody/nothing"])
def test_unknown_models_are_told(model):
    with pytest.raises(ValueError, match=f"model '{model}' is unknown"):
        find_recipe(model)


def test_a_folder_without_a_pipeline_is_told(tmp_path):
    with pytest.raises(ValueError, match="is unknown: no folder of a diffusers pipeline"):
        find_recipe(str(tmp_path))


def test_weights_stay_on_the_gpu_where_they_fit_and_come_by_parts_where_not(free):
    recipe = RECIPES["sd-3.5-large"]
    free(80)
    assert choose_offload(recipe, GPU, 4) == "none"
    free(26)
    assert choose_offload(recipe, GPU, 4) == "model"
    assert choose_offload(recipe, GPU, 1, "sequential") == "sequential"


def test_too_little_memory_is_told_before_anything_is_loaded(free):
    free(12)
    with pytest.raises(ValueError, match=r"needs about .* GB or about .* GB with --offload model .* cuda:0 has 12 GB free"):
        choose_offload(RECIPES["flux-dev"], GPU, 4)
    with pytest.raises(ValueError, match=r"cpu has 12 GB free; give a smaller model$"):
        choose_offload(RECIPES["flux-dev"], CPU, 1)
    with pytest.raises(ValueError, match="keeps weights off a GPU"):
        choose_offload(RECIPES["demo"], CPU, 1, "model")


def test_the_memory_of_a_batch_is_that_of_the_weights_and_the_images():
    recipe = RECIPES["sdxl"]
    weights = 2 * sum(recipe.billions.values())
    assert recipe.bytes_needed(4) == pytest.approx(1e9 * (weights + 4 * recipe.working))
    assert recipe.bytes_needed(1, "model") == pytest.approx(1e9 * (2 * 2.567 + recipe.working))
