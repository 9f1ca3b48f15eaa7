import diffusers
import pytest

from kspec_guidance import SPARKE
from kspec_guidance.calibration import _crossing, calibrate, search_factor
from kspec_guidance.guidance.calibration import find_calibration
from kspec_guidance.synthesis import SynthesisError
from kspec_guidance.synthesis.run import _calibration

CALL = {"num_inference_steps": 6, "guidance_scale": 5.0}


@pytest.mark.slow
def test_calibration_makes_images_of_a_prompt_less_alike(pipe, tmp_path, monkeypatch):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path))
    ticks = []
    found = calibrate(pipe, ["heart, twemoji style", "rocket"], call=CALL, progress_callback=lambda *n: ticks.append(n))
    assert [done for done, _ in ticks] == list(range(1, len(ticks) + 1))
    assert all(total == 8 for _, total in ticks)
    assert 0.25 <= found.factor <= 4
    assert found.steps == 6
    assert 0.5 < found.alike_guided / found.alike < 0.9
    assert find_calibration(pipe, 6, 5.0) == found


@pytest.mark.parametrize("name", ["DDIMScheduler", "HeunDiscreteScheduler"])
def test_calls_like_the_calibrated_one_use_it(pipe, tmp_path, monkeypatch, name):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path))
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    own = type(pipe)(**{**pipe.components, "scheduler": scheduler})
    own.set_progress_bar_config(disable=True)
    call = {"num_inference_steps": 3, "guidance_scale": 5.0}
    found = calibrate(own, ["heart"], 2, call=call)
    guide = SPARKE()
    with guide.attach(own):
        own("heart", num_images_per_prompt=2, output_type="latent", **call)
    assert guide._run.calibration == found.factor
    assert _calibration(own, call) == found.factor  # as synthesize looks it up


def test_calibration_refuses_arguments_that_the_pipeline_would_ignore(pipe):
    with pytest.raises(SynthesisError, match="does not take num_steps"):
        calibrate(pipe, ["heart"], call={"num_steps": 4})


def test_calibration_states_what_it_needs(pipe):
    with pytest.raises(ValueError, match="at least two images of each, got 1 and 1"):
        calibrate(pipe, ["heart"], batch_size=1)
    with pytest.raises(ValueError, match="no known number of steps"):
        calibrate(pipe, ["heart"], call={"num_inference_steps": None})


def test_crossing_is_interpolated_between_the_last_two_factors():
    assert _crossing({1.0: -0.2, 2.0: -1.0}, -0.6) == pytest.approx(2**0.5)
    assert _crossing({1.0: -0.2, 2.0: -0.3, 4.0: -0.4}, -0.6) == 4.0
    assert _crossing({1.0: -0.6}, -0.6) == 1.0


@pytest.mark.parametrize(("strength", "expected"), [(3.0, 1 / 3), (0.4, 2.5), (0.01, 4.0), (50.0, 0.25)])
def test_search_stays_within_a_factor_of_four(strength, expected):
    factor, _, _ = search_factor(lambda f: 0.7 ** (strength * f))
    assert factor == pytest.approx(expected, rel=0.1)


def test_search_refuses_unrelated_samples():
    with pytest.raises(ValueError, match="unrelated already"):
        search_factor(lambda f: 1e-6)
