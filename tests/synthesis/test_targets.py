"""A run whose guide has a target raises the strength of each prompt, and resumes with what it had learned."""

import pytest
import torch

from kspec_guidance import SPARKE
from tests.synthesis.small_runs import contents, make, rows_of

RUN = {"prompts": ["rocket", "qwxz"], "images_per_prompt": 6, "batch_size": 4}


class Interrupted(Exception):
    pass


def stop_after(batches):
    done = []

    def progress_callback(now):
        done.append(now)
        if len(done) == batches:
            raise Interrupted

    return progress_callback


@pytest.mark.slow
def test_a_resumed_run_is_that_without_interruption(tmp_path, pipe):
    whole = make(tmp_path / "whole", pipe, guide=SPARKE(target="7 of 8"), **RUN)
    for batches in (1, 1):
        with pytest.raises(Interrupted):
            make(tmp_path / "parts", pipe, guide=SPARKE(target="7 of 8"), progress_callback=stop_after(batches), **RUN)
    result = make(tmp_path / "parts", pipe, guide=SPARKE(target="7 of 8"), **RUN)
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert result.targets == whole.targets
    assert sum(result.targets.values()) == 2
    strengths = [row["variety"] for row in rows_of(tmp_path / "whole") if row["prompt"] == "rocket"]
    assert strengths[0] == 25
    assert max(strengths) > 25
    assert {row["variety"] for row in rows_of(tmp_path / "whole") if row["prompt"] == "qwxz"} == {25}
    assert "targets: " in str(result)


def test_a_run_leaves_the_guide_as_it_was_and_its_images_with_a_lost_one_resume(tmp_path, pipe):
    guide = SPARKE(target="7 of 8")
    make(tmp_path, pipe, guide=guide, prompts=["house"], images_per_prompt=4, batch_size=1)
    assert guide.target.prompts == []
    (tmp_path / rows_of(tmp_path)[0]["file_name"]).unlink()
    result = make(tmp_path, pipe, guide=guide, prompts=["house"], images_per_prompt=4, batch_size=1, force=True)
    assert (result.made, result.images) == (1, 4)


def test_another_target_is_another_setting(tmp_path, pipe):
    make(tmp_path, pipe, guide=SPARKE(target="7 of 8"), prompts=["house"], images_per_prompt=2, batch_size=2)
    with pytest.raises(Exception, match="6 of 8"):
        make(tmp_path, pipe, guide=SPARKE(target="6 of 8"), prompts=["house"], images_per_prompt=2, batch_size=2)


def test_the_command_line_takes_it(tmp_path):
    from typer.testing import CliRunner

    from kspec_guidance.cli import app

    line = ["generate", "house", "--out", str(tmp_path), "--steps", "2", "--images", "4", "--batch", "4", "--no-report"]
    result = CliRunner().invoke(app, [*line, "--target", "7 of 8"])
    assert result.exit_code == 0, result.output
    assert "targets: " in result.output
    assert torch.tensor([row["variety"] for row in rows_of(tmp_path)]).eq(25).all()
    for wrong, message in ((["--target", "9 of 8"], "got 9 of 8"), (["--target", "7 of 8", "--variety", "5"], "both set")):
        result = CliRunner().invoke(app, [*line, *wrong])
        assert result.exit_code == 2
        assert message in result.stderr
