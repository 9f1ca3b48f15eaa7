from tests.synthesis.small_runs import rows_of


def test_command_line(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    (tmp_path / "p.jsonl").write_text('{"prompt": "heart", "group": "a"}\n{"prompt": "man", "group": "b"}\n')
    call = lambda *more: CliRunner().invoke(  # noqa: E731
        app, ["generate", "--prompts", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "set"), "--steps", "3", *more]
    )
    said = call("--images", "4", "--dry-run")
    assert said.exit_code == 0, said.output
    assert "8 images of 2 prompts" in said.output
    assert not (tmp_path / "set").exists()
    said = call("--images", "4", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert said.exit_code == 0, said.output
    assert len(rows_of(tmp_path / "set")) == 6
    said = call("--images", "5", "--quota", "b=2", "--no-report", "--option", "eta=0.0")
    assert said.exit_code == 2
    assert "images: 4 before, now 5" in said.stderr
    said = call("--images", "5", "--quota", "b=2", "--no-report", "--force")
    assert said.exit_code == 0
    assert len(rows_of(tmp_path / "set")) == 7
    tones = [part for tone in ("dark", "light") for part in ("--attribute", f"{tone}={tone}-skin-tone:0.5")]
    said = call("--images", "6", "--quota", "b=2", "--no-report", "--force", *tones)
    assert said.exit_code == 0, said.output
    assert rows_of(tmp_path / "set")[-3]["attribute"] in ("dark", "light")
    for more, words in (
        (("--quota", "b"), "name=value"), (("--target", "x"), "cannot read the target"),
        (("--filter", "nothing:here"), "import"), (("--device", "nowhere"), "cannot use device"),
        (("--dtype", "int8"), "dtype must be one of"), (("heart",), "not both"),
    ):  # fmt: skip
        said = call(*more)
        assert said.exit_code == 2, words
        assert words in said.stderr
