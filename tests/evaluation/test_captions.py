"""Captions in lists and in files beside images: each finds its image, or is named with the reason."""

import json

import pytest

from kspec_guidance.evaluation.captions import Caption, match_captions
from kspec_guidance.evaluation.image_sets import SourceError, load_images
from tests.evaluation.files import RED, cells, encoded, lines, prompts, table, tar_bytes, write


@pytest.mark.parametrize(
    ("image", "listed"),
    [
        ("{}.png", "./{}.png"),
        ("sub/{}.png", "sub\\{}.png"),
        ("sub/{}.png", ".\\sub\\{}.png"),
        ("{}.PNG", "{}.png"),
        ("{}.png", "{}.PNG"),
        ("Sub/{}.png", "sub/{}.png"),
        ("e\u0301{}.png", "\u00e9{}.png"),
        ("\u00e9{}.png", "E\u0301{}.png"),
        ("sub/{}.png", "{}.png"),
        ("{}.png", "images/{}.png"),
        ("a/{}.png", "/old/place/a/{}.png"),
        ("a b#/{}.png", "a b#/{}.png"),
        ("{}.png", "C:\\data\\{}.png"),
        ("sub/{}.png", "x/../sub//{}.png"),
    ],
)
@pytest.mark.parametrize("kind", ["jsonl", "csv", "parquet"])
def test_listed_names_find_their_images(tmp_path, image, listed, kind):
    write(tmp_path, {image.format(k): k for k in range(2)})
    entries = [(listed.format(k), f"p{k}") for k in range(2)]
    if kind == "jsonl":
        write(tmp_path, {"metadata.jsonl": lines(*entries)})
    elif kind == "csv":
        write(tmp_path, {"metadata.csv": "\ufefffile_name,prompt\r\n\r\n" + "".join(f'"{n}",{p}\r\n' for n, p in entries)})
    else:
        pytest.importorskip("pyarrow.parquet").write_table(
            pytest.importorskip("pyarrow").table({"file_name": [n for n, _ in entries], "prompt": [p for _, p in entries]}),
            tmp_path / "metadata.parquet",
        )
    assert prompts(tmp_path) == {image.format(k): f"p{k}" for k in range(2)}


def test_absolute_names_inside_the_set_are_relative_to_it(tmp_path):
    write(tmp_path, {"0.png": 0, "sub/0.png": 1})
    write(tmp_path, {"metadata.jsonl": lines((str(tmp_path / "sub/0.png"), "sub"), (str(tmp_path / "0.png"), "root"))})
    assert prompts(tmp_path) == {"0.png": "root", "sub/0.png": "sub"}
    assert load_images(tmp_path, RED).notes == []


def match(listed, images):
    found, unmatched, _ = match_captions([Caption(n, n, f"line {k}") for k, n in enumerate(listed)], images)
    return {image: c.name for image, c in found.items()}, unmatched


def test_ambiguous_names_are_not_matched():
    assert match(["a.png", "A.png"], ["A.png", "a.png"]) == ({"a.png": "a.png", "A.png": "A.png"}, {})
    for listed, images in (
        (["A.PNG"], ["a.png", "A.png"]),
        (["A.PNG", "A.png"], ["a.png"]),
        (["0.png"], ["x/0.png", "y/0.png"]),
        (["x/0.png", "y/0.png"], ["0.png"]),
    ):
        found, unmatched = match(listed, images)
        assert found == {}
        assert all(reason.startswith("ambiguous") for reason in unmatched.values())
        assert len(unmatched) == len(listed)
    assert match(["x/0.png"], ["y/0.png"]) == ({}, {"x/0.png": "no such image"})
    assert match(["0.png"], ["0.png", "x/0.png"])[0] == {"0.png": "0.png"}
    found, unmatched = match(["0.png", "0.png", "1.png"], ["0.png", "1.png"])
    assert found == {"0.png": "0.png", "1.png": "1.png"}
    assert list(unmatched) == ["0.png (line 1)"]


def test_captions_matched_by_the_end_of_their_path_are_mentioned(tmp_path):
    write(tmp_path, {"0.png": 0, "metadata.jsonl": lines(("train/0.png", "a"))})
    assert load_images(tmp_path, RED).notes == ["1 captions matched by the end of their path only: train/0.png to 0.png"]


