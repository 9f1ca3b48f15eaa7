"""Image sets as people have them: every file and caption is read, or named with the reason."""

import gzip
import io
import json
import os
import sys
import tarfile
import unicodedata
import weakref
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import encode_reference
from kspec_guidance.cli import app
from kspec_guidance.evaluation.captions import Caption, match_captions
from kspec_guidance.evaluation.embedders import ImageEmbedder, embed_files
from kspec_guidance.evaluation.image_sets import SourceError, load_images
from kspec_guidance.evaluation.page import write_page
from kspec_guidance.evaluation.sets import evaluate_set
from kspec_guidance.utils import images as images_module
from tests import tiny

RED = ImageEmbedder(lambda x: x[:, :1, 0, 0], 8, "red", (0, 0, 0), (1, 1, 1))


def encoded(red=0, kind="PNG"):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (red, 0, 0)).save(out, kind)
    return out.getvalue()


def write(folder, files):
    """Write files: a number is an image of that red, others are texts or bytes."""
    for name, content in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = encoded(content) if isinstance(content, int) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)


def tar_bytes(files, mode="w"):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as tar:
        for name, content in files if isinstance(files, list) else files.items():
            content = encoded(content) if isinstance(content, int) else content
            content = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def lines(*entries):
    return "".join(json.dumps({"file_name": name, "prompt": prompt}) + "\n" for name, prompt in entries)


def prompts(path, **settings):
    found = load_images(path, RED, **settings)
    return dict(zip(found.names, found.prompts or [None] * len(found), strict=True))


def reds(found):
    return [round(float(r) * 255) for r in found.features[:, 0]]


def test_all_types_that_pillow_decodes_are_read(tmp_path):
    kinds = {
        "png": "PNG",
        "jfif": "JPEG",
        "JPG": "JPEG",
        "tga": "TGA",
        "webp": "WEBP",
        "ppm": "PPM",
        "bmp": "BMP",
        "TiF": "TIFF",
    }
    kinds |= {"jp2": "JPEG2000"} if "JPEG2000" in Image.SAVE else {}
    kinds |= {"avif": "AVIF"} if "AVIF" in Image.SAVE else {}
    write(tmp_path, {f"0.{k}": encoded(kind=v) for k, v in kinds.items()} | {"misnamed.png": encoded(kind="GIF")})
    found = load_images(tmp_path, RED)
    assert len(found) == len(kinds) + 1
    assert found.skipped == {}
    write(tmp_path, {"s.tar": tar_bytes({f"{k}.{k}": encoded(kind=v) for k, v in kinds.items()})})
    assert len(load_images(tmp_path / "s.tar", RED)) == len(kinds)


def test_every_file_of_a_folder_is_accounted_for(tmp_path):
    files = {
        "0.png": 1, "a/1.png": 2, "a/b/2.JPG": encoded(3, "JPEG"), "3.png": b"", "4.png": b"junk", "5.png": encoded(4)[:45],
        "x.svg": "<svg/>", "y.heic": b"\0", "archive.zip": b"PK", "table.xlsx": b"PK", "noext": 7, "notes.md": "x",
        "Thumbs.db": b"", "desktop.ini": b"", ".DS_Store": b"", "a/._1.png": b"", "__MACOSX/._0.png": b"",
        "a/metadata.jsonl": lines(("1.png", "one"), ("9.png", "nine")), "metadata.csv": "file_name,text\n0.png,zero\n",
        "captions.csv": "file_name,text\n0.png,other\n", "a/b/2.txt": "two", "a/b/7.txt": "seven", "0.json": '{"a": 1}',
    }  # fmt: skip
    write(tmp_path, files)
    found = load_images(tmp_path, RED)
    assert dict(zip(found.names, found.prompts, strict=True)) == {"0.png": "zero", "a/1.png": "one", "a/b/2.JPG": "two"}
    assert set(found.unmatched) == {"a/9.png", "a/b/7.txt"}
    assert set(found.caption_files) == {"a/metadata.jsonl", "metadata.csv", "a/b/2.txt", "0.json"}
    accounted = [*found.names, *found.skipped, *found.unmatched, *found.caption_files]
    assert len(accounted) == len(files) + 1  # a/9.png is an entry, not a file
    assert found.skipped["captions.csv"] == "captions are read from metadata.csv instead"
    assert found.skipped["y.heic"].startswith("of a type that Pillow does not decode here: .heic")
    assert found.skipped["3.png"] == "unreadable: an empty file"
    assert found.num_captions == 5
    text = "\n".join(found.summary())
    assert "skipped 3 unreadable: 3.png (an empty file)" in text
    assert "2 of 5 captions matched no image" in text


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


