"""Damaged and lost files, full disks, folders in use, and what force=True does."""

import json
import os
import time
from pathlib import Path

import pytest

from kspec_guidance.memory.io import read_tensors, write_tensors
from kspec_guidance.synthesis import CheckpointError, FolderError, SynthesisError
from kspec_guidance.synthesis.publication import file_digest
from kspec_guidance.synthesis.store import Store
from tests.processes import FORKS
from tests.synthesis.small_runs import contents, make, rows_of


def test_damaged_settings_are_reported_and_force_continues(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"])
    (tmp_path / ".kspec" / "epoch-000" / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings.json is damaged"):
        make(tmp_path, pipe, ["heart"])
    assert make(tmp_path, pipe, ["heart"], force=True).images == 5


def hold(folder, held):
    store = Store(folder)  # which is locked as long as it is there
    store.lock()
    held.set()
    time.sleep(300)


@pytest.mark.slow
def test_two_runs_in_one_folder_are_refused(tmp_path, pipe):
    held = FORKS.Event()
    holder = FORKS.Process(target=hold, args=(tmp_path, held))
    holder.start()
    assert held.wait(300)
    with pytest.raises(SynthesisError, match="another run is writing"):
        make(tmp_path, pipe, images_per_prompt=1)
    holder.kill()
    holder.join()
    assert make(tmp_path, pipe, images_per_prompt=1).images == 5


def test_a_damaged_record_is_reported_and_force_makes_its_images_again(tmp_path, pipe):
    make(tmp_path, pipe)
    whole = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    record = tmp_path / ".kspec" / "epoch-000" / "rank-0000" / "000002.safetensors"
    data = bytearray(record.read_bytes())
    data[-5] ^= 1
    record.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"000002.safetensors was altered.*--force"):
        make(tmp_path, pipe)
    result = make(tmp_path, pipe, force=True)
    assert result.images == 25
    assert 1 <= result.made <= 3
    repaired = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert len(repaired) == 25
    assert sum(repaired.get(name) == data for name, data in whole.items()) >= 22
    assert make(tmp_path, pipe).made == 0


def test_missing_images_are_reported_and_force_makes_as_many(tmp_path, pipe):
    make(tmp_path, pipe)
    (tmp_path / "0000" / "000001-0002.png").unlink()
    with pytest.raises(CheckpointError, match=r"1 finished images are missing.*000001-0002"):
        make(tmp_path, pipe)
    assert make(tmp_path, pipe, force=True).images == 25
    assert len(list(tmp_path.rglob("*.png"))) == 25


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pipe):
    """Contents of a set that nothing interrupted."""
    out = tmp_path_factory.mktemp("whole")
    make(out, pipe)
    return contents(out)


@pytest.mark.slow
@pytest.mark.parametrize("batches", [1, 4, 8, 15])
def test_a_full_disk_loses_nothing(tmp_path, pipe, monkeypatch, whole, batches):
    fsync, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 3 * batches:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SynthesisError, match=r"no space left.*finished images are safe"):
            make(tmp_path / "cut", pipe)
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    make(tmp_path / "cut", pipe)
    assert contents(tmp_path / "cut") == whole


def test_unusable_folders_are_refused(tmp_path, pipe):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SynthesisError, match="cannot write to"):
        make(tmp_path / "file" / "set", pipe)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.jsonl").write_text("{}")
    with pytest.raises(SynthesisError, match="that no run of this program wrote"):
        make(tmp_path / "other", pipe)
    (tmp_path / "pictures" / "0000").mkdir(parents=True)
    (tmp_path / "pictures" / "0000" / "000123-0001.png").write_bytes(b"mine")
    with pytest.raises(SynthesisError, match=r"holds a 0000.000123-0001.png that no run of this program wrote"):
        make(tmp_path / "pictures", pipe)
    assert (tmp_path / "pictures" / "0000" / "000123-0001.png").exists()
    for folder in (tmp_path / ("x" * 300), Path("/proc/set")):
        with pytest.raises(SynthesisError, match="cannot write to"):
            make(folder, pipe)


