"""Units under faults: owners that are killed or paused, records that are forged, storage that fails."""

import errno
import json
import os
import random
import shutil
import time
from dataclasses import replace

import pytest
import torch

from kspec_guidance.memory.io import encode_tensors, read_tensors
from kspec_guidance.synthesis.assignment import units_of
from kspec_guidance.synthesis.distributed import OneProcess
from kspec_guidance.synthesis.elastic import work
from kspec_guidance.synthesis.errors import CheckpointError, RunFailedError
from kspec_guidance.synthesis.leases import Leases
from kspec_guidance.synthesis.run import restored
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import Unit, UnitLog, UnitStore
from tests.synthesis.small_workers import (
    PROMPTS,
    Clock,
    FailingStorage,
    Killed,
    in_threads,
    made_by,
    one_worker,
    small_run,
    without_lease,
    without_model,
)  # fmt: skip

UNITS, IMAGES = 3, 35


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    without_model(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, pipe):
    """The storage of a run of one worker without interruption."""
    place = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        without_model(patch)
        with small_run(pipe) as run:
            assert one_worker(run, Storage(place)) == IMAGES
    return place


def check_whole(place):
    """All images once, each with the bytes that its record names."""
    records, names, images = made_by(Storage(place), UNITS)
    assert len(names) == len(set(names)) == IMAGES
    assert sorted(names) == sorted(images)
    tokens = {unit: [record.lease["token"] for record in own] for unit, own in records.items()}
    assert all(own == sorted(own) for own in tokens.values())
    return records


def test_similar_prompts_are_one_unit_and_units_hear_of_similar_ones(whole):
    records = check_whole(whole)
    texts = [{row["prompt"] for record in own for row in record.rows} for own in records.values()]
    assert texts == [{"heart", "red heart"}, {"runner", "runner, woman"}, {"cat face"}]
    read = [[record.lease["read"] for record in own if record.lease["read"]] for own in records.values()]
    assert [list(first) for first in read[1][:1]] == [["0"]]  # the runners those of the hearts, made before
    assert len(read[1][0]["0"]) == 3  # five batches: two summaries of two, and the last
    assert read[2] == []  # nothing is similar to the cat


def test_the_worker_that_comes_later_makes_the_same_images(whole, tmp_path, pipe):
    shutil.copytree(whole, tmp_path / "run")
    for path in [*(tmp_path / "run").glob("rank-0001/00000[2-9]*"), tmp_path / "run" / "done" / "000001"]:
        path.unlink()
    (tmp_path / "run" / "summaries" / "000001-000001.safetensors").unlink()
    with small_run(pipe) as run:
        made = one_worker(run, Storage(tmp_path / "run"))
    records, old = check_whole(tmp_path / "run"), check_whole(whole)
    assert made == sum(len(record.rows) for record in old[1][2:])
    for unit in old:
        for a, b in zip(records[unit], old[unit], strict=True):
            assert without_lease(a).description() == without_lease(b).description()  # with the checksums of images
            assert a.lease["read"] == b.lease["read"]


def test_replay_follows_the_records(whole, pipe):
    """Each batch is made again from the records before it, with the summaries that were read then."""

    class Again(UnitStore):
        def commit(self, record, images):
            assert record.description()["rows"] == self.old.rows  # with the checksums of images
            raise StopIteration

    storage = Storage(whole)
    log = UnitLog(storage)
    compared = 0
    with small_run(pipe) as run:
        units = units_of(run, run.jobs(), storage)
        for unit in range(UNITS):
            records = list(log.records(unit))
            for k, (old, _) in enumerate(records):
                jobs = [job for job, owner in zip(run.jobs(), units.owners, strict=True) if owner == unit]
                lease = Leases(storage, UNITS, worker="reader")
                store = Again(whole, log, type("Lease", (), {"unit": unit, "token": 1, "worker": "", "images": 0})(), {})
                store.settings = lambda epoch: run.settings
                store.replay = lambda records=records[:k]: iter(record for record, _ in records)
                store.old = old
                with restored(run.run_guide, copy_memory=True):
                    worker = run.worker(
                        jobs, IMAGES, store, OneProcess(unit), None, units.prompt_features, units.contexts
                    )  # fmt: skip
                    one = Unit(worker, store)
                    one.log = type("Log", (), {"publish": lambda *a: None, "summary": log.summary, "read": log.read})()
                    one.resume()
                    for other, digests in old.lease["read"].items():
                        for digest in digests:
                            one._hear(int(other), digest)
                    with pytest.raises(StopIteration):
                        worker.step(worker.next_batch())
                    compared += 1
                assert lease.tokens() != {}
    assert compared == 13