def test_the_reference_set_is_accounted_for(tmp_path):
    write(tmp_path, {f"{s}/{k}.png": 9 * k for s in "ab" for k in range(4)} | {"b/x.png": b""})
    result = evaluate_set(load_images(tmp_path / "a", RED), RED, reference=load_images(tmp_path / "b", RED))
    assert result.as_dict()["reference"]["skipped"] == {"x.png": "unreadable: an empty file"}
    write_page(result, tmp_path / "r.html")
    assert "Reference: skipped 1 unreadable: x.png" in (tmp_path / "r.html").read_text()


def test_scores_given_prompts_leave_images_without_caption_out(tmp_path):
    write(tmp_path, {f"{k}.png": 20 * k for k in range(12)})
    write(tmp_path, {"metadata.jsonl": lines(*((f"{k}.png", f"p{k % 2}") for k in range(10)))})
    embedder = ImageEmbedder(lambda x: x[:, :, 0, 0] + 0.1, 8, "rgb", (0, 0, 0), (1, 1, 1))
    images = load_images(tmp_path, embedder)
    result = evaluate_set(images, embedder)
    scores = {s.score: s for s in result.scores}
    assert scores["Vendi"].n == 12
    assert scores["Conditional-Vendi"].n == 10
    assert sorted(len(p.images) for p in result.prompts) == [5, 5]
    record = result.as_dict()
    assert record["without_caption"] == ["10.png", "11.png"] == images.without_caption
    write_page(result, tmp_path / "out" / "r.html")
    line = "2 of 12 images have no caption; scores given prompts leave them out: 10.png, 11.png"
    assert line in (tmp_path / "out" / "r.html").read_text()
    called = CliRunner().invoke(app, ["evaluate", str(tmp_path), "--out", str(tmp_path / "out" / "r.html")])
    assert line in called.stderr


