"""Scores of packages that live in other environments."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from kspec_guidance.bench import elsewhere
from kspec_guidance.bench.elsewhere import score_run, values_file
from kspec_guidance.bench.judge import judge
from tests.bench.runs import make_run


@pytest.fixture
def run(tmp_path):
    return make_run(tmp_path, 2, 2, methods={"plain": [None], "cads": [None]})


def test_values_of_another_environment_are_taken_and_continued(run, monkeypatch):
    groups = []

    def stub(device):
        def score(files, prompt):
            groups.append(prompt)
            if len(groups) == 3:
                raise KeyboardInterrupt
            return [float(Path(f).stem[-3:]) for f in files]

        return score

    monkeypatch.setitem(elsewhere.SCORERS, "vqascore", stub)
    with pytest.raises(KeyboardInterrupt):
        score_run(run.folder, "vqascore", "cpu")
    assert "have no value yet" in judge(run, ["vqascore"])["skipped"]["vqascore"]
    with values_file(run.folder, "vqascore").open("a") as file:
        file.write('{"file": "images/pl')  # of a process that was killed
    assert score_run(run.folder, "vqascore", "cpu") == 4
    assert groups == ["prompt 0", "prompt 1", "prompt 0", "prompt 0", "prompt 1"]
    found = judge(run, ["vqascore"])
    assert [by["vqascore"]["value"] for by in found["methods"].values()] == [0.5, 0.5]
    assert score_run(run.folder, "vqascore", "cpu") == 0


def test_values_of_files_that_changed_are_not_taken(run, monkeypatch):
    monkeypatch.setitem(elsewhere.SCORERS, "hpsv3", lambda device: lambda files, prompt: [1.0] * len(files))
    score_run(run.folder, "hpsv3", "cpu")
    (run.folder / "images/cads/plain/000001-000.png").write_bytes(b"another file")
    assert "000001-000.png and maybe other images" in judge(run, ["hpsv3"])["skipped"]["hpsv3"]


def test_the_script_needs_the_standard_library_alone(run):
    """It is run by the Python of another environment, which has no kspec_guidance."""
    (run.folder / "ImageReward.py").write_text(
        "class load:\n    def __init__(self, name, device): pass\n    def score(self, prompt, files): return [2.0, 3.0]\n"
    )
    isolated = (
        "import sys, runpy; sys.path.insert(0, sys.argv[2]); sys.argv = sys.argv[1:]; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    arguments = [elsewhere.__file__, str(run.folder), "image_reward", "--device", "cpu"]
    command = [sys.executable, "-S", "-c", isolated, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=run.folder, check=True, env={})
    assert "8 images scored" in done.stdout
    values = [json.loads(line)["value"] for line in values_file(run.folder, "image_reward").read_text().splitlines()]
    assert values == [2.0, 3.0] * 4