@pytest.mark.parametrize("seed", range(3))
def test_workers_that_are_killed_at_random_operations(tmp_path, pipe, seed):
    rng, kills = random.Random(seed), 0
    clock = Clock()
    for _ in range(100):
        storage = FailingStorage(tmp_path / "run", kill_at=rng.randrange(1, 50))
        with small_run(pipe) as run:
            try:
                one_worker(run, storage, clock, in_order=False)
                break
            except Killed:
                kills += 1
    assert kills >= 2
    records = check_whole(tmp_path / "run")
    owners = {record.lease["worker"] for own in records.values() for record in own}
    assert len(owners) > 1


def test_workers_at_the_same_time_of_which_some_are_killed_and_others_come(tmp_path, pipe):
    rng = random.Random(5)

    def worker(kill_at):
        with small_run(pipe, lease_seconds=0.4) as run:
            storage = FailingStorage(tmp_path / "run", kill_at)

            units = units_of(run, run.jobs(), storage)
            leases = Leases(storage, units.number, 0.4)
            work(run, Store(tmp_path / "run"), UnitLog(storage), units, leases, run.jobs, sleep=lambda s: time.sleep(0.02))

    in_threads([lambda k=k: worker(k) for k in [rng.randrange(5, 60) for _ in range(4)] + [None, None]])
    check_whole(tmp_path / "run")


def test_a_paused_owner_that_wakes_up_after_another_went_on_commits_nothing(tmp_path, pipe):
    place, seen = tmp_path / "run", []

    def pause(name):  # before its first record; meanwhile another worker finishes everything
        clock = Clock(9e5)
        with small_run(pipe) as other:
            one_worker(other, Storage(place), clock, name="second")
        seen.append({path.name: path.read_bytes() for path in (place / "rank-0000").iterdir()})

    storage = FailingStorage(place, pause_before=pause)
    with small_run(pipe) as run:
        assert one_worker(run, storage, name="first") == 0
    records = check_whole(place)
    assert {path.name: path.read_bytes() for path in (place / "rank-0000").iterdir()} == seen[0]
    assert {record.lease["worker"] for own in records.values() for record in own} == {"second"}


def test_a_paused_owner_that_wakes_up_before_the_other_commits_makes_one_record_at_most(tmp_path, pipe):
    place = tmp_path / "run"

    def wake_up(name):  # just before the second owner commits its first record, the first one commits the same
        store.log.create(waiting[0])
        with pytest.raises(Exception, match=r"taken|committed"):
            store.commit(replace(waiting[0], batch_index=1), {})

    with small_run(pipe) as run:
        units = units_of(run, run.jobs(), Storage(place))
        first = Leases(Storage(place), units.number, 10.0, "first").take()
        store = UnitStore(place, UnitLog(Storage(place)), first, run.settings)
        jobs = [job for job, owner in zip(run.jobs(), units.owners, strict=True) if owner == first.unit]
        waiting = []
        with restored(run.run_guide, copy_memory=True):
            worker = run.worker(jobs, IMAGES, store, OneProcess(0), None, units.prompt_features)
            store.log.create = lambda record: waiting.append(record) or False
            with pytest.raises(Exception, match="committed by another"):
                worker.step(worker.next_batch())
            del store.log.create
        with small_run(pipe) as other:
            storage = FailingStorage(place, pause_before=wake_up)
            made = one_worker(other, storage, Clock(), name="second")
    records = check_whole(place)
    assert made == IMAGES - 3
    workers = [record.lease["worker"] for record in records[0]]
    assert workers == ["first"] + ["second"] * 4
    assert [record.lease["token"] for record in records[0]] == [1] + [3] * 4  # opened again after the lost batch


def copied(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "done")
    return tmp_path / "run", tmp_path / "run" / "rank-0001" / "000001.safetensors"


