import json

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance.cli import app
from kspec_guidance.plotting import image_grid

run = CliRunner().invoke


def call(*args):
    return run(app, [str(a) for a in args])


def test_help_names_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    for word in ("demo", "generate", "evaluate", "compare"):
        assert word in result.output


def test_generate_then_evaluate(tmp_path):
    out, memory = tmp_path / "images", tmp_path / "m.safetensors"
    settings = ("--out", out, "--images", 3, "--steps", 4, "--memory", memory)
    assert call("generate", "heart", "../../etc/passwd", *settings).exit_code == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == [f"{i:06d}.png" for i in range(6)]
    assert {r["prompt"] for r in rows} == {"heart", "../../etc/passwd"}
    assert call("generate", "heart", *settings).exit_code == 0
    assert len(list(out.glob("*.png"))) == 9
    result = call("evaluate", out, "--json")
    scores = json.loads(result.output)
    assert scores["all images"]["images"] == 9
    assert scores["heart"]["images"] == 6
    assert 1 <= scores["all images"]["conditional_vendi"] <= scores["all images"]["vendi"] <= 9
    assert "Conditional-Vendi" in call("evaluate", out).output


def test_identical_images_score_one_and_broken_ones_are_skipped(tmp_path):
    for i in range(3):
        Image.new("RGB", (80, 50), "red").save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = call("evaluate", tmp_path, "--json")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["all images"]["vendi"] == pytest.approx(1, abs=1e-4)
    assert "skipped 1 unreadable: bad.png" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("evaluate", "nowhere"), "nowhere is no folder"),
        (("evaluate", "."), "holds no readable image"),
        (("generate", "heart", "--model", "./nothing"), "cannot load './nothing'"),
        (("generate", "heart", "--memory", "junk"), "no whole safetensors file"),
        (("generate", "heart", "--scale", "-1"), "Invalid value"),
    ],
)
def test_errors_are_one_line_and_exit_with_two(args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk")
    result = call(*args)
    assert result.exit_code == 2
    assert words in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_demo_writes_pictures_and_scores(tmp_path):
    result = call("demo", "--out", tmp_path, "--images", 4, "--steps", 8)
    assert result.exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"sparke.png", "style.png", "scores.png", "scores.json"}
    assert Image.open(tmp_path / "sparke.png").width > 500
    scores = json.loads((tmp_path / "scores.json").read_text())
    mean = lambda name: sum(v[name] for v in scores["vendi"].values())  # noqa: E731
    assert mean("SPARKE") > mean("plain")


def test_grids_have_the_size_they_should():
    tile = Image.new("RGB", (64, 64))
    assert image_grid([[tile] * 3, [tile]], gap=4).size == (3 * 68 - 4, 2 * 68 - 4)
    with pytest.raises(ValueError, match="at least one picture"):
        image_grid([])


def test_open_clip_features_have_unit_norm(tmp_path):
    import open_clip
    from safetensors.torch import save_file

    from kspec_guidance.embedders import open_clip_embedder

    model = open_clip.create_model("ViT-S-32-alt")
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "clip.safetensors")
    x = open_clip_embedder("ViT-S-32-alt", str(tmp_path / "clip.safetensors"))([Image.new("RGBA", (30, 40), "red")] * 2)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(2))
    assert call("evaluate", tmp_path, "--clip", "ViT-S-32-alt:none").exit_code == 2
