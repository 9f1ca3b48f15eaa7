"""What goes wrong in a synthesis: changed settings, damage, full disks, other runs; and what --force does."""

import subprocess
import sys

import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.synthesis import CheckpointError, SettingsChangedError, SynthesisError
from tests.synthesis.small_runs import CALL, contents, make, rows_of

# -- what goes wrong -----------------------------------------------------------------------------------------------------


def test_changed_settings_are_shown_and_refused_and_force_goes_on(tmp_path, pipe):
    make(tmp_path, pipe, ["heart", "man"], images=3)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*.png")}
    with pytest.raises(SettingsChangedError) as error:
        make(tmp_path, pipe, ["heart", "man"], images=5, guide=SPARKE(0.3), call={**CALL, "num_inference_steps": 4})
    text = str(error.value)
    for words in ("6 images", "images: 3 before, now 5", "num_inference_steps: 3 before, now 4", "--force"):
        assert words in text
    assert any("scale" in d or "terms" in d for d in error.value.differences)
    result = make(tmp_path, pipe, ["man", "runner", "heart"], images=5, guide=SPARKE(0.3), force=True)
    assert (result.images, result.made) == (15, 9)
    rows = rows_of(tmp_path)
    assert len({r["file_name"] for r in rows}) == 15
    assert {p: sum(r["prompt"] == p for r in rows) for p in ("man", "runner", "heart")} == {
        "man": 5,
        "runner": 5,
        "heart": 5,
    }
    assert all(p.read_bytes() == data for p, data in before.items())
    assert sorted({r["scale"] for r in rows}) == [0.3, 1.0]
    assert make(tmp_path, pipe, ["man", "runner", "heart"], images=5, guide=SPARKE(0.3)).made == 0


def test_forcing_on_with_another_space_or_other_features_counts_the_old_images_and_forgets_their_rows(tmp_path, pipe):
    from kspec_guidance.evaluation.embedders import ImageEmbedder

    make(tmp_path, pipe, ["heart", "man"], images=3)
    result = make(tmp_path, pipe, ["heart", "man"], images=5, guide=SPARKE(space="pooled"), force=True)
    assert (result.images, result.made) == (10, 4)
    pixels = ImageEmbedder(torch.nn.Flatten(), 8, "pixels")
    result = make(tmp_path, pipe, ["heart", "man"], images=9, embedder=pixels, duplicates=1.0, force=True)
    assert (result.images, result.made) == (18, 8)
    assert len({row["file_name"] for row in rows_of(tmp_path)}) == 18
    assert make(tmp_path, pipe, ["heart", "man"], images=9, embedder=pixels, duplicates=1.0).made == 0


def test_a_run_of_one_process_keeps_nothing_for_others(tmp_path, pipe, monkeypatch):
    from kspec_guidance.synthesis.worker import Worker

    seen, real = [], Worker.run
    monkeypatch.setattr(Worker, "run", lambda self: (real(self), seen.append(self)))
    make(tmp_path, pipe, images=3)
    assert seen[0].fresh == []
    assert not any(job.features for job in seen[0].jobs)


def test_damaged_settings_are_named_and_force_goes_on(tmp_path, pipe):
    make(tmp_path, pipe, ["heart"])
    (tmp_path / ".kspec" / "epoch-000" / "settings.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"settings.json is damaged"):
        make(tmp_path, pipe, ["heart"])
    assert make(tmp_path, pipe, ["heart"], force=True).images == 5


def test_two_runs_in_one_folder_are_refused(tmp_path, pipe):
    code = (
        "import sys; from pathlib import Path; from kspec_guidance.synthesis.records import Store\n"
        "store = Store(Path(sys.argv[1])); store.lock(); print('locked', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"locked\n"
    with pytest.raises(SynthesisError, match="another run is writing"):
        make(tmp_path, pipe, images=1)
    holder.kill()
    holder.wait()
    assert make(tmp_path, pipe, images=1).images == 5


def test_a_damaged_record_is_named_and_force_makes_its_images_again(tmp_path, pipe):
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
    now = {p.relative_to(tmp_path): p.read_bytes() for p in tmp_path.rglob("*.png")}
    assert len(now) == 25
    assert sum(now.get(name) == data for name, data in whole.items()) >= 22
    assert make(tmp_path, pipe).made == 0


def test_missing_images_are_named_and_force_makes_as_many(tmp_path, pipe):
    make(tmp_path, pipe)
    (tmp_path / "0000" / "000001-0002.png").unlink()
    with pytest.raises(CheckpointError, match=r"1 finished images are gone.*000001-0002"):
        make(tmp_path, pipe)
    assert make(tmp_path, pipe, force=True).images == 25
    assert len(list(tmp_path.rglob("*.png"))) == 25


@pytest.mark.parametrize("fails", [1, 4, 8, 15])
def test_a_full_disk_loses_nothing(tmp_path, pipe, monkeypatch, fails):
    import os

    make(tmp_path / "whole", pipe)
    real, calls = os.fsync, 0

    def full(handle):
        nonlocal calls
        calls += 1
        if calls > 3 * fails:
            raise OSError(28, "No space left on device")
        real(handle)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(SynthesisError, match=r"no space left.*finished images are safe"):
            make(tmp_path / "cut", pipe)
    assert not list((tmp_path / "cut").rglob("*.tmp"))
    make(tmp_path / "cut", pipe)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")


def test_folders_that_cannot_be_used_are_refused(tmp_path, pipe):
    (tmp_path / "file").write_text("x")
    with pytest.raises(SynthesisError, match="cannot write to"):
        make(tmp_path / "file" / "set", pipe)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "metadata.jsonl").write_text("{}")
    with pytest.raises(SynthesisError, match="that no run of this program wrote"):
        make(tmp_path / "other", pipe)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"images": -1}, "images must be a whole number"),
        ({"batch": 0}, "batch must be"),
        ({"format": "zip"}, "format must be one of imagefolder, webdataset, parquet"),
        ({"memory": "all"}, "memory must be one of auto"),
        ({"memory_by": "mood"}, "memory_by must be"),
        ({"duplicates": 3}, "cosine in"),
        ({"target": "much"}, "cannot read the target"),
        ({"quotas": {"x": 3}}, "no prompt has group x"),
        ({"call": {"steps": 3}}, "does not take steps"),
        ({"prompts": []}, "no prompts"),
    ],
)
def test_settings_that_cannot_work_are_refused_before_anything_is_written(tmp_path, pipe, settings, words):
    with pytest.raises(SynthesisError, match=words):
        make(tmp_path / "set", pipe, **settings)
    assert not (tmp_path / "set").exists()
