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


def test_precision_of_the_same_set_is_one_and_of_a_far_one_zero(g):
    x = torch.randn(40, 3, generator=g, dtype=torch.float64)
    assert F.precision(x, x, 3) == F.fidelity(x, x, 3).precision == 1
    assert F.precision(x + 100, x, 3) == 0


def point(scale, diversity, fidelity, p):
    return TuningPoint(scale, diversity, fidelity, Comparison(2.0, diversity, p, (12, 12), "test"))


def test_the_choice_keeps_fidelity_and_asks_for_a_real_difference():
    points = [point(0.3, 2.5, 0.93, 0.01), point(0.6, 3.0, 0.9, 0.01), point(1.2, 4.0, 0.5, 0.01)]
    assert choose(points, 0.92, 0.05)[0] == 0.6
    scale, reason = choose([point(0.3, 2.1, 0.93, 0.4)], 0.92, 0.05)
    assert scale is None
    assert "guidance does not help" in reason
    scale, reason = choose([point(0.3, 4.0, 0.2, 0.001)], 0.92, 0.05)
    assert scale is None
    assert "loses more than 0.05 of fidelity" in reason


def test_tuning_the_embedded_pipeline_finds_more_variety(pipe):
    ticks = []
    found = tune(pipe, ["heart", "runner", "cat face"], scales=(0.6, 1.0), images=4, batches=2, call=CALL, loss=0.2,
                 tick=lambda done, total: ticks.append((done, total)))  # fmt: skip
    assert [p.scale for p in found.points] == [0.6, 1.0]
    assert all(p.diversity > found.plain_diversity for p in found.points)
    assert 0 <= found.plain_fidelity <= 1
    assert ticks[-1] == (24, 24)
    assert set(found.images[0]) == {"heart", "runner", "cat face"}
    json.dumps(found.as_dict())


def test_tuning_refuses_what_cannot_be_tuned(pipe):
    with pytest.raises(ValueError, match="needs prompts"):
        tune(pipe, [])
    with pytest.raises(ValueError, match="scales above 0"):
        tune(pipe, ["heart"], scales=(0.0,))
    with pytest.raises(ValueError, match="images >= 2"):
        tune(pipe, ["heart"], images=1)


def test_the_command_writes_plot_pictures_numbers_and_the_guide(tmp_path):
    words = ["tune", "heart", "runner", "cat face", "--images", 4, "--batches", 2, "--steps", 6, "--scale", 0.5, "--scale",
             1.0, "--loss", 0.4, "--out", tmp_path / "t"]  # fmt: skip
    result = CliRunner().invoke(app, [str(w) for w in words])
    assert result.exit_code == 0, result.output
    said = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert said["reason"].split()[0] in result.output
    for name in ("tune.png", "pictures.png"):
        assert Image.open(tmp_path / "t" / name).width > 300
    if said["scale"] is not None:
        assert KernelGuidance.from_config(tmp_path / "t" / "guide").terms[0].scale == said["scale"]


@pytest.mark.parametrize(
    ("words", "message"),
    [((), "give prompts either"), (("heart", "--preset", "loud"), "unknown preset"), (("--prompts", "no.txt"), "no.txt")],
)
def test_the_command_says_what_is_wrong(words, message, tmp_path):
    result = CliRunner().invoke(app, ["tune", *words, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output