FAULTS = [
    "half", "empty", "other", "changed", "lost", "forged", "moved", "summary", "attempt", "width", "unread summary",
    "owners", "other owners", "no owners",
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_records_that_were_damaged_forged_or_lost(whole, tmp_path, pipe, fault):
    place, path = copied(whole, tmp_path)
    data, log = path.read_bytes(), UnitLog(Storage(place))
    if fault == "half":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "empty":
        path.write_bytes(b"")
    elif fault == "other":
        path.write_bytes(encode_tensors("batch", {}, {"rows": [], "rejected": []}))
    elif fault == "changed":
        path.write_bytes(data.replace(b"runner", b"winner"))
    elif fault == "lost":
        path.unlink()
        shutil.copy(path.with_name("000002.safetensors"), path)
        path.with_name("000002.safetensors").unlink()
    elif fault == "forged":  # well made, but not what the next record follows
        record = log.read(1, 1)
        record.rows[0]["seed"] = 5
        path.write_bytes(encode_tensors("batch", record.tensors, record.description()))
    elif fault == "moved":
        record = log.read(1, 1)
        record.lease["images"] = "../../../secret"
        path.write_bytes(encode_tensors("batch", record.tensors, record.description()))
    elif fault in ("attempt", "width"):  # of the last record of a unit that is not finished
        record = log.read(1, 1)
        if fault == "attempt":
            record.rows[0]["attempt"] = 77
        else:
            record.tensors["x"] = torch.zeros(len(record.rows), 1, 3, 3)
        path.write_bytes(encode_tensors("batch", record.tensors, record.description()))
        for later in ("000002", "000003", "000004"):
            path.with_name(f"{later}.safetensors").unlink()
    elif fault == "unread summary":
        shutil.rmtree(place / "rank-0001")
        summary = encode_tensors("summary", {"message": torch.zeros(1, 5)}, {"shape": [1, 2, 2], "prompt_dim": 3})
        (place / "summaries" / "000000-000000.safetensors").write_bytes(summary)
    elif "owners" in fault:
        tensors, about = read_tensors(place / "prompts.safetensors", "prompts")
        owners = tensors.pop("owners")
        if fault != "no owners":
            tensors["owners"] = owners.flip(0) if fault == "owners" else owners * 3
        (place / "prompts.safetensors").write_bytes(encode_tensors("prompts", tensors, about))
    else:
        about = {"shape": [1, 2, 2], "prompt_dim": 3}
        summary = encode_tensors("summary", {"message": torch.zeros(1, 7)}, about)
        (place / "summaries" / "000000-000000.safetensors").write_bytes(summary)
    with small_run(pipe) as run, pytest.raises(CheckpointError, match="restore it from a copy") as error:
        one_worker(run, Storage(place))
    assert str(place) in str(error.value)


def test_a_half_written_file_of_a_dead_worker_is_no_record(whole, tmp_path, pipe):
    place, path = copied(whole, tmp_path)
    path.with_name(".000099.safetensors.abc.part").write_bytes(b"half")
    with small_run(pipe) as run:
        assert one_worker(run, Storage(place)) == 0
    check_whole(place)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_worker_whose_storage_is_full_or_read_only_stops_and_loses_one_batch(tmp_path, pipe, monkeypatch, number):
    fsync, calls = os.fsync, []

    def fail(handle):
        calls.append(handle)
        if len(calls) > 12:
            raise OSError(number, os.strerror(number))
        fsync(handle)

    with small_run(pipe) as run:
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", fail)
            with pytest.raises(RunFailedError, match=r"inished images are safe"):
                one_worker(run, Storage(tmp_path / "run"))
        before = len(made_by(Storage(tmp_path / "run"), UNITS)[1])
        assert before > 0
        assert one_worker(run, Storage(tmp_path / "run")) == IMAGES - before
    check_whole(tmp_path / "run")


def test_a_memory_of_means_and_one_of_a_group(tmp_path, pipe):
    with small_run(pipe, memory="centroids") as run:
        one_worker(run, Storage(tmp_path / "means"))
    check_whole(tmp_path / "means")
    listed = [{"prompt": text, "group": text[:1]} for text in PROMPTS]
    path = tmp_path / "p.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in listed))
    with small_run(pipe, prompts=str(path), memory_by="group") as run:
        one_worker(run, Storage(tmp_path / "groups"))
        assert units_of(run, run.jobs(), Storage(tmp_path / "groups")).number == 3
    records, names, _ = made_by(Storage(tmp_path / "groups"), 3)
    assert len(set(names)) == IMAGES
    assert all(not record.lease["read"] for own in records.values() for record in own)
    assert not (tmp_path / "groups" / "summaries").exists()
