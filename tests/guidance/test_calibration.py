import json
from dataclasses import replace

import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.guidance.calibration import (
    Calibration,
    calibration_file,
    call_settings,
    find_calibration,
    store_calibration,
)
from kspec_guidance.utils.hashing import fingerprint

CALL = {"num_inference_steps": 4, "guidance_scale": 5.0, "num_images_per_prompt": 2, "output_type": "latent"}


@pytest.fixture(autouse=True)
def _home(tmp_path, monkeypatch):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path / "home"))


@pytest.fixture
def calibration(pipe):
    return Calibration(fingerprint(pipe.unet), 4, 4, 5.0, 2.0, 0.5, 0.25, 12)


def run(pipe, guide, **changes):
    with guide.attach(pipe):
        return pipe("heart", generator=torch.Generator().manual_seed(0), **CALL | changes).images


def test_stored_calibration_is_used_for_calls_with_similar_settings(pipe, calibration):
    plain = run(pipe, SPARKE())
    store_calibration(calibration)
    guide, fixed = SPARKE(), SPARKE()
    fixed.calibration = 2.0
    calibrated = run(pipe, guide)
    assert torch.equal(calibrated, run(pipe, fixed))
    assert not torch.equal(calibrated, plain)
    assert torch.equal(run(pipe, SPARKE(1.0)), run(pipe, SPARKE(1.0)))  # a fixed scale is never changed


def test_other_settings_and_networks_are_not_used(pipe, calibration):
    store_calibration(calibration)
    assert find_calibration(pipe, 5, 5.5) == calibration
    assert find_calibration(pipe, 7, 5.0) is None
    assert find_calibration(pipe, 4, 2.0) is None
    assert find_calibration(pipe, 4, None) is None
    store_calibration(replace(calibration, network="UNet2DConditionModel-000000000000(+1+1+1+1+1+1)"))
    assert find_calibration(pipe, 4, 5.0) == calibration


def test_nearest_settings_win_and_new_values_replace_old_ones(pipe, calibration):
    for found in (calibration, replace(calibration, steps=5, timesteps=5, factor=3.0), replace(calibration, factor=4.0)):
        store_calibration(found)
    assert find_calibration(pipe, 4, 5.0).factor == 4.0
    assert find_calibration(pipe, 5, 5.0).factor == 3.0
    assert len(json.loads(calibration_file().read_text())) == 2


@pytest.mark.parametrize("text", ["{", "[1]", '[{"factor": 1}]', ""])
def test_damaged_file_is_named_and_not_used(pipe, calibration, text):
    store_calibration(calibration)
    calibration_file().write_text(text)
    with pytest.warns(UserWarning, match=r"calibration\.json are damaged"):
        assert find_calibration(pipe, 4, 5.0) is None


def test_factor_of_a_guide_is_used_instead_of_the_file(pipe, calibration):
    plain = run(pipe, SPARKE())
    store_calibration(calibration)
    guide = SPARKE()
    guide.calibration = 1.0
    assert torch.equal(run(pipe, guide), plain)


def test_call_settings_are_those_of_the_call_or_of_its_signature(pipe):
    assert call_settings(pipe, {"num_inference_steps": 7}) == (7, 7.5)
    assert call_settings(pipe, {"guidance_scale": 2}) == (50, 2.0)
    assert call_settings(pipe, {"num_inference_steps": 7, "timesteps": [9, 5, 1]}) == (3, 7.5)
    assert call_settings(pipe, {"sigmas": torch.ones(4)}) == (4, 7.5)
    assert call_settings(pipe, {"num_inference_steps": None, "guidance_scale": "x"}) == (None, None)


def test_requested_steps_and_timesteps_are_told_apart(pipe, calibration):
    twice = replace(calibration, steps=4, timesteps=7)
    store_calibration(twice)
    assert find_calibration(pipe, 7, 5.0) == find_calibration(pipe, 4, 5.0, requested=True) == twice
    assert find_calibration(pipe, 4, 5.0) is None
    assert find_calibration(pipe, 7, 5.0, requested=True) is None


def test_scale_is_not_compared_where_the_pipeline_does_not_tell_it(pipe, calibration):
    store_calibration(replace(calibration, guidance_scale=None))
    assert find_calibration(pipe, 4, None) is not None
    assert find_calibration(pipe, 4, 7.0) is not None
