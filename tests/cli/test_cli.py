import json
import re

import pytest
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import MemoryBank, load_demo_pipeline
from kspec_guidance.cli import app
from kspec_guidance.evaluation.embedders import pipeline_embedder
from kspec_guidance.evaluation.image_sets import load_images
from kspec_guidance.evaluation.sets import evaluate_set
from kspec_guidance.plotting import image_grid

run = CliRunner().invoke


def call(*args):
    return run(app, [str(a) for a in args])


def test_help_lists_commands():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("demo", "generate", "tune", "evaluate", "compare"):
        assert re.search(rf"^\W*{command}  +\w", result.output, re.MULTILINE), command  # a row of the table of commands
        usage = call(command, "--help")
        assert usage.exit_code == 0
        assert f"kspec-guidance {command}" in usage.output or f" {command} [OPTIONS]" in usage.output


def test_generate_then_evaluate(tmp_path):
    output, memory = tmp_path / "images", tmp_path / "m.safetensors"
    settings = ("--out", output, "--steps", 4, "--memory-file", memory, "--no-report")
    assert call("generate", "heart", "../../etc/passwd", "--images", 3, *settings).exit_code == 0
    rows = [json.loads(line) for line in (output / "metadata.jsonl").read_text().splitlines()]
    assert [r["file_name"] for r in rows] == [f"0000/{p:06d}-{k:04d}.png" for p in range(2) for k in range(3)]
    assert {r["prompt"] for r in rows} == {"heart", "../../etc/passwd"}
    assert len(MemoryBank.load(memory)) == 6
    assert call("generate", "heart", "--images", 6, *settings, "--force").exit_code == 0
    assert len(list(output.rglob("*.png"))) == 9
    result = call("evaluate", output, "--json")
    record = json.loads(result.stdout)
    assert record["images"] == 9
    assert {p["prompt"]: p["images"] for p in record["prompts"]} == {"heart": 6, "../../etc/passwd": 3}
    embedder = pipeline_embedder(load_demo_pipeline())
    expected = evaluate_set(load_images(output, embedder), embedder)
    scores = {s["score"]: s["value"] for s in record["scores"]}
    for score in expected.scores:
        assert scores[score.score] == pytest.approx(score.value, rel=1e-4), score.score


def test_evaluate_identical_images_scores_one_and_skips_unreadable(tmp_path):
    for i in range(3):
        Image.new("RGB", (80, 50), "red").save(tmp_path / f"{i}.png")
    (tmp_path / "bad.png").write_bytes(b"not an image")
    result = call("evaluate", tmp_path, "--json")
    assert result.exit_code == 0
    scores = {s["score"]: s["value"] for s in json.loads(result.stdout)["scores"]}
    assert scores["Vendi"] == pytest.approx(1, abs=1e-4)
    assert scores["RKE, cosine"] == pytest.approx(1, abs=1e-4)
    assert "skipped 1 unreadable: bad.png" in result.stderr


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("evaluate", "nowhere"), "nowhere does not exist"),
        (("evaluate", "."), "contains no readable images"),
        (("generate", "heart", "--model", "./nothing"), "cannot load './nothing'"),
        (("generate", "heart", "--memory-file", "junk"), "not a valid safetensors file"),
        (("generate", "heart", "--scale", "-1"), "Invalid value"),
    ],
)
def test_errors_exit_with_code_two(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk")
    result = call(*args)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.slow
def test_demo_writes_images_and_scores(tmp_path):
    result = call("demo", "--out", tmp_path, "--images", 4, "--steps", 8)
    assert result.exit_code == 0
    assert {p.name for p in tmp_path.iterdir()} == {"sparke.png", "mmd.png", "scores.png", "scores.json"}
    assert Image.open(tmp_path / "sparke.png").width > 500
    scores = json.loads((tmp_path / "scores.json").read_text())
    mean = lambda name: sum(v[name] for v in scores["vendi"].values())  # noqa: E731
    assert mean("SPARKE") > mean("plain")


def test_image_grid_size():
    tile = Image.new("RGB", (64, 64))
    assert image_grid([[tile] * 3, [tile]], gap=4).size == (3 * 68 - 4, 2 * 68 - 4)
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([])
