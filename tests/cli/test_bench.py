import json

import pytest
from PIL import Image

from kspec_guidance.bench import models
from kspec_guidance.bench.plan import SUITES
from kspec_guidance.cli.bench import SUITE_NAMES, _fitting
from kspec_guidance.cli.console import Output
from tests.cli.commands import call

FAST = ("--prompts", "bundled:2", "--images", 2, "--steps", 1, "--metrics", "vendi")


def test_the_command_leaves_page_and_results_and_continues(tmp_path):
    result = call("bench", "--methods", "plain,sparke", *FAST, "--out", tmp_path)
    assert result.exit_code == 0, result.output
    results = json.loads((tmp_path / "results.json").read_text())
    assert set(results["methods"]) == {"plain", "sparke"}
    assert set(results["methods"]["sparke"]["vendi"]) >= {"value", "low", "high"}
    assert (tmp_path / "bench.html").stat().st_size > 1000
    again = call("bench", "--methods", "plain,sparke", *FAST, "--out", tmp_path)
    assert "0 images made" in again.stderr
    other = call("bench", "--methods", "plain,sparke", *FAST, "--seed", 1, "--out", tmp_path)
    assert other.exit_code == 3
    assert "seed: 0 before, now 1" in other.stderr


def test_a_form_is_written_and_its_answers_are_read(tmp_path):
    """A second call finds all images made: it scores them, reads the answers, and prints figures of a paper beside ours."""
    assert call("bench", *FAST, "--form", "--out", tmp_path).exit_code == 0
    key = json.loads((tmp_path / "form-key.json").read_text())
    answers = [{"item": k, "answers": dict.fromkeys(key["questions"], "left")} for k in range(len(key["items"]))]
    person = {"form": key["form"], "participant": "1", "answers": answers}
    (tmp_path / "person.json").write_text(json.dumps(person))
    other = call("bench", "--answers", tmp_path / "person.json", "--out", tmp_path / "other")
    assert other.exit_code == 2
    assert "form-key.json is missing" in other.stderr
    result = call("bench", *FAST, "--answers", tmp_path / "person.json", "--compare-with", "sparke-cost", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    assert json.loads((tmp_path / "results.json").read_text())["preferences"]["participants"] == 1
    text = (tmp_path / "tables.md").read_text()
    assert "## What people prefer" in text
    assert "## SPARKE, cost of an image, SD 1.5" in text


def test_a_dry_run_prints_hours_and_gigabytes_and_writes_nothing(tmp_path):
    result = call("bench", *FAST, "--dry-run", "--processes", 2, "--out", tmp_path / "none", "--json")
    assert result.exit_code == 0, result.output
    plan = json.loads(result.stdout)
    assert (plan["images"], plan["processes"]) == (8, 2)
    assert plan["hours"] > 0
    assert plan["disk_bytes"] > 0
    assert not (tmp_path / "none").exists()


def test_mmd_has_a_baseline_that_is_made_once_and_not_by_a_dry_run(tmp_path, monkeypatch):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "references"
    folder.mkdir()
    for k in range(3):
        Image.new("RGB", (64, 64), (60 * k, 90, 120)).save(folder / f"{k}.png")
    command = ("bench", "--methods", "plain,mmd", "--like", folder, *FAST, "--out", tmp_path / "run")
    planned = call(*command, "--dry-run")
    assert planned.exit_code == 0
    assert "100 images without guidance are made as a baseline" in planned.stderr
    assert not (tmp_path / "home").exists()
    assert call(*command).exit_code == 0
    [baseline] = (tmp_path / "home" / "baselines").iterdir()
    changed = baseline.stat().st_mtime_ns
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert settings["methods"][1]["parameters"] == {"baseline_samples": 100}
    assert "0 images made" in call(*command).stderr
    assert baseline.stat().st_mtime_ns == changed


def test_a_dry_run_counts_no_images_of_another_comparison(tmp_path):
    assert call("bench", *FAST, "--out", tmp_path).exit_code == 0
    again = call("bench", *FAST, "--dry-run", "--out", tmp_path, "--json")
    assert json.loads(again.stdout)["finished"] == 8
    other = call("bench", *FAST, "--dry-run", "--seed", 1, "--out", tmp_path)
    assert other.exit_code == 3
    assert "seed: 0 before, now 1" in other.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "sdxll"), "model 'sdxll' is unknown"),
        (("--model", "sdxl", "--device", "cpu"), "needs about"),
        (("--methods", "plain,vivd"), "did you mean 'vivid'?"),
        (("--methods", "plain,dave"), "which demo (StableDiffusionPipeline) has not; leave it out"),
        (("--prompts", "coco:10"), "get it from annotations_trainval2017.zip"),
        (("--prompts", "bundled:99"), "has 60 prompts"),
        (("--suite", "long"), "choose one of quick, paper"),
        (("--processes", 2), "torchrun --nproc-per-node 2"),
        (("--offload", "model", "--device", "cpu"), "keeps weights off a GPU"),
        (("--option", "negative_promt=x"), "did you mean negative_prompt?"),
        (("--device", "cuda:99"), "cannot use device 'cuda:99'"),
        (("--metrics", "vendy"), "did you mean 'vendi'?"),
        (("--compare-with", "sparke-table-2"), "no table of a paper is named 'sparke-table-2'"),
        (("--compare-with", "oscar"), "no figures of OSCAR (arXiv 2510.09060) are known here"),
        (("--answers", __file__), "holds no answers to a form"),
    ],
)
def test_wrong_input_is_told_in_one_line_and_nothing_is_written(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(models, "_free", lambda device: int(1e9))
    result = call("bench", *arguments, "--out", tmp_path / "run")
    assert result.exit_code == 2, result.output
    assert message in result.stderr.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("sd-1.5", "cannot load 'stable-diffusion-v1-5/stable-diffusion-v1-5'"),
        ("flux-dev", "it asks for your consent at huggingface.co/black-forest-labs/FLUX.1-dev"),
    ],
)
def test_weights_that_are_not_here_are_told(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_free", lambda device: None)
    result = call("bench", "--model", name, "--out", tmp_path / "run", "--device", "cpu")
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_suite_leaves_out_methods_that_the_model_cannot_run(capsys):
    assert tuple(SUITES) == SUITE_NAMES
    names = SUITES["quick"]["methods"]
    left = _fitting(Output(as_json=False, quiet=False), names, models.RECIPES["flux-dev"])
    assert left == "plain,cads,particle,sparke,vivid"
    assert "without lower-cfg: it needs classifier-free guidance" in capsys.readouterr().err


def test_a_warning_names_prompts_that_the_embedded_model_does_not_know(tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a xylophone orchestra\nheart\n")
    result = call("bench", "--prompts", prompts, "--images", 2, "--steps", 1, "--dry-run", "--out", tmp_path / "run")
    assert "1 of 2 prompts have words that it never saw" in result.stderr
