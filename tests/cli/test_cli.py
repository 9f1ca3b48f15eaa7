import json
import re
import subprocess
import sys

import diffusers  # noqa: F401 - before tests: its log keeps the standard error of its first import
import pytest
import typer
from PIL import Image

import kspec_guidance
from kspec_guidance import MemoryBank
from kspec_guidance.cli import app
from kspec_guidance.evaluation.embedders import image_embedder
from kspec_guidance.evaluation.image_sets import load_images
from kspec_guidance.evaluation.sets import evaluate_set
from kspec_guidance.plotting import image_grid
from tests.cli.commands import call


def test_help_lists_commands():
    result = call("--help")
    assert result.exit_code == 0
    for command in ("demo", "generate", "calibrate", "tune", "evaluate", "compare"):
        assert re.search(rf"^\W*{command}  +\w", result.output, re.MULTILINE), command  # a row of the table of commands
        usage = call(command, "--help")
        assert usage.exit_code == 0
        assert f"kspec-guidance {command}" in usage.output or f" {command} [OPTIONS]" in usage.output


COMMANDS = ("demo", "generate", "calibrate", "tune", "evaluate", "compare")


@pytest.mark.parametrize(
    "words",
    [
        ("--help",),
        ("--version",),
        ("embeddings", "--help"),
        ("bench", "--help"),
        *((c, o) for c in COMMANDS for o in ("--help", "--version")),
    ],
)
def test_help_and_version_import_no_torch(words, monkeypatch, capsys):
    code = (
        "import sys; from kspec_guidance.cli import app\n"
        "try: app()\nfinally: print([m for m in ('torch', 'diffusers', 'numpy', 'PIL') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *shown, modules = done.stdout.strip().splitlines()
    assert modules == "[]"
    if words[-1] == "--version":
        assert shown == [f"kspec-guidance {kspec_guidance.__version__}"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_the_common_options_in_titled_groups_and_tells_exit_codes(command):
    text = call(command, "--help").stdout
    written = () if command == "calibrate" else ("--out",)  # its one file is in the user's cache
    for option in ("--json", "--quiet", "--version", *written):
        assert f"{option} " in text or f"{option}," in text, option
    titles = re.findall(r"─ (\w[\w ]*) ─", text)
    assert "Output" in titles
    assert len(titles) >= 3
    ungrouped = re.findall(r"--[a-z-]+", text[text.index("─ Options ─") :].split("╰")[0])
    assert sorted(ungrouped) == ["--help", "--version"]
    assert "Exit code: 0 done" in text


def test_options_of_one_name_are_the_same_in_all_commands():
    found = {}
    for command in COMMANDS:
        for option in typer.main.get_command(app).commands[command].params:
            if option.param_type_name == "option":
                found.setdefault(option.name, {})[command] = option.opts
    for name, by_command in found.items():
        assert len({str(opts) for opts in by_command.values()}) == 1, (name, by_command)
    spellings = [spelling for by_command in found.values() for spelling in next(iter(by_command.values()))]
    assert len(spellings) == len(set(spellings))  # no spelling has two meanings


def test_no_words_show_the_help_and_near_misses_are_suggested():
    assert "Usage" in call().stdout
    assert call("tune", "-h").stdout == call("tune", "--help").stdout
    assert "Did you mean 'generate'?" in call("generat").stderr
    assert "--images" in call("generate", "heart", "--imags", 3).stderr


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
    embedder = image_embedder("auto")
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
        (("evaluate", "nowhere"), "'nowhere' does not exist"),
        (("evaluate", "."), "contains no readable images"),
        (("generate", "heart", "--model", "./nothing"), "cannot load './nothing'"),
        (("generate", "heart", "--memory-file", "junk"), "not a valid safetensors file"),
        (("generate", "heart", "--model", "dmeo"), "did you mean 'demo'?"),
        (("generate", "heart", "--scale", "-1"), "Invalid value for '--scale'"),
        (("generate", "heart", "--scale", "inf"), "inf is not a finite number"),
        (("generate", "heart", "--guidance-scale", "nan"), "nan is not a finite number"),
        (("generate", "heart", "--steps", "many"), "Invalid value for '--steps'"),
        (("generate", "heart", "--format", "parqet"), "did you mean 'parquet'?"),
        (("generate", "heart", "--memory", "exakt"), "did you mean 'exact'?"),
        (("generate", "heart", "--memory-by", "prompt"), "choose one of all, group"),
        (("generate", "heart", "--out", "junk"), "is a file"),
        (("generate", "heart", "--device", "gpu"), "cannot use device 'gpu'"),
        (("generate", "-"), "for standard input give --prompts -"),
        (("generate", "heart", "--processes", "2"), "--processes is for --dry-run"),
        (("generate", "heart", "--engine", "ray"), "--engine starts the workers of --workers"),
        (("generate", "heart", "--lease-seconds", "9"), "give --workers or --join"),
        (("generate", "heart", "--workers", "2", "--join", "run"), "give one of them"),
        (("generate", "heart", "--attribute", "a=dark-skin-ton:0.5"), "did you mean 'dark-skin-tone'?"),
        (("evaluate", ".", "--embedder", "efficentnet-lite0"), "did you mean 'efficientnet-lite0'?"),
        (("evaluate", ".", "--embedder", "open_clip:ViT-B-32"), "open_clip:NAME:FILE_OR_TAG"),
        (("evaluate", ".", "--text-embedder", "minlm"), "did you mean 'minilm'?"),
        (("evaluate", ".", "--out", "."), "is a directory"),
        (("evaluate", ".", "--prompts", "no.csv"), "'no.csv' does not exist"),
        (("compare", ".", "nowhere"), "'nowhere' does not exist"),
        (("demo", "--images", "1"), "Invalid value for '--images-per-prompt'"),
    ],
)
def test_errors_are_one_line_that_names_the_expected_and_exit_with_code_two(args, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "junk").write_bytes(b"junk")
    result = call(*args)
    assert result.exit_code == 2
    assert result.stdout == ""
    (line,) = [line for line in result.stderr.splitlines() if not line.startswith("loading")]
    assert line.startswith("error: ")
    assert message in line


@pytest.mark.slow
def test_demo_writes_images_and_scores(tmp_path):
    result = call("demo", "--out", tmp_path, "--images", 4, "--steps", 4)
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
