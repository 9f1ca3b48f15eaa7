import re
import sys

import pytest

from tests.synthesis.small_runs import rows_of


def test_command_line(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    (tmp_path / "p.jsonl").write_text('{"prompt": "heart", "group": "a"}\n{"prompt": "man", "group": "b"}\n')
    line = ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "set"), "--steps", "3"]
    call = lambda *options: CliRunner().invoke(app, [*line, *options])  # noqa: E731
    result = call("--images", "4", "--dry-run")
    assert result.exit_code == 0, result.output
    assert "8 images of 2 prompts" in result.output
    assert not (tmp_path / "set").exists()
    result = call("--images", "4", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert result.exit_code == 0, result.output
    assert len(rows_of(tmp_path / "set")) == 6
    result = call("--images", "5", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert result.exit_code == 3
    assert "images_per_prompt: 4 before, now 5" in result.stderr
    result = call("--images", "5", "--quota", "b=2", "--no-report", "--force")
    assert result.exit_code == 0
    assert len(rows_of(tmp_path / "set")) == 7
    tones = [part for tone in ("dark", "light") for part in ("--attribute", f"{tone}={tone}-skin-tone:0.5")]
    result = call("--images", "6", "--quota", "b=2", "--no-report", "--force", *tones)
    assert result.exit_code == 0, result.output
    assert rows_of(tmp_path / "set")[-3]["attribute"] in ("dark", "light")
    for options, message in (
        (("--quota", "b"), "name=value"), (("--target", "x"), "cannot read the target"),
        (("--quota", "b=many"), "--quota b is a number of images, got 'many'"),
        (("--option", "eta=0", "--option", "eta=1"), "--option eta is given twice: '0' and '1'"),
        (("--memory-file", str(tmp_path)), "is a directory"),
        (("--filter", "nothing:here"), "import"), (("--device", "nowhere"), "cannot use device"),
        (("--dtype", "int8"), "choose one of float32, float16, bfloat16"), (("heart",), "got both"),
    ):  # fmt: skip
        result = call(*options)
        assert result.exit_code == 2, message
        assert message in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--licence", "mine"], "SPDX identifier"), (["--target", "vendi<4"], "cannot read the target"),
        (["--target", "9 of 8"], "got 9 of 8"), (["--duplicates", "2"], "a cosine in"),
        (["--filter", "blur<1"], "one limit"), (["--semantic-duplicates", "0"], "a cosine in"),
        (["--format", "zip"], "is unknown"),
        (["--sign", "nothing.pem"], "nothing.pem"), (["--candidates", "3", "--batch-size", "2"], "candidates"),
    ],
)  # fmt: skip
def test_what_needs_no_model_is_refused_before_one_is_loaded(tmp_path, monkeypatch, options, message):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    monkeypatch.setattr(
        sys.modules["kspec_guidance.cli.generate"], "load_pipeline", lambda *a: pytest.fail("a model was loaded")
    )
    result = CliRunner().invoke(app, ["generate", "heart", "--out", str(tmp_path / "set"), *options])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.stderr.split())


def test_a_file_given_as_the_text_of_a_prompt_is_refused(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    (tmp_path / "p.csv").write_text("prompt\nheart\n")
    result = CliRunner().invoke(app, ["generate", str(tmp_path / "p.csv"), "--out", str(tmp_path / "set")])
    assert result.exit_code == 2
    assert "is a file" in result.stderr
    assert not (tmp_path / "set").exists()


def test_an_error_of_the_pipeline_is_one_line_without_a_traceback(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    line = ["generate", "heart", "man", "--out", str(tmp_path / "set"), "--steps", "2", "--images", "2", "--batch", "3"]
    result = CliRunner().invoke(app, [*line, "--no-report", "--option", "guidance_rescale=much"])
    assert result.exit_code == 1
    (text,) = [text for text in result.stderr.splitlines() if "error:" in text]
    assert "failed in a batch of 3 images ('heart' with seeds" in text
    assert "TypeError" in text
    assert "Traceback" not in result.output
    result = CliRunner().invoke(app, [*line, "--no-report", "--option", "negative_prompt=blurry"])
    assert result.exit_code == 0, result.output
    assert len(rows_of(tmp_path / "set")) == 4


def test_warnings_are_lines_without_the_place_in_the_code(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    (tmp_path / "p.jsonl").write_text('{"prompt": "heart", "seed": 3}')
    line = [
        "generate",
        "--prompts",
        str(tmp_path / "p.jsonl"),
        "--out",
        str(tmp_path / "set"),
        "--steps",
        "1",
        "--images",
        "1",
    ]
    result = CliRunner().invoke(app, [*line, "--no-report"])
    assert result.exit_code == 0
    assert re.search(r"^warning: columns of prompts .*: seed is written as source_seed$", result.stderr, re.MULTILINE)
    assert "UserWarning" not in result.stderr