def test_frames_beyond_the_first_are_mentioned(tmp_path):
    frames = [Image.new("RGB", (4, 4), c) for c in ("red", "blue")]
    for name in ("a.gif", "b.png", "c.tif", "d.webp"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
    write(tmp_path, {"e.png": 0})
    found = load_images(tmp_path, RED)
    assert found.first_frame_only == ["a.gif", "b.png", "c.tif", "d.webp"]
    assert min(reds(found)[:4]) > 250
    assert "4 animated or of several pages, first frame only: a.gif, b.png, c.tif, d.webp" in found.summary()


@pytest.mark.skipif(sys.platform != "linux", reason="other file systems refuse such names")
def test_names_that_cannot_be_printed_are_escaped(tmp_path):
    names = [b"a\xff.png", b"b\n.png", b"c\x1b[2J.png", "d\u202e.png".encode()]
    for name in names:
        (tmp_path / os.fsdecode(name)).write_bytes(encoded())
    found = load_images(tmp_path, RED)
    assert found.names == ["a\\udcff.png", "b\\n.png", "c\\x1b[2J.png", "d\\u202e.png"]
    write_page(evaluate_set(found, RED), tmp_path / "r.html")


@pytest.mark.parametrize("suffix", ["tar", "tar.gz", "tgz", "TAR", "tar.xz"])
def test_shards_of_any_naming_are_read_in_order(tmp_path, suffix):
    files = {
        "./b/0.v1.png": 10,
        "./b/0.v1.txt": "zero",
        "a.jpg": encoded(20, "JPEG"),
        "a.json": '{"caption": "a"}',
        "c.png": 30,
        "c.cls": "3",
        "._c.png": b"",
        "../../up.png": 40,
        "/etc/abs.png": 50,
        "pax\u00e9.png": 60,
    }
    mode = {"tar.gz": "w:gz", "tgz": "w:gz", "tar.xz": "w:xz"}.get(suffix, "w")
    write(tmp_path / "set", {f"data/s.{suffix}": tar_bytes(files, mode)})
    found = load_images(tmp_path / "set", RED)
    assert dict(zip(found.names, found.prompts, strict=True)) == {
        "b/0.v1.png": "zero", "a.jpg": "a", "c.png": None, "../../up.png": None, "/etc/abs.png": None, "pax\u00e9.png": None
    }  # fmt: skip
    assert found.skipped == {"c.cls": "not an image", "._c.png": "hidden or of the operating system"}
    assert set(found.caption_files) == {"b/0.v1.txt", "a.json"}
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [f"s.{suffix}"]


def test_several_images_of_one_sample(tmp_path):
    files = {
        "0.mask.png": 1,
        "0.png": 2,
        "0.txt": "a",
        "1.left.png": 3,
        "1.right.png": 4,
        "1.txt": "b",
        "2.jpg": encoded(5),
        "2.png": 6,
    }
    write(tmp_path, {"s.tar": tar_bytes(files)})
    found = load_images(tmp_path / "s.tar", RED)
    assert found.names == ["0.png", "1.left.png", "1.right.png", "2.jpg"]
    assert found.prompts == ["a", "b", "b", None]
    assert found.skipped == {
        "0.mask.png": "another image of the sample is read: 0.png", "2.png": "another image of the sample is read: 2.jpg"
    }  # fmt: skip


def test_names_that_come_again_are_other_samples(tmp_path):
    files = [("0.png", 1), ("0.txt", "a"), ("0.png", 2), ("0.txt", "b")]
    write(tmp_path, {"a.tar": tar_bytes(files), "b.tar": tar_bytes(files[:2])})
    found = load_images(tmp_path, RED)
    assert found.names == ["0.png", "a.tar/0.png", "b.tar/0.png"]
    assert (reds(found), found.prompts) == ([1, 2, 1], ["a", "b", "a"])


def test_captions_listed_in_a_shard_are_those_of_its_images(tmp_path):
    listed = {"0.png": 2, "metadata.jsonl": lines(("0.png", "b"), ("9.png", "c"))}
    write(tmp_path, {"a.tar": tar_bytes({"0.png": 1}), "b.tar": tar_bytes(listed), "c.tar": tar_bytes(listed)})
    found = load_images(tmp_path, RED)
    assert dict(zip(found.names, found.prompts, strict=True)) == {"0.png": None, "b.tar/0.png": "b", "c.tar/0.png": "b"}
    assert list(found.unmatched) == ["9.png", "c.tar/9.png"]


def test_captions_by_a_name_that_several_shards_have_are_ambiguous(tmp_path):
    write(tmp_path, {"a.tar": tar_bytes({"0.png": 1, "1.png": 2}), "b.tar": tar_bytes({"0.png": 3})})
    write(tmp_path, {"metadata.jsonl": lines(("0.png", "zero"), ("1.png", "one"))})
    found = load_images(tmp_path, RED)
    assert (found.names, found.prompts) == (["0.png", "1.png", "b.tar/0.png"], [None, "one", None])
    assert found.unmatched == {"0.png": "ambiguous: 0.png, b.tar/0.png"}
    write(tmp_path, {"metadata.jsonl": lines(("a.tar/0.png", "zero"), ("b.tar/0.png", "other"))})
    assert load_images(tmp_path, RED).prompts == ["zero", None, "other"]


def test_links_and_devices_in_a_shard(tmp_path):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        data = encoded(9)
        info = tarfile.TarInfo("a.png")
        info.size = len(data)
        tar.addfile(info, io.BytesIO(data))
        for name, kind, target in (
            ("hard.png", tarfile.LNKTYPE, "a.png"), ("outside.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("self.png", tarfile.SYMTYPE, "self.png"), ("pipe.png", tarfile.FIFOTYPE, ""),
        ):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    (tmp_path / "s.tar").write_bytes(out.getvalue())
    found = load_images(tmp_path / "s.tar", RED)
    assert (found.names, reds(found)) == (["a.png", "hard.png"], [9, 9])
    assert set(found.skipped) == {"outside.png", "self.png", "pipe.png"}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("keep", [0.97, 0.6, 0.3])
def test_a_shard_that_is_cut_off_is_read_up_to_there_and_named(tmp_path, compress, keep):
    noise = [os.urandom(3000) for _ in range(8)]
    data = tar_bytes({f"{k}.bmp": encoded(k, "BMP") + n for k, n in enumerate(noise)})
    data = gzip.compress(data) if compress else data[: data.rindex(noise[-1][-9:]) + 9]
    write(tmp_path, {"s.tar": data[: int(len(data) * keep)], "whole.tar": tar_bytes({"w.png": 7})})
    found = load_images(tmp_path, RED)
    assert found.names[-1] == "w.png"
    assert 1 < len(found) < 9
    assert found.skipped["s.tar"].startswith("unreadable: ")
    assert reds(found)[:-1] == list(range(len(found) - 1))


def test_a_shard_that_is_damaged_or_no_shard_is_named(tmp_path):
    good = tar_bytes({"0.png": 1, "1.png": 2})
    start = good.index(b"1.png")
    write(
        tmp_path,
        {
            "a.tar": good[:start] + os.urandom(512) + good[start + 512 :],
            "b.tar": b"",
            "c.tar": b"no tar at all",
            "d.tar": good + tar_bytes({"2.png": 3}),
            "e.tar": good,
            "f.tar.gz": gzip.compress(b"x")[:-4],
        },
    )
    found = load_images(tmp_path, RED)
    assert {"a.tar", "b.tar", "c.tar", "d.tar", "f.tar.gz"} <= set(found.skipped)
    assert len(found) == 5
    with pytest.raises(SourceError, match=r"no readable images.*skipped 1 unreadable: c\.tar \(not a tar archive"):
        load_images(tmp_path / "c.tar", RED)


def test_files_beside_shards_are_named(tmp_path):
    write(tmp_path, {"s.tar": tar_bytes({"0.png": 1}), "x.png": 2, "sub/t.tar": tar_bytes({"1.png": 3}), "notes.txt": "x"})
    found = load_images(tmp_path, RED)
    assert found.names == ["0.png", "1.png"]
    assert set(found.skipped) == {"x.png", "notes.txt"}
    write(tmp_path / "images", {"x.png": 2, "backup/t.tar": tar_bytes({"1.png": 3})})
    assert load_images(tmp_path / "images", RED).skipped == {"backup/t.tar": "not an image"}


def table(path, columns):
    pa = pytest.importorskip("pyarrow")
    path.parent.mkdir(parents=True, exist_ok=True)
    pytest.importorskip("pyarrow.parquet").write_table(pa.table(columns), path)


def cells(*values):
    pa = pytest.importorskip("pyarrow")
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([v if isinstance(v, dict | None) else {"bytes": encoded(v), "path": f"{v}.png"} for v in values], kind)


def test_tables_prefer_the_column_image_and_say_so(tmp_path):
    table(tmp_path / "t.parquet", {"mask": cells(1, 2), "image": cells(3, 4), "text": ["a", None]})
    found = load_images(tmp_path / "t.parquet", RED)
    assert (reds(found), found.prompts) == ([3, 4], ["a", None])
    assert found.notes == ["images are read from column 'image', not from mask"]
    table(tmp_path / "u.parquet", {"jpg": [encoded(5), encoded(6)], "caption": [["a", "b"], None]})
    found = load_images(tmp_path / "u.parquet", RED)
    assert (found.names, reds(found), found.prompts) == (["row 0", "row 1"], [5, 6], ["a", None])


def test_tables_with_two_columns_of_the_same_name_are_skipped(tmp_path):
    pa = pytest.importorskip("pyarrow")
    both = pa.Table.from_arrays([cells(1), cells(2)], names=["image", "image"])
    pytest.importorskip("pyarrow.parquet").write_table(both, tmp_path / "t.parquet")
    with pytest.raises(SourceError, match="a table with several columns named image"):
        load_images(tmp_path / "t.parquet", RED)


def test_tables_of_the_hub_and_of_different_columns_are_read(tmp_path):
    table(tmp_path / "data" / "train-00000-of-00002.parquet", {"image": cells(1, 2), "text": ["a", "b"]})
    table(tmp_path / "data" / "train-00001-of-00002.parquet", {"image": cells(1)})
    table(tmp_path / "data" / "test.parquet", {"label": [1]})
    write(tmp_path, {"README.md": "x", "data/broken.parquet": b"PAR1", "data/empty.parquet": b""})
    found = load_images(tmp_path, RED)
    assert (reds(found), found.prompts) == ([1, 2, 1], ["a", "b", None])
    assert len(set(found.names)) == 3
    assert set(found.skipped) == {"README.md", "data/test.parquet", "data/broken.parquet", "data/empty.parquet"}
    table(tmp_path / "none.parquet", {"image": cells()})
    with pytest.raises(SourceError, match="a table without rows"):
        load_images(tmp_path / "none.parquet", RED)


def test_tables_of_paths_read_local_files_only(tmp_path):
    write(tmp_path, {"x.png": 7, "sub/y.png": 8})
    at = lambda path: {"bytes": None, "path": path}  # noqa: E731
    rows = [
        at(str(tmp_path / "x.png")),
        at("sub/y.png"),
        at("nowhere.png"),
        at("https://example.com/a.png"),
        at(None),
        None,
        at("a\0b"),
    ]
    table(tmp_path / "t.parquet", {"image": cells(*rows, {"bytes": b"", "path": "x.png"})})
    found = load_images(tmp_path / "t.parquet", RED)
    assert reds(found) == [7, 8]
    assert len(found.skipped) == 6
    assert "URLs are not followed" in found.skipped["https://example.com/a.png"]
    table(tmp_path / "u.parquet", {"image_path": ["x.png", "sub/y.png"], "prompt": ["a", "b"]})
    assert list(prompts(tmp_path / "u.parquet").values()) == ["a", "b"]
    (tmp_path / "t.parquet").unlink()
    write(tmp_path, {"z.png": 9})
    found = load_images(tmp_path, RED)
    assert found.names == ["x.png", "sub/y.png"]
    assert set(found.skipped) == {"z.png"}  # the files of the table are read


def test_linked_files_of_a_hub_cache_are_read(tmp_path):
    write(tmp_path, {"blobs/abc": 5})
    (tmp_path / "snapshot").mkdir()
    (tmp_path / "snapshot" / "0.png").symlink_to(tmp_path / "blobs" / "abc")
    assert reds(load_images(tmp_path / "snapshot", RED)) == [5]


def test_images_are_embedded_in_batches_of_small_tensors(tmp_path, monkeypatch):
    monkeypatch.setattr("kspec_guidance.evaluation.image_sets.BATCH_SIZE", 4)
    sizes = []
    embedder = ImageEmbedder(lambda x: sizes.append(tuple(x.shape)) or x[:, :1, 0, 0], 8, "red", (0, 0, 0), (1, 1, 1))
    write(tmp_path, {f"{k}.png": 10 * k for k in range(10)})
    assert reds(load_images(tmp_path, embedder)) == [10 * k for k in range(10)]
    assert sizes == [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]


def test_normal_forms_of_names_are_those_of_unicode(tmp_path):
    name = unicodedata.normalize("NFD", "d\u1ea1\u0323\u00e9")
    write(tmp_path, {f"{name}.png": 0, "metadata.jsonl": lines((unicodedata.normalize("NFC", name) + ".png", "a"))})
    assert list(prompts(tmp_path).values()) == ["a"]


READERS = {
    "set": lambda path: load_images(path, RED),
    "shard": lambda path: load_images(path / "s" / "0.tar", RED),
    "table": lambda path: load_images(path / "t" / "0.parquet", RED),
    "files": lambda path: embed_files(sorted(path.glob("*.png")), RED),
    "reference": lambda path: encode_reference(tiny.build("StableDiffusionPipeline"), path, size=16),
}


@pytest.mark.filterwarnings("ignore:not read from")
@pytest.mark.parametrize("reader", READERS)
def test_images_of_full_size_are_held_one_at_a_time(reader, tmp_path, monkeypatch):
    """Else a folder of photographs takes as much memory as all of them decoded."""
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    files = {f"{k}.png": encoded(k) for k in range(40)}
    (tmp_path / "t").mkdir()
    parquet.write_table(pyarrow.table({"image": list(files.values())}), tmp_path / "t" / "0.parquet")
    write(tmp_path, files | {"s/0.tar": tar_bytes(files)})
    seen, alive = [], []
    to_rgb = images_module.to_rgb

    def counted(image):
        found = to_rgb(image).copy()
        seen.append(weakref.ref(found))
        alive.append(sum(image() is not None for image in seen))
        return found

    monkeypatch.setattr(images_module, "to_rgb", counted)
    with torch.no_grad():
        READERS[reader](tmp_path)
    assert len(alive) >= 40
    assert max(alive) <= 3  # the image, the one before, and a copy