@pytest.mark.parametrize(
    ("image", "text"),
    [
        ("0.png", "0.txt"), ("0.png", "0.png.txt"), ("0.png", "0.caption"), ("0.PNG", "0.TXT"), ("sub/0.png", "sub/0.txt"),
        ("\u00e9.png", "e\u0301.txt"), ("a.b.png", "a.b.txt"), ("A.png", "a.txt"),
    ],
)  # fmt: skip
def test_texts_beside_images_are_their_captions(tmp_path, image, text):
    write(tmp_path, {image: 0, text: "\ufeff a caption\r\n"})
    assert prompts(tmp_path) == {image: "a caption"}
    write(tmp_path, {"shard.tar": tar_bytes({text: "a caption", image: 0})})
    assert prompts(tmp_path / "shard.tar") == {image: "a caption"}


def test_texts_are_not_captions_of_other_images(tmp_path):
    files = {"a.png": 0, "A.png": 1, "a.txt": "lower", "sub/b.png": 2, "b.txt": "not of sub", "README.txt": "x"}
    write(tmp_path, {"s.tar": tar_bytes(files)})  # a file system may not tell a.png from A.png
    found = load_images(tmp_path, RED)
    assert dict(zip(found.names, found.prompts, strict=True)) == {"A.png": None, "a.png": "lower", "sub/b.png": None}
    assert set(found.unmatched) == {"b.txt", "README.txt"}
    write(tmp_path, {"s.tar": tar_bytes(files | {"A.png.txt": b"caf\xe9"})})
    assert load_images(tmp_path, RED).unmatched["A.png.txt"].startswith("unreadable: A.png.txt cannot be read as UTF-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("file_name,caption\n0.png,red, big heart\n", r"line 2 has 3 fields, but the header has 2; put captions"),
        ('file_name,caption\n\n1.png,ok\n0.png,"red\n', "line 4"),
        ('file_name,caption\n0.png,"red" heart\n', "line 2"),
        ("file_name;caption\n0.png;red\n", "needs file_name"),
        ("file_name,caption,caption\n0.png,a,b\n", "several columns named caption"),
        (b"file_name,caption\n1.png,b\n0.png,caf\xe9\n", r"UTF-8 text \(line 3"),
        (b"file_name,caption\n0.png,\xff" + b"x" * 200_000, "UTF-8"),
        ("file_name,caption\n,red\n", "line 2 needs file_name"),
        ("file_name,label\n0.png,red\n", "needs file_name and one of prompt, caption, text"),
    ],
)
def test_csv_captions_that_cannot_be_read_name_the_line(tmp_path, text, message):
    write(tmp_path, {"0.png": 0, "captions.csv": text})
    with pytest.raises(SourceError, match=message):
        load_images(tmp_path, RED)


@pytest.mark.parametrize(
    "data",
    [
        "file_name,caption\n0.png,\"a, b\"\n", "\ufefffile_name,caption\r\n0.png,\"a, b\"\r\n\r\n   \r\n",
        "file_name, caption\r0.png, \"a, b\"\r", "file_name,caption,n\n0.png,\"a, b\"\n",
        "file_name,caption\n0.png,\"a, b\"\n".encode("utf-16"), "\n\nfile_name,caption\n0.png,\"a, b\"",
    ],
)  # fmt: skip
def test_csv_captions_of_spreadsheets_are_read(tmp_path, data):
    write(tmp_path, {"0.png": 0, "captions.csv": data})
    assert prompts(tmp_path) == {"0.png": "a, b"}


def test_blank_and_missing_captions_are_no_prompt(tmp_path):
    entries = [
        {"file_name": "0.png", "text": "a"},
        {"file_name": "1.png", "text": None},
        {"file_name": "2.png", "text": " "},
        {"file_name": "3.png"},
        {"file_name": "4.png", "text": ["b", "c"]},
        {"file_name": "5.png", "text": "x\ud800"},
        {"file_name": "6.png", "text": float("nan")},
        {"file_name": "7.png", "prompt": float("nan"), "text": [float("nan"), "d"]},
    ]
    write(tmp_path, {f"{k}.png": k for k in range(8)} | {"metadata.jsonl": "\n".join(map(json.dumps, entries)) + "\n\n"})
    assert list(prompts(tmp_path).values()) == ["a", None, None, None, "b", "x?", None, "d"]
    write(tmp_path, {"s.tar": tar_bytes({"0.png": 0, "0.json": '{"caption": NaN}', "1.png": 1, "1.txt": "b"})})
    assert list(prompts(tmp_path / "s.tar").values()) == [None, "b"]
    table(tmp_path / "t.parquet", {"image": cells(1, 2), "text": [float("nan"), None]})
    assert load_images(tmp_path / "t.parquet", RED).prompts is None
    (tmp_path / "s.tar").unlink()
    (tmp_path / "t.parquet").unlink()
    write(tmp_path, {"metadata.jsonl": lines(("0.png", "")) + '{"file_name": "1.png", "text": {"en": "x"}}\n'})
    with pytest.raises(SourceError, match="line 2 has a caption of type dict"):
        load_images(tmp_path, RED)


