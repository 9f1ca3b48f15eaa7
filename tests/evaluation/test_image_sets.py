"""Image sets as people have them: every file and caption is read, or named with the reason."""

import os
import sys
import unicodedata
import weakref

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from kspec_guidance import encode_reference
from kspec_guidance.cli import app
from kspec_guidance.evaluation.embedders import ImageEmbedder, embed_files
from kspec_guidance.evaluation.image_sets import folder_captions, load_images
from kspec_guidance.evaluation.page import write_page
from kspec_guidance.evaluation.sets import evaluate_set
from kspec_guidance.utils import images as images_module
from kspec_guidance.utils.images import SourceError, read_folder
from tests import tiny
from tests.evaluation.files import RED, encoded, lines, prompts, reds, tar_bytes, write


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


def test_captions_of_a_folder_are_in_the_order_in_which_its_images_are_read(tmp_path):
    (tmp_path / "sub").mkdir()
    shades = {"b.png": 10, "a.png": 20, "sub/c.png": 30, "a.jpg": 40}
    for name, shade in shades.items():
        Image.new("RGB", (8, 8), (shade,) * 3).save(tmp_path / name)
    listed = [("b.png", "10"), ("a.png", "20"), ("sub/c.png", "30"), ("a.jpg", "40")]
    (tmp_path / "metadata.jsonl").write_text("\n".join(f'{{"file_name": "{n}", "text": "{t}"}}' for n, t in listed))
    captions = folder_captions(tmp_path)
    shown = [image.getpixel((0, 0))[0] for image in read_folder(tmp_path)]
    assert [abs(int(c) - s) <= 1 for c, s in zip(captions, shown, strict=True)] == [True] * 4


def test_texts_beside_the_images_of_a_folder_are_captions(tmp_path):
    for k, text in enumerate(("a red square", "a green one")):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_text(text + "\n")
    assert folder_captions(tmp_path) == ["a red square", "a green one"]
    (tmp_path / "1.txt").unlink()
    with pytest.raises(SourceError, match=r"1 of the 2 in .* has one: put metadata.jsonl .* without a caption: 1.png$"):
        folder_captions(tmp_path)
    (tmp_path / "other.txt").write_text("a blue one")
    with pytest.raises(SourceError, match=r"without a caption: 1.png; captions of no image: other.txt \(no such image\)"):
        folder_captions(tmp_path)
    (tmp_path / "0.txt").unlink()
    with pytest.raises(SourceError, match="none of the 2"):
        folder_captions(tmp_path)


def test_captions_of_a_folder_need_a_folder_of_images(tmp_path):
    with pytest.raises(SourceError, match="contains no images"):
        folder_captions(tmp_path)
    with pytest.raises(SourceError, match="is not a folder of images"):
        folder_captions(tmp_path / "none")