def test_files_of_others_in_the_folder_of_a_run_are_left_alone(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"], 1, call={"num_inference_steps": 1})
    mine = tmp_path / "20240101-1234.png"  # a name as the run gives, but not in a folder of the run
    mine.write_bytes(b"mine")
    make(tmp_path, pipe, ["heart"], 1, call={"num_inference_steps": 1})
    assert mine.exists()


def forged(path, **changes):
    """The record of a file with other values, and a valid checksum."""
    tensors, about = read_tensors(path, "batch")
    about["rows"][0] |= changes.pop("row", {})
    tensors = {name: t[:-1] for name, t in tensors.items()} if changes.pop("shorter", False) else tensors
    write_tensors(path, "batch", tensors, {k: v for k, v in (about | changes).items() if v is not None})


@pytest.mark.parametrize(
    "changes",
    [{"rows": None}, {"rejected": None}, {"rows": 3}, {"row": {"file_name": "../../precious.png"}}, {"shorter": True},
     {"row": {"prompt": 3}}, {"row": {"file_name": "0000/000000-0001.png"}}, {"row": {"attempt": "0"}}],
)  # fmt: skip
def test_forged_records_are_refused_and_force_makes_their_images_again(tmp_path, pipe, changes):
    settings = {"images_per_prompt": 2, "batch_size": 2, "call": {"num_inference_steps": 1}}
    (tmp_path / "precious.png").write_bytes(b"mine")
    make(tmp_path / "set", pipe, ["heart"], **settings)
    forged(tmp_path / "set" / ".kspec" / "epoch-000" / "rank-0000" / "000000.safetensors", **changes)
    with pytest.raises(CheckpointError, match=r"000000.safetensors is no record of a batch .*--force"):
        make(tmp_path / "set", pipe, ["heart"], **settings)
    assert make(tmp_path / "set", pipe, ["heart"], **settings, force=True).images == 2
    assert (tmp_path / "precious.png").exists()


# -- folders that an earlier version began -------------------------------------------------------------------------------

SINCE = ("model", "revision", "pipeline", "scheduler", "steps", "guidance_scale", "guide_digest", "licence", "versions",
         "marks", "sha256")  # fmt: skip


def begun_earlier(out, pipe, **settings):
    """A folder as the version before provenance left it in the middle of a run: three batches, without those columns."""

    def stop(now):
        if now.done >= 6:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(out, pipe, prompts=["heart", "runner"], images_per_prompt=4, progress_callback=stop, **settings)
    for path in sorted(out.glob(".kspec/epoch-000/rank-0000/*")):
        tensors, about = read_tensors(path, "batch")
        about["rows"] = [{k: v for k, v in row.items() if k not in SINCE} for row in about["rows"]]
        about.pop("time")
        write_tensors(path, "batch", tensors, about)
    path = out / ".kspec" / "epoch-000" / "settings.json"
    assert "marks" not in json.loads(path.read_text())  # as then


def test_a_folder_that_an_earlier_version_began_is_finished(tmp_path, pipe):
    out = tmp_path / "set"
    begun_earlier(out, pipe)
    result = make(out, pipe, prompts=["heart", "runner"], images_per_prompt=4)
    assert (result.images, result.made) == (8, 2)
    rows = rows_of(out)
    assert ["model" in row for row in rows] == [False] * 6 + [True] * 2
    text = (out / "README.md").read_text()
    assert "6 images carry no mark in the file" in text
    assert "No licence was given for all of the images." in text
    sums = dict(reversed(line.split("  ")) for line in (out / "SHA256SUMS").read_text().splitlines())
    assert all(sums[row["file_name"]] == file_digest(out / row["file_name"]) for row in rows)
    times = [json.loads(line)["time"] for line in (out / "times.jsonl").read_text().splitlines()]
    assert times[:6] == [None] * 6


def test_shards_that_an_earlier_version_began_are_finished_with_a_warning_or_refused(tmp_path, pipe):
    begun_earlier(tmp_path / "tar", pipe, format="webdataset", shard_size=3)
    with pytest.warns(UserWarning, match="begun by an earlier version.*needs features="):
        result = make(
            tmp_path / "tar", pipe, prompts=["heart", "runner"], images_per_prompt=4, format="webdataset", shard_size=3
        )
    assert result.images == 8
    begun_earlier(tmp_path / "tables", pipe, format="parquet", shard_size=3)
    with pytest.raises(FolderError, match="finish it with that version, or choose another folder"):
        make(tmp_path / "tables", pipe, prompts=["heart", "runner"], images_per_prompt=4, format="parquet", shard_size=3)