def test_metadata_without_captions_is_mentioned_and_other_file_name_columns_are_read(tmp_path):
    write(tmp_path, {"0.png": 0, "metadata.jsonl": '{"file_name": "0.png", "label": 3}\n'})
    found = load_images(tmp_path, RED)
    assert found.prompts is None
    assert found.notes == ["metadata.jsonl has no captions"]
    with pytest.raises(SourceError, match="needs file_name"):
        load_images(tmp_path, RED, prompts=tmp_path / "metadata.jsonl")
    write(tmp_path, {"metadata.jsonl": '{"mask_file_name": "m.png", "image_file_name": "0.png", "text": "a"}\n'})
    assert prompts(tmp_path) == {"0.png": "a"}
    write(tmp_path, {"metadata.jsonl": '{"file_names": ["0.png"], "text": "b"}\n'})
    assert prompts(tmp_path) == {"0.png": "b"}


@pytest.mark.parametrize("caption", [{"text": "a"}, {}], ids=["captions", "none"])
def test_images_of_further_columns_such_as_masks_are_skipped(tmp_path, caption):
    entries = [{"mask_file_name": f"m/{k}.png", "image_file_name": f"{k}.png"} | caption for k in range(2)]
    files = {"0.png": 1, "1.png": 2, "m/0.png": 3, "m/1.png": 4, "2.png": 5}
    table_of = {"metadata.jsonl": "\n".join(map(json.dumps, entries))}
    write(tmp_path / "folder", files | table_of)
    write(tmp_path, {"s.tar": tar_bytes(files | table_of), "list.jsonl": table_of["metadata.jsonl"]})
    write(tmp_path / "plain", files)
    found = [load_images(tmp_path / "folder", RED), load_images(tmp_path / "s.tar", RED)]
    found += [load_images(tmp_path / "plain", RED, prompts=tmp_path / "list.jsonl")] if caption else []
    for one in found:
        assert sorted(one.names) == ["0.png", "1.png", "2.png"]
        assert set(one.skipped) == {"m/0.png", "m/1.png"}
        assert one.skipped["m/0.png"] == "listed in another column of images: mask_file_name"


def test_given_captions_of_which_none_matches_are_an_error(tmp_path):
    write(tmp_path, {"set/0.png": 0, "other.jsonl": lines(("7.png", "a")), "set/metadata.jsonl": lines(("0.png", "b"))})
    with pytest.raises(SourceError, match=r"none of the 1 captions .* lists 7\.png, and the images are 0\.png"):
        load_images(tmp_path / "set", RED, prompts=tmp_path / "other.jsonl")
    write(tmp_path, {"other.jsonl": lines(("0.png", "c"))})
    assert prompts(tmp_path / "set", prompts=tmp_path / "other.jsonl") == {"0.png": "c"}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("c.csv", "", "has no captions"),
        ("c.jsonl", "\n", "has no captions"),
        ("c.json", "[]", r"read from \.jsonl, \.csv, \.tsv, \.parquet files"),
        ("c.txt", "a", "not from"),
        ("c.parquet", "PAR1", "is not a Parquet file"),
    ],
)
def test_given_captions_without_any_are_an_error(tmp_path, name, text, message):
    write(tmp_path, {"set/0.png": 0, name: text})
    with pytest.raises(SourceError, match=message):
        load_images(tmp_path / "set", RED, prompts=tmp_path / name)


def test_captions_of_tabs_and_of_numbers_are_read(tmp_path):
    write(tmp_path, {"set/0": encoded(), "set/0.png": 0, "c.tsv": "file_name\tcaption\n0.png\ta, b\n"})
    assert prompts(tmp_path / "set", prompts=tmp_path / "c.tsv") == {"0.png": "a, b"}
    write(tmp_path, {"set/metadata.jsonl": '{"file_name": 0, "text": 7}\n{"file_name": "0.png", "text": 8}\n'})
    found = load_images(tmp_path / "set", RED)
    assert (found.prompts, found.unmatched) == (["8"], {"0": "no such image"})
