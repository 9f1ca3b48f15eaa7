import importlib
import json

import pytest
from PIL import Image

from kspec_guidance.synthesis.api import synthesize
from tests.cli.commands import call
from tests.synthesis.small_runs import rows_of

FAST = ("--steps", 1, "--images", 2, "--batch", 2, "--no-report")


@pytest.mark.parametrize(
    "text",
    [
        "heart\nman, old\n",
        '{"prompt": "heart"}\n{"prompt": "man, old"}\n',
        '[{"prompt": "heart"}, "man, old"]',
        'prompt,note\nheart,a\n"man, old",b\n',
        "prompt\tnote\nheart\ta\nman, old\tb\n",
    ],
)
def test_prompts_are_read_from_standard_input_in_every_format(text, tmp_path):
    result = call("generate", "--prompts", "-", "--out", tmp_path, *FAST, "--dry-run", "--json", stdin=text)
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["prompts"] == 2
    assert not list(tmp_path.iterdir())


def test_json_has_the_result_and_quiet_nothing_else(tmp_path):
    result = call("generate", "heart", "--out", tmp_path / "set", *FAST, "--json", "--quiet")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["images"] == record["made"] == 2
    assert record["out"] == str(tmp_path / "set")
    assert record["report"] is None
    assert result.stderr == ""
    result = call("generate", "heart", "--out", tmp_path / "set", *FAST)
    assert result.stdout.startswith("2 images in ")
    assert result.stderr.splitlines() == ["loading model demo ..."]


def test_prompts_read_by_the_command_give_the_run_of_the_api(tmp_path, pipe):
    path = tmp_path / "p.jsonl"
    path.write_text(
        '{"prompt": "heart", "seed": 3, "note": 1}\n{"prompt": "man", "note": 2.5}\n{"prompt": "heart", "note": 1}\n'
    )
    assert call("generate", "--prompts", path, "--out", tmp_path / "set", *FAST).exit_code == 0
    with pytest.warns(UserWarning, match="seed is written as source_seed"):
        result = synthesize(
            path, tmp_path / "set", pipe, images_per_prompt=2, batch_size=2, report=False,
            call={"num_inference_steps": 1, "guidance_scale": 5.0},
        )  # fmt: skip
    assert (result.images, result.made) == (6, 0)  # the same settings, which include a digest of all prompts
    assert rows_of(tmp_path / "set")[0]["source_seed"] == 3


def test_dry_run_tells_what_each_of_several_processes_would_do(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.import_module("kspec_guidance.synthesis.estimate"), "FEATURE_SECONDS", float("inf"))
    prompts = ["heart", "red heart", "man", "woman", "flag", "cat face", "cat"]
    words = ("generate", *prompts, "--out", tmp_path, *FAST, "--dry-run", "--processes")
    result = call(*words, 3)
    assert result.exit_code == 0, result.output
    lines = result.stdout.splitlines()
    assert lines[0] == "14 images of 7 prompts, 7 batches on 3 processes"
    assert [line.split(":")[0] for line in lines[1:4]] == ["process 0", "process 1", "process 2"]
    record = json.loads(call(*words, 3, "--json").stdout)
    assert sum(share["prompts"] for share in record["shares"]) == 7
    assert sum(share["images"] for share in record["shares"]) == 14
    assert record["assigned"] is True
    assert record["seconds"] == pytest.approx(max(share["seconds"] for share in record["shares"]))
    assert "each process: 0 to 1 prompts, 0 to 2 images" in call(*words, 20).stdout
    assert not list(tmp_path.iterdir())


def test_after_an_interruption_the_same_command_resumes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "stopping_filter.py").write_text(
        "from pathlib import Path\n"
        "seen = []\n"
        "def keep(image, row):\n"
        "    seen.append(row)\n"
        "    if len(seen) == 4 and Path('stop').exists():\n"
        "        raise KeyboardInterrupt\n"
        "    return True\n"
    )
    (tmp_path / "stop").touch()
    words = ("generate", "heart", "man", "flag", "--out", "set", *FAST, "--filter", "stopping_filter:keep")
    result = call(*words)
    assert result.exit_code == 130
    assert result.stderr.splitlines()[-1] == (
        "stopped: 2 of 6 images are kept in set; run the same command again to resume"
    )
    assert len(rows_of(tmp_path / "set")) == 2
    (tmp_path / "stop").unlink()
    result = call(*words)
    assert result.exit_code == 0, result.output
    assert "6 images in set, 4 of them made now" in result.stdout


