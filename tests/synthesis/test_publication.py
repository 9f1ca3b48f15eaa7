import hashlib
import json

import pytest
import yaml

from kspec_guidance.synthesis.card import Contents, card, licence_of
from tests.synthesis.small_runs import contents, make

ONE_STEP = {"num_inference_steps": 1}
PROMPTS = [{"prompt": "heart", "note": "a|b"}, {"prompt": "runner"}]


def front_matter(out):
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


@pytest.fixture(scope="module")
def published(tmp_path_factory, pipe):
    out = tmp_path_factory.mktemp("published") / "set"
    make(out, pipe, PROMPTS, 5, 5, call=ONE_STEP, licence="CC0-1.0", duplicates=0.9999, report=True, embedder="demo")
    return out


def test_the_card_says_what_was_made_how_and_under_which_licence(published):
    front, text = front_matter(published)
    assert front["license"] == "cc0-1.0"
    assert front["size_categories"] == "n<1K"
    assert "synthetic" in front["tags"]
    for part in ("10 images of 2 prompts", "| model | demo |", "| steps | 1 |", "CC0-1.0", "trainedAlgorithmicMedia",
                 "reproduce.yaml", "95% interval", "## Limits"):  # fmt: skip
        assert part in text
    report = json.loads((published / "report.json").read_text())
    vendi = next(s for s in report["scores"] if s["score"] == "Vendi")
    assert f"| {vendi['value']:.3g} | {vendi['interval'][0]:.3g} to {vendi['interval'][1]:.3g} | 10 |" in text
    assert not {"/tmp", "/root", "/home"} & {part for part in text.split() if part.startswith("/")}


def test_the_hubs_loader_reads_the_folder_by_its_card(published, tmp_path):
    import datasets

    loaded = datasets.load_dataset(str(published), split="train", cache_dir=str(tmp_path / "c"))
    assert len(loaded) == 10
    assert loaded[0]["licence"] == "CC0-1.0"
    assert loaded[0]["image"].size == (64, 64)


def test_checksums_are_those_of_the_files(published):
    lines = (published / "SHA256SUMS").read_text().splitlines()
    named = {name: digest for digest, name in (line.split("  ") for line in lines)}
    assert {"croissant.json", "metadata.jsonl", "prompts.jsonl", "reproduce.yaml", "0000/000001-0000.png"} <= set(named)
    assert list(named) == sorted(named)
    for name, digest in named.items():
        assert hashlib.sha256((published / name).read_bytes()).hexdigest() == digest


@pytest.mark.parametrize("kind", ["imagefolder", "parquet", "webdataset"])
def test_mlcroissant_validates_the_croissant_and_reads_the_images(kind, tmp_path, pipe):
    mlcroissant = pytest.importorskip("mlcroissant")
    make(tmp_path / "set", pipe, PROMPTS, 3, 3, call=ONE_STEP, licence="MIT", format=kind, shard_size=4)
    found = mlcroissant.Dataset(tmp_path / "set" / "croissant.json")
    assert not found.metadata.ctx.issues.errors
    assert found.metadata.license == ["https://spdx.org/licenses/MIT.html"]
    sets = {records.name: list(found.records(records.name)) for records in found.metadata.record_sets}
    for records in sets.values():
        assert len(records) == 6
    name = "images" if kind == "parquet" else "contents"
    assert sets[name][0][f"{name}/image"].size == (64, 64)
    if kind != "webdataset":
        assert {row["images/prompt"] for row in sets["images"]} == {b"heart", b"runner"}
    if kind == "imagefolder":
        assert {row["images/file_name"] for row in sets["images"]} == {
            row["contents/file_name"] for row in sets["contents"]
        }


def test_files_that_the_user_changed_are_left_as_they_are(tmp_path, pipe):
    (tmp_path / "README.md").write_text("mine")
    settings = {"images_per_prompt": 1, "call": ONE_STEP}
    with pytest.warns(UserWarning, match=r"README.md was written or changed by another hand"):
        make(tmp_path, pipe, ["heart"], **settings)
    (tmp_path / "reproduce.yaml").write_text("cut o")
    with pytest.warns(UserWarning, match=r"reproduce.yaml was written or changed by another hand"):
        make(tmp_path, pipe, ["heart"], **settings)
    assert (tmp_path / "README.md").read_text() == "mine"
    (tmp_path / "README.md").unlink()
    (tmp_path / "reproduce.yaml").unlink()
    make(tmp_path, pipe, ["heart"], **settings)
    assert "1 images of 1 prompts" in (tmp_path / "README.md").read_text()
    assert (tmp_path / "reproduce.yaml").is_file()


def test_two_folders_of_one_run_have_the_same_files(tmp_path, pipe):
    for name in ("a", "b"):
        make(tmp_path / name, pipe, PROMPTS, 1, call=ONE_STEP)
    found = contents(tmp_path / "a")
    assert found == contents(tmp_path / "b")
    assert {"README.md", "croissant.json", "SHA256SUMS"} <= set(found)


ROW = {"prompt": "heart", "licence": "MIT", "settings": "0", "model": "m"}


@pytest.mark.parametrize(
    ("licences", "expected", "front"),
    [(["MIT"], "MIT", {"license": "mit"}), ([None, "MIT"], None, {}), ([], None, {}),
     (["MIT", "CC0-1.0"], "CC0-1.0 AND MIT", {"license": "other", "license_name": "CC0-1.0 AND MIT"}),
     (["LicenseRef-own"], "LicenseRef-own", {"license": "other", "license_name": "LicenseRef-own"})],
)  # fmt: skip
def test_the_licence_of_a_set_is_that_of_all_images(licences, expected, front):
    rows = [{**ROW, "licence": licence} for licence in licences]
    assert licence_of(rows) == expected
    if rows:
        text = card("x", Contents(rows, {}, "imagefolder"), None, {})
        found = yaml.safe_load(text.split("---\n")[1])
        assert {k: v for k, v in found.items() if k.startswith("license")} == front


def test_texts_of_the_user_do_not_become_markup():
    rows = [{**ROW, "prompt": "<script>alert(1)</script>\n# head | [a](b) `c` ---\n", "model": "a|b"}]
    text = card("x: y\n---", Contents(rows, {"bad | <b>": 2}, "imagefolder"), None, {"filter": "<i>|"})
    assert "<script>" not in text
    assert "<b>" not in text
    assert "| a\\|b |" in text
    assert yaml.safe_load(text.split("\n---\n")[0].removeprefix("---\n"))["pretty_name"] == "x: y\n---"
