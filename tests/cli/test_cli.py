import json

import pytest
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import MemoryBank
from kspec_guidance.cli import app
from kspec_guidance.plotting import image_grid

run = CliRunner().invoke


def call(*args):
    return run(app, [str(a) for a in args])


def test_help_names_the_commands():
    result = call("--help")
    assert result.exit_code == 0
    for word in ("demo", "generate", "tune", "evaluate", "compare"):
        assert word in result.output


def test_generate_then_evaluate(tmp_path):
    out, memory = tmp_path / "images", tmp_path / "m.safetensors"
    settings = ("--out", out, "--steps", 4, "--memory", memory, "--no-report")
    assert call("generate", "heart", "../../etc/passwd", "--images", 3, *settings).exit_code == 0
    rows = [json.loads(line) for line in (out / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == [f"0000/{p:06d}-{k:04d}.png" for p in range(2) for k in range(3)]
    assert {r["prompt"] for r in rows} == {"heart", "../../etc/passwd"}
    assert len(MemoryBank.load(memory)) == 6
    assert call("generate", "heart", "--images", 6, *settings, "--force").exit_code == 0
    assert len(list(out.rglob("*.png"))) == 9
    result = call("evaluate", out, "--json")
    found = json.loads(result.stdout)
    assert found["images"] == 9
    assert {p["prompt"]: p["images"] for p in found["prompts"]} == {"heart": 6, "../../etc/passwd": 3}
    scores = {s["score"]: s["value"] for s in found["scores"]}
    assert 1 <= scores["Conditional-Vendi"] <= scores["Vendi"] <= 9


def test_identical_images_score_one_and_broken_ones_are_skipped(tmp_path):
    for i in range(3):
        Image.new("RGB", (80, 50), "red").save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    result = call("evaluate", tmp_path, "--json")
    assert result.exit_code == 0
    scores = {s["score"]: s["value"] for s in json.loads(result.stdout)["scores"]}
    assert scores["Vendi"] == pytest.approx(1, abs=1e-4)
    assert scores["RKE, cosine"] == pytest.approx(1, abs=1e-4)
    assert "skipped 1 unreadable: bad.png" in result.stderr


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("evaluate", "nowhere"), "nowhere does not exist"),
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
    assert {p.name for p in tmp_path.iterdir()} == {"sparke.png", "mmd.png", "scores.png", "scores.json"}
    assert Image.open(tmp_path / "sparke.png").width > 500
    scores = json.loads((tmp_path / "scores.json").read_text())
    mean = lambda name: sum(v[name] for v in scores["vendi"].values())  # noqa: E731
    assert mean("SPARKE") > mean("plain")


def test_grids_have_the_size_they_should():
    tile = Image.new("RGB", (64, 64))
    assert image_grid([[tile] * 3, [tile]], gap=4).size == (3 * 68 - 4, 2 * 68 - 4)
    with pytest.raises(ValueError, match="at least one picture"):
        image_grid([])
