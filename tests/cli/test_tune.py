import json

import pytest
from PIL import Image

from kspec_guidance import KernelGuidance
from tests.cli.commands import call

FAST = ("--steps", 1, "--batch-size", 2, "--batches", 1)


@pytest.mark.slow
def test_tune_writes_plot_images_scores_and_guide(tmp_path):
    prompts = ["heart, twemoji style", "runner, woman, noto style", "cat face, noto style"]
    arguments = [*prompts, "--batch-size", 4, "--batches", 2, "--steps", 4, "--scale", 0.5, "--scale", 1.0,
                 "--max-fidelity-loss", 0.4, "--out", tmp_path / "t"]  # fmt: skip
    result = call("tune", *arguments)
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "t" / "tune.json").read_text())
    assert record["reason"] in " ".join(result.stdout.split())
    for name in ("tune.png", "images.png"):
        assert Image.open(tmp_path / "t" / name).width > 300
        assert f"wrote {tmp_path / 't' / name}" in result.stderr
    assert record["scale"] in (0.5, 1.0)
    assert KernelGuidance.from_config(tmp_path / "t" / "guide").terms[0].scale == record["scale"]


def test_picture_has_a_row_of_the_same_seeds_for_each_of_five_scales_and_json_tells_too_few_images(tmp_path):
    result = call("tune", "heart", *FAST, "--out", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "tune.json").read_text()) | {"files": record["files"]}
    assert record["embedder"]["name"] == "own (the pipeline's autoencoder)"
    assert record["verdict"] == "too few images to tell"
    assert record["detectable_gain"] is None  # infinite for one batch
    assert len(record["points"]) == 5
    picture = Image.open(tmp_path / "images.png")
    rows = [picture.crop((0, 84 + 68 * k, picture.width, 84 + 68 * k + 64)) for k in range(6)]
    assert picture.height == 84 + 6 * 68 - 4 + 40
    left = [row.crop((0, 0, 60, 64)).convert("L").getextrema()[0] for row in rows]
    assert max(left) < 100  # each row has a label
    assert rows[0].tobytes() != rows[5].tobytes()
    assert not (tmp_path / "guide").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "got neither"),
        (("heart", "--preset", "vivd"), "did you mean 'vivid'?"),
        (("--prompts", "no.txt"), "no.txt"),
        (("heart", "--option", "negative_promt=blurry"), "did you mean negative_prompt?"),
        (("heart", "--embedder", "own:x"), "choose one of own, auto"),
    ],
)
def test_invalid_arguments_are_one_line(arguments, message, tmp_path):
    result = call("tune", *arguments, "--out", tmp_path)
    assert result.exit_code == 2
    assert message in result.stderr.splitlines()[-1]


def test_after_an_interruption_tune_says_what_was_made(tmp_path, monkeypatch):
    from kspec_guidance import tuning

    made = []

    def interrupt(images):
        made.append(images)
        if len(made) == 3:
            raise KeyboardInterrupt
        return tuning.torch.ones(len(images), 3)

    monkeypatch.setattr("kspec_guidance.evaluation.embedders.pipeline_embedder", lambda pipe: interrupt)
    result = call("tune", "heart", *FAST, "--out", tmp_path / "t")
    assert result.exit_code == 130
    assert "stopped: 2 of 7 batches were made and nothing was written" in result.stderr
    assert not (tmp_path / "t").exists()
