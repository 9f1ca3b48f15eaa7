import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import KernelGuidance
from kspec_guidance import functional as F
from kspec_guidance.cli import app
from kspec_guidance.statistics import Comparison
from kspec_guidance.tuning import TuningPoint, choose, tune

CALL = {"num_inference_steps": 6, "guidance_scale": 5.0}


def test_precision_is_one_for_same_set_and_zero_for_distant_set(g):
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    assert F.precision_score(x, x, 3) == F.fidelity_scores(x, x, 3).precision == 1
    assert F.precision_score(x + 100, x, 3) == 0


def tuning_point(scale, diversity, fidelity, p):
    return TuningPoint(scale, diversity, fidelity, Comparison(2.0, diversity, p, (12, 12), "test"))


def test_choose_requires_fidelity_and_significance():
    points = [tuning_point(0.3, 2.5, 0.93, 0.01), tuning_point(0.6, 3.0, 0.9, 0.01), tuning_point(1.2, 4.0, 0.5, 0.01)]
    assert choose(points, 0.92, 0.05)[0] == 0.6
    scale, reason = choose([tuning_point(0.3, 2.1, 0.93, 0.4)], 0.92, 0.05)
    assert scale is None
    assert "guidance does not help" in reason
    scale, reason = choose([tuning_point(0.3, 4.0, 0.2, 0.001)], 0.92, 0.05)
    assert scale is None
    assert "loses more than 0.05 of fidelity" in reason


@pytest.mark.slow
def test_tune_increases_diversity_of_embedded_pipeline(pipe):
    calls = []
    result = tune(pipe, ["heart", "runner", "cat face"], scales=(0.6, 1.0), batch_size=4, batches=2, call=CALL,
                 max_fidelity_loss=0.2, progress_callback=lambda done, total: calls.append((done, total)))  # fmt: skip
    assert [p.scale for p in result.points] == [0.6, 1.0]
    assert all(p.diversity > 1.05 * result.plain_diversity for p in result.points)
    assert result.scale == 1.0
    assert 0 <= result.plain_fidelity <= 1
    assert calls[-1] == (24, 24)
    assert set(result.images[0]) == {"heart", "runner", "cat face"}
    json.dumps(result.as_dict())


def test_tune_invalid_settings_raise(pipe):
    with pytest.raises(ValueError, match="needs prompts"):
        tune(pipe, [])
    with pytest.raises(ValueError, match="scales above 0"):
        tune(pipe, ["heart"], scales=(0.0,))
    with pytest.raises(ValueError, match="batch_size >= 2"):
        tune(pipe, ["heart"], batch_size=1)


@pytest.mark.slow
def test_tune_command_writes_plot_images_scores_and_guide(tmp_path):
    arguments = ["tune", "heart", "runner", "cat face", "--batch-size", 4, "--batches", 2, "--steps", 6, "--scale", 0.5,
             "--scale", 1.0, "--max-fidelity-loss", 0.4, "--out", tmp_path / "t"]  # fmt: skip
    result = CliRunner().invoke(app, [str(w) for w in arguments])
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert record["reason"] in " ".join(result.output.split())
    for name in ("tune.png", "images.png"):
        assert Image.open(tmp_path / "t" / name).width > 300
    assert record["scale"] in (0.5, 1.0)
    assert KernelGuidance.from_config(tmp_path / "t" / "guide").terms[0].scale == record["scale"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "give prompts either"), (("heart", "--preset", "loud"), "unknown preset"), (("--prompts", "no.txt"), "no.txt")],
)
def test_tune_command_reports_invalid_arguments(arguments, message, tmp_path):
    result = CliRunner().invoke(app, ["tune", *arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output
