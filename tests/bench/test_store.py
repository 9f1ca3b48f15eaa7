import json

import pytest
from PIL import Image

from kspec_guidance.bench.store import Run
from kspec_guidance.synthesis.errors import CheckpointError, FolderError


def write_run(folder, images=2):
    """A run of two methods and two prompts, of which the second prompt of ``plain`` lacks its last record."""
    settings = {
        "model": {"name": "demo"}, "images": images, "steps": 2, "seed": 0,
        "prompts": [{"index": k, "text": text} for k, text in enumerate(("heart", "rocket"))],
        "methods": [
            {"name": "plain", "strengths": [None], "chosen": None},
            {"name": "sparke", "strengths": ["25", "50"], "chosen": "50"},
        ],
    }  # fmt: skip
    lines = []
    for method, strength in (("plain", None), ("sparke", "25"), ("sparke", "50")):
        for prompt in (0, 1):
            for number in range(images):
                file = f"images/{method}/{strength or 'plain'}/{prompt:06d}-{number:03d}.png"
                (folder / file).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGBA", (4, 4), (prompt, number, 0, 255)).save(folder / file)
                lines.append({"method": method, "strength": strength, "prompt": prompt, "number": number,
                              "seed": number, "file": file, "seconds": 1.0})  # fmt: skip
    (folder / "settings.json").write_text(json.dumps(settings))
    (folder / "records").mkdir()
    text = "".join(
        json.dumps(line) + "\n" for line in lines if (line["method"], line["prompt"], line["number"]) != ("plain", 1, 1)
    )
    (folder / "records" / "rank-0000.jsonl").write_text(text)
    return folder / "records" / "rank-0000.jsonl"


def test_groups_have_the_finished_images_of_each_prompt_in_order(tmp_path):
    write_run(tmp_path)
    groups = Run(tmp_path).groups()
    assert list(groups) == [("plain", None), ("sparke", "25"), ("sparke", "50")]
    assert list(groups["plain", None]) == [0]  # of prompt 1 an image is missing
    assert list(groups["sparke", "50"]) == [0, 1]
    images = groups["sparke", "25"][1]
    assert [image.getpixel((0, 0)) for image in images] == [(1, 0, 0), (1, 1, 0)]
    assert len(Run(tmp_path).records()) == 2 + 4 + 4


def test_a_group_without_one_of_its_files_is_not_finished(tmp_path):
    write_run(tmp_path)
    (tmp_path / "images/sparke/50/000001-000.png").unlink()
    assert list(Run(tmp_path).groups()["sparke", "50"]) == [0]


def test_a_line_that_a_killed_run_left_unfinished_is_left_out_and_other_damage_is_an_error(tmp_path):
    path = write_run(tmp_path)
    whole = path.read_text()
    path.write_text(whole + whole[: whole.index("\n") - 5])
    assert len(Run(tmp_path).records()) == 10
    path.write_text("{\n" + whole)
    with pytest.raises(CheckpointError, match="line 1 is no record"):
        Run(tmp_path).records()


@pytest.mark.parametrize("file", ["../../out.png", "/etc/passwd", "images/a.txt"])
def test_records_name_no_files_outside_the_folder(tmp_path, file):
    path = write_run(tmp_path)
    first, rest = path.read_text().split("\n", 1)
    path.write_text(json.dumps(json.loads(first) | {"file": file}) + "\n" + rest)
    with pytest.raises(CheckpointError, match="no image of the folder"):
        Run(tmp_path).records()


def test_folders_of_other_things_are_refused(tmp_path):
    with pytest.raises(FolderError, match="holds no comparison"):
        Run(tmp_path)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match="not what `bench` writes"):
        Run(tmp_path)