def test_variety_and_scale_set_the_strength_and_exclude_each_other(tmp_path):
    for option, value, columns in (("--variety", 30, (30.0, None)), ("--scale", 0.5, (None, 0.5))):
        result = call("generate", "heart", "--out", tmp_path / option[2:], *FAST, option, value)
        assert result.exit_code == 0, result.output
        assert {(row["variety"], row["scale"]) for row in rows_of(tmp_path / option[2:])} == {columns}
    result = call("generate", "heart", "--out", tmp_path / "both", *FAST, "--variety", 30, "--scale", 0.5)
    assert result.exit_code == 2
    assert "--variety 30 and --scale 0.5 both set the strength" in result.stderr
    assert call("generate", "heart", "--out", tmp_path / "far", *FAST, "--variety", 101).exit_code == 2


def test_arms_of_a_file_make_the_batches(tmp_path):
    path, out = tmp_path / "arms.toml", tmp_path / "set"
    path.write_text("[low]\nguidance_scale = 1.0\n[plain]\nguide = false\ncost = 2\n")
    many = ("--steps", 1, "--images", 4, "--batch", 1, "--no-report")
    result = call("generate", "heart", "--out", out, *many, "--arms", path, "--select", "uniform", "--json", "--quiet")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["arms"]) == {"low", "plain"}
    assert {row["arm"] for row in rows_of(out)} <= {"low", "plain"}


def test_select_without_arms_is_refused(tmp_path):
    result = call("generate", "heart", "--out", tmp_path, *FAST, "--select", "uniform")
    assert result.exit_code != 0
    assert "--arms" in result.output


@pytest.mark.slow
def test_like_takes_a_folder_and_makes_the_baseline_once(tmp_path, monkeypatch):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path / "home"))
    folder = tmp_path / "references"
    folder.mkdir()
    for k in range(4):
        Image.new("RGB", (64, 64), (60 * k, 90, 120)).save(folder / f"{k}.png")
    alone = call("generate", "heart", "--like-scale", 2, "--out", tmp_path / "set", *FAST)
    assert "give its folder" in alone.output
    plan = call("generate", "heart", "--like", folder, "--out", tmp_path / "set", *FAST, "--dry-run")
    assert plan.exit_code == 0, plan.output
    assert "before that a baseline of 100 images" in plan.stdout
    assert not (tmp_path / "home").exists()
    first = call("generate", "heart", "--like", folder, "--out", tmp_path / "set", *FAST)
    assert first.exit_code == 0, first.output
    [baseline] = (tmp_path / "home" / "baselines").iterdir()
    changed = baseline.stat().st_mtime_ns
    words = ("generate", "heart", "--like", folder, "--like-early", "--out", tmp_path / "planned", *FAST)
    assert json.loads(call(*words, "--dry-run", "--json").stdout)["baseline_images"] == 0  # it is in the cache now
    other = json.loads(call(*words, "--dry-run", "--json", "--guidance-scale", 2).stdout)
    assert other["baseline_images"] == 100
    assert other["baseline_seconds"] == pytest.approx(-(-100 // other["images"]) * other["batch_seconds"])
    call("generate", "heart", "--out", tmp_path / "plain", *FAST, "--variety", 0)
    again = call("generate", "heart", "--like", folder, "--out", tmp_path / "set", *FAST)
    assert "all images made" in again.output
    assert baseline.stat().st_mtime_ns == changed
    stronger = call("generate", "heart", "--like", folder, "--like-scale", 2, "--out", tmp_path / "stronger", *FAST)
    assert stronger.exit_code == 0, stronger.output
    early = call("generate", "heart", "--like", folder, "--like-early", "--out", tmp_path / "early", *FAST)
    assert early.exit_code == 0, early.output
    names = ("set", "plain", "stronger", "early")
    images = {next((tmp_path / name).rglob("*.png")).read_bytes() for name in names}
    assert len(images) == 4
    for k, subject in enumerate(("heart", "cat face", "rocket", "bird")):
        (folder / f"{k}.txt").write_text(subject)
    by_caption = call("generate", "heart", "--like", folder, "--like-captions", "--out", tmp_path / "captions", *FAST)
    assert by_caption.exit_code == 0, by_caption.output
    assert next((tmp_path / "captions").rglob("*.png")).read_bytes() not in images


def test_early_moves_ask_for_references():
    result = call("generate", "heart", "--like-early", *FAST)
    assert (result.exit_code, "give its folder" in result.output) == (2, True), result.output


def test_captions_of_references_are_checked_before_a_model_is_loaded(tmp_path):
    alone = call("generate", "heart", "--like-captions", "--out", tmp_path / "set", *FAST)
    assert (alone.exit_code, "give its folder" in alone.output) == (2, True)
    Image.new("RGB", (64, 64)).save(tmp_path / "0.png")
    about = ("--like", tmp_path, "--like-captions", "--out", tmp_path / "set", *FAST)
    result = call("generate", "heart", "--model", "no-such-model", *about)
    assert (result.exit_code, "none of the 1" in result.output) == (2, True), result.output
