"""Sets that workers with leases make, from the arguments to the files."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from kspec_guidance import SPARKE
from kspec_guidance.memory.io import encode_tensors
from kspec_guidance.synthesis import (
    Arm,
    CheckpointError,
    RunFailedError,
    SettingsChangedError,
    SynthesisError,
    reproduce,
)  # fmt: skip
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import UnitLog
from tests.cli.commands import call
from tests.synthesis.small_runs import rows_of
from tests.synthesis.small_workers import PROMPTS, make, without_model

ROOT = Path(__file__).parents[2]


@pytest.fixture
def fast(monkeypatch):
    without_model(monkeypatch)


def check_set(out, images=35):
    rows = rows_of(out)
    names = [row["file_name"] for row in rows]
    assert names == sorted(set(names))
    assert len(names) == images
    assert sorted(path.relative_to(out).as_posix() for path in out.rglob("*.png")) == names
    if (out / "SHA256SUMS").exists():
        done = subprocess.run(["sha256sum", "-c", "--quiet", "SHA256SUMS"], cwd=out, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout
    return rows


@pytest.mark.usefixtures("fast")
def test_a_set_has_all_that_others_have(tmp_path, pipe):
    result = make(tmp_path / "set", pipe)
    assert (result.images, result.made, result.total_made) == (35, 35, 35)
    assert result.stopped == {"all images made": 5}
    rows = check_set(tmp_path / "set")
    assert set(rows[0]) >= {"model", "scheduler", "steps", "guidance_scale", "licence"}
    with Image.open(tmp_path / "set" / rows[0]["file_name"]) as image:
        assert "trainedAlgorithmicMedia" in image.text["XML:com.adobe.xmp"]
    for name in ("README.md", "croissant.json", "reproduce.yaml", "times.jsonl", "summary.json"):
        assert (tmp_path / "set" / name).is_file()
    assert not (tmp_path / "set" / ".kspec" / "epoch-000" / "images").exists()
    again = make(tmp_path / "set", pipe)
    assert (again.images, again.made) == (35, 0)


@pytest.mark.usefixtures("fast")
def test_a_set_whose_units_read_nothing_is_made_again(tmp_path, pipe):
    make(tmp_path / "set", pipe, prompts=["heart", "cat face"])
    assert not (tmp_path / "set" / "units.jsonl").exists()
    result = reproduce(tmp_path / "set" / "reproduce.yaml", tmp_path / "again", pipe, report=False)
    assert result.reproduced == {"same bytes": 14, "same pixels": 0, "different": 0}


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("fault", ["lost", "changed"])
def test_a_last_record_that_was_lost_or_changed_is_named(tmp_path, pipe, fault):
    run = {"join": tmp_path / "run", "workers": None}
    make(None, pipe, **run)
    path = tmp_path / "run" / "rank-0001" / "000004.safetensors"
    record = UnitLog(Storage(tmp_path / "run")).read(1, 4)
    path.unlink()
    if fault == "changed":
        record.rows.pop()
        record.tensors["x"] = record.tensors["x"][:-1]
        path.write_bytes(encode_tensors("batch", record.tensors, record.description()))
    with pytest.raises(CheckpointError, match="rank-0001 are not those with which the unit was finished"):
        make(tmp_path / "set", pipe, **run)
    path.unlink(missing_ok=True)
    (tmp_path / "run" / "done" / "000001").unlink()
    assert make(tmp_path / "set", pipe, **run).images == 35


@pytest.mark.usefixtures("fast")
def test_a_run_that_ended_in_the_middle_goes_on(tmp_path, pipe):
    calls = []

    def stop(now):
        calls.append(now)
        if len(calls) == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "set", pipe, progress_callback=stop)
    assert [now.done for now in calls] == [3, 6, 9, 12, 14]
    assert calls[-1].total == 35
    result = make(tmp_path / "set", pipe)
    assert result.made == 35 - 14
    check_set(tmp_path / "set")


@pytest.mark.usefixtures("fast")
@pytest.mark.parametrize("format", ["webdataset", "parquet"])
def test_shards_hold_the_images_of_all_units(tmp_path, pipe, format):
    pytest.importorskip("webdataset")
    datasets = pytest.importorskip("datasets")
    out = tmp_path / "set"
    make(out, pipe, format=format, shard_size=10)
    suffix = {"webdataset": "tar", "parquet": "parquet"}[format]
    assert len(list(out.glob("shard-*"))) == 4  # of 10, 10, 10 and 5
    assert not list(out.rglob("*.png"))
    kind = format if format == "webdataset" else "parquet"
    found = datasets.load_dataset(
        kind, data_files=str(out / f"*.{suffix}"), split="train", cache_dir=str(tmp_path / "cache")
    )  # fmt: skip
    assert len(found) == 35
    assert make(out, pipe, format=format, shard_size=10).images == 35
    result = make(out, pipe, format=format, shard_size=10, images_per_prompt=8, force=True)
    assert (result.images, result.made) == (40, 5)
    assert len(list(out.glob("shard-*"))) == 5


@pytest.mark.usefixtures("fast")
def test_other_settings_begin_a_new_part_with_force_also_from_and_to_runs_in_step(tmp_path, pipe):
    out = tmp_path / "set"

    def stop(now):
        if now.done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # images are left on the storage
        make(out, pipe, progress_callback=stop)
    with pytest.raises(SettingsChangedError, match="number of processes: leases before, now 1"):
        make(out, pipe, workers=None)
    result = make(out, pipe, workers=None, images_per_prompt=8, force=True)
    assert (result.images, result.made) == (40, 31)
    result = make(out, pipe, images_per_prompt=9, force=True)
    assert (result.images, result.made) == (45, 5)
    check_set(out, 45)
    assert Store(out).epochs() == [0, 1, 2]
    assert not list(out.rglob("images"))
    (out / rows_of(out)[3]["file_name"]).unlink()
    with pytest.raises(CheckpointError, match="missing"):
        make(out, pipe, images_per_prompt=9)
    assert make(out, pipe, images_per_prompt=9, force=True).made == 1


@pytest.mark.usefixtures("fast")
def test_what_differs_between_workers_is_named(tmp_path, pipe, monkeypatch):
    run = tmp_path / "run"
    join = {"join": run, "workers": None}
    make(None, pipe, **join)
    with pytest.raises(SettingsChangedError, match="digest of all prompts"):
        make(None, pipe, prompts=[*PROMPTS[:-1], "dog face"], **join)
    with pytest.raises(SettingsChangedError, match="seed: 0 before, now 1"):
        make(None, pipe, seed=1, **join)
    with pytest.raises(SettingsChangedError, match="lease_seconds"):
        make(None, pipe, lease_seconds=3, **join)
    versions = dict.fromkeys(("kspec-guidance", "torch", "diffusers", "transformers"), "9.9") | {"python": "3.99"}
    with monkeypatch.context() as patch:
        patch.setattr("kspec_guidance.synthesis.run.package_versions", lambda: versions)
        with pytest.raises(SettingsChangedError, match=r"versions\.kspec-guidance") as error:
            make(None, pipe, **join)
        assert "python" not in str(error.value)
    for part in (pipe.vae, pipe.unet):
        weight = next(p for p in part.parameters() if p.ndim > 1)
        kept = weight.detach().clone()
        try:
            weight.data.add_(torch.randn_like(weight))
            with pytest.raises(SettingsChangedError, match="networks"):
                make(None, pipe, **join)
        finally:
            weight.data.copy_(kept)
    assert make(None, pipe, **join).made == 0


@pytest.mark.usefixtures("fast")
def test_workers_join_on_an_object_store_and_the_last_makes_the_set(tmp_path, pipe, bucket):
    place, seen = f"{bucket}-{time.monotonic_ns()}", []

    def stop(now):
        seen.append(now.done)
        if now.done >= 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(None, pipe, join=place, workers=None, progress_callback=stop)
    result = make(tmp_path / "set", pipe, join=place, workers=None)
    assert (result.images, result.made) == (35, 35 - seen[-1])
    check_set(tmp_path / "set")
    make(tmp_path / "other", pipe, join=place, workers=None)  # and any other that comes later
    assert (tmp_path / "other" / "SHA256SUMS").read_text() == (tmp_path / "set" / "SHA256SUMS").read_text()


@pytest.mark.usefixtures("fast")
def test_images_that_were_replaced_on_the_storage_are_found(tmp_path, pipe):
    make(None, pipe, join=tmp_path / "run", workers=None)
    first, second, *_ = sorted((tmp_path / "run" / "images").iterdir())
    shutil.copy(second, first)
    with pytest.raises(CheckpointError, match="is not the one that its record names"):
        make(tmp_path / "set", pipe, join=tmp_path / "run", workers=None)
    first.unlink()
    with pytest.raises(CheckpointError, match="missing"):
        make(tmp_path / "other", pipe, join=tmp_path / "run", workers=None)


def one_of_two(image, row):
    return row["attempt"] % 2 == 0 or "odd"


@pytest.mark.usefixtures("fast")
def test_filters_candidates_targets_arms_and_own_memories(tmp_path, pipe):
    result = make(tmp_path / "filter", pipe, filter=one_of_two, duplicates=0.9999)
    assert result.images == 35
    assert result.rejected["odd"] >= 30
    result = make(tmp_path / "candidates", pipe, candidates=3)
    assert (result.images, result.rejected) == (35, {"another candidate was kept": 70})
    arms = [Arm("low", {"guidance_scale": 1.0}, cost=1), Arm("high", {"guidance_scale": 7.0}, cost=1)]
    for select, more in (("mixture-greedy", {}), ("pak-ucb", {"filter": one_of_two})):
        result = make(tmp_path / select, pipe, arms=arms, select=select, **more)
        assert result.images == 35
        assert sum(arm["images"] for arm in result.arms.values()) == 35
        assert make(tmp_path / select, pipe, arms=arms, select=select, **more).made == 0
    result = make(tmp_path / "target", pipe, target="vendi>=1.5", images_per_prompt=12)
    assert sum(result.stopped.values()) == 5
    assert result.images < 60
    guide = SPARKE()
    guide.memory.add(torch.randn(2, 4, 8, 8))
    with pytest.raises(SynthesisError, match="2 entries"):
        make(tmp_path / "entries", pipe, guide=guide)


def test_a_guide_with_a_target_by_the_pipeline_itself(tmp_path, pipe):
    result = make(tmp_path / "raised", pipe, ["heart"], guide=SPARKE(target="3 of 4"), images_per_prompt=4)
    assert (result.images, sum(result.targets.values())) == (4, 1)


def test_arguments_that_do_not_fit(tmp_path, pipe):
    for changes, message in (
        ({"workers": 0}, "workers must be an integer of at least 1"),
        ({"engine": "dask"}, "engine must be one of processes, ray"),
        ({"engine": "ray", "workers": None}, "give their number"),
        ({"lease_seconds": 0}, "lease_seconds must be a positive number"),
        ({"lease_seconds": float("nan")}, "lease_seconds must be a positive number"),
        ({"join": tmp_path}, "give one of them"),
        ({"join": tmp_path, "workers": None, "force": True}, "force and drop"),
        ({"workers": 2, "filter": lambda image, row: True}, "it lacks filter"),
        ({"out": None}, "out is the folder of the set"),
        ({"out": None, "workers": None}, "out is the folder of the set"),
        ({"join": "hf://datasets/a/b", "workers": None}, "creates a file only if there is none"),
    ):
        with pytest.raises(SynthesisError, match=message):
            make(**{"out": tmp_path / "set", "pipe": pipe} | changes)


# -- real processes ------------------------------------------------------------------------------------------------------


OPTIONS = ["--images", "6", "--batch-size", "3", "--steps", "3", "--licence", "CC0-1.0", "--no-report", "--workers", "2"]
COMMAND = ["generate", "heart", "runner", "cat face", *OPTIONS]


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_workers_of_the_command_line_of_which_one_is_killed(tmp_path):
    out, killed = tmp_path / "set", []

    def kill():
        end, leases = time.monotonic() + 300, out / ".kspec" / "epoch-000" / "leases"
        while time.monotonic() < end and not list(leases.glob("0*")):
            time.sleep(0.05)
        owner = json.loads(min(leases.glob("0*")).read_text())["worker"]
        killed.append(int(owner.rsplit("-", 2)[1]))
        os.kill(killed[0], signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    done = call(*COMMAND, "--lease-seconds", "2", "--out", out)
    killer.join()
    assert done.exit_code == 0, done.output[-3000:]
    assert killed
    assert killed != [os.getpid()]
    check_set(out, 18)


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_all_workers_fail(tmp_path, pipe):
    with (
        pytest.warns(UserWarning, match="1 of 4"),
        pytest.raises(RunFailedError, match=r"all 4 workers ended .* A worker failed: error: .*broken here"),
    ):
        make(
            tmp_path / "set",
            pipe,
            prompts=["heart", "runner", "cat face"],
            workers=4,
            filter="tests.synthesis.small_workers:broken",
        )


@pytest.mark.slow
@pytest.mark.usefixtures("forks")
def test_ray(tmp_path):
    pytest.importorskip("ray")
    out = tmp_path / "set"
    line = [sys.executable, "-m", "kspec_guidance", *COMMAND, "--engine", "ray", "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    check_set(out, 18)
    owners = {record.lease["worker"] for record in Store(out).records()}
    assert len(owners) >= 1
