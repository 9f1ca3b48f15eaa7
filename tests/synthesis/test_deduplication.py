import pytest

from kspec_guidance.synthesis import SynthesisError
from tests.cli.commands import call as command
from tests.synthesis.small_runs import make, rows_of

pytest.importorskip("faiss")
CALL = {"num_inference_steps": 2, "guidance_scale": 5.0}


def test_repeated_images_of_any_prompt_are_listed_and_others_are_made_in_their_place(tmp_path, pipe):
    result = make(tmp_path, pipe, ["heart", "red heart"], 6, 6, call=CALL, semantic_duplicates=0.5)
    names = (tmp_path / "semantic-duplicates.txt").read_text().split()
    assert result.semantic_duplicates == len(names) > 0
    assert set(names) < {row["file_name"] for row in rows_of(tmp_path)}
    again = make(tmp_path, pipe, ["heart", "red heart"], 6, 6, call=CALL, drop=names[:2])
    assert (again.images, again.made) == (12, 2)
    left = {row["file_name"] for row in rows_of(tmp_path)}
    assert len(left) == 12
    assert not left & set(names[:2])
    assert not (tmp_path / names[0]).exists()
    assert "on the list of names to drop 2" in (tmp_path / "README.md").read_text()
    assert make(tmp_path, pipe, ["heart", "red heart"], 6, 6, call=CALL, drop=names[:2]).made == 0  # the same command


def test_lists_that_do_not_fit_are_refused(tmp_path, pipe):
    settings = {"images_per_prompt": 1, "call": CALL}
    for cosine in (0, 1.5, True, "much"):
        with pytest.raises(SynthesisError, match="semantic_duplicates is a cosine"):
            make(tmp_path / "set", pipe, ["heart"], **settings, semantic_duplicates=cosine)
    make(tmp_path / "set", pipe, ["heart"], **settings)
    with pytest.raises(SynthesisError, match=r"1 of 1 names to drop are no images of .*'x.png'"):
        make(tmp_path / "set", pipe, ["heart"], **settings, drop=["x.png"])
    make(tmp_path / "shards", pipe, ["heart"], **settings, format="webdataset")
    with pytest.raises(SynthesisError, match="images cannot be dropped from the shards"):
        make(tmp_path / "shards", pipe, ["heart"], **settings, format="webdataset", drop=["0000/000000-0000.png"])


def test_the_command_lists_and_drops(tmp_path):
    line = ("generate", "heart", "--out", tmp_path / "set", "--steps", 1, "--images", 3, "--no-report")
    result = command(*line, "--semantic-duplicates", 0.1)
    assert result.exit_code == 0, result.output
    names = tmp_path / "set" / "semantic-duplicates.txt"
    assert f"images nearly repeat others: {names}" in result.stdout
    result = command(*line, "--drop", names, "--json")
    assert result.exit_code == 0, result.output
