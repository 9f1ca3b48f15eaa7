import json

import pytest
from PIL import Image

from tests.cli.commands import call


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i, colour in enumerate(("red", "green", "blue", "white", "black", "red")):
        Image.new("RGB", (20, 20), colour).save(folder / f"{i}.png")
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "".join(json.dumps({"file_name": f"{i}.png", "prompt": f"p{i % 2}"}) + "\n" for i in range(6)),
        "file_name,prompt\n" + "".join(f"{i}.png,p{i % 2}\n" for i in range(6)),
    ],
)
def test_captions_are_read_from_standard_input(text, pictures):
    result = call("evaluate", pictures, "--prompts", "-", "--json", stdin=text)
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert {p["prompt"]: p["images"] for p in record["prompts"]} == {"p0": 3, "p1": 3}
    assert record["files"] == []


def test_compare_with_a_reference_reports_the_gap_of_each_set(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    few = call("compare", pictures, pictures, "--reference", pictures)
    assert few.exit_code == 2
    assert "needs at least 8 images in each set, got 6, 6 and 6" in " ".join(few.output.split())
    for i in range(4):
        Image.new("RGB", (20, 20), (60 * i, 200, 250 - 60 * i)).save(pictures / f"more-{i}.png")
    result = call("compare", pictures, pictures, "--reference", pictures, "--json", "--out", "page.html")
    gaps = json.loads(result.stdout)["gaps"]
    assert gaps.keys() == {"a", "b"}
    assert gaps["a"]["scores"]["vendi"]["gap"]["value"] == pytest.approx(0, abs=1e-9)
    page = (tmp_path / "page.html").read_text()
    assert "Against held-out images" in page
    assert "Vendi score against number of images" in page


def test_json_of_compare_is_one_document_and_a_page_is_written_if_named(pictures, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = call("compare", pictures, pictures, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert set(record) >= {"a", "b", "tests", "scores", "files"}
    assert not (tmp_path / "compare.html").exists()
    result = call("compare", pictures, pictures, "--json", "--quiet", "--out", "page.html")
    assert json.loads(result.stdout)["files"] == ["page.html", "page.json"]
    assert result.stderr == ""
    assert (tmp_path / "page.html").exists()


def test_after_an_interruption_embedded_features_are_in_the_cache(pictures, tmp_path, monkeypatch):
    from kspec_guidance.evaluation import image_sets
    from kspec_guidance.evaluation.image_sets import decode_image

    read = []

    def decode(data):
        read.append(data)
        if len(read) == 4:
            raise KeyboardInterrupt
        return decode_image(data)

    monkeypatch.setattr(image_sets, "BATCH_SIZE", 2)
    monkeypatch.setattr(image_sets, "decode_image", decode)
    words = ("evaluate", pictures, "--json", "--cache", tmp_path / "cache")
    result = call(*words)
    assert result.exit_code == 130
    assert f"features are kept in {tmp_path / 'cache'}" in result.stderr
    assert len(list((tmp_path / "cache").iterdir())) == 1
    assert call(*words).exit_code == 0
