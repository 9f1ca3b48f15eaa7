import json

from tests.cli.commands import call


def test_calibrate_writes_the_factor_that_later_calls_use(tmp_path, monkeypatch):
    monkeypatch.setenv("KSPEC_GUIDANCE_HOME", str(tmp_path))
    result = call("calibrate", "heart", "--steps", 3, "--images", 2, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert 0.25 <= record["factor"] <= 4
    assert (record["steps"], record["images"], record["file"]) == (3, 2, str(tmp_path / "calibration.json"))
    assert [entry["factor"] for entry in json.loads((tmp_path / "calibration.json").read_text())] == [record["factor"]]


def test_calibrate_needs_prompts():
    result = call("calibrate", "--steps", 3)
    assert result.exit_code == 2
    assert "prompts" in result.stderr
