"""Shards, tables and caches of the hub: every file is read, or named with the reason."""

import gzip
import io
import os
import tarfile

import pytest

from kspec_guidance.evaluation.image_sets import SourceError, load_images
from tests.evaluation.files import RED, cells, encoded, lines, prompts, reds, table, tar_bytes, write


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
