"""Sets that are made again from what their workers have read of each other."""

import hashlib
import shutil
from functools import partial

import pytest

from kspec_guidance.memory.io import encode_tensors
from kspec_guidance.synthesis import CheckpointError, SynthesisError, elastic, reproduce
from kspec_guidance.synthesis.leases import Leases
from kspec_guidance.synthesis.publication import compare_with_original
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import UnitLog
from tests.synthesis.small_workers import make, without_model


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    without_model(monkeypatch)


def stop_after(images):
    def stop(now):
        if now.done >= images:
            raise KeyboardInterrupt

    return stop


def named(monkeypatch, name):
    """Name the next worker, which decides on the unit that it begins with: c with the hearts, d with the runners."""
    monkeypatch.setattr("kspec_guidance.synthesis.elastic.Leases", partial(Leases, worker=name))


@pytest.fixture(scope="module")
def two_workers(tmp_path_factory, pipe):
    """A set whose hearts one worker began, another made all runners, and then the other hearts, each reading the other."""
    folder = tmp_path_factory.mktemp("two")
    with pytest.MonkeyPatch.context() as patch:
        without_model(patch)
        named(patch, "c")
        with pytest.raises(KeyboardInterrupt):
            make(None, pipe, join=folder / "run", workers=None, progress_callback=stop_after(12))
        named(patch, "d")
        make(folder / "set", pipe, join=folder / "run", workers=None)
    return folder / "set"


def all_read(out):
    return [record.lease["read"] for record in Store(out).records()]


def test_a_set_of_two_workers_is_made_again_from_what_they_have_read(two_workers, tmp_path, pipe):
    read = {unit for reads in all_read(two_workers) for unit in reads}
    assert read == {"0", "1"}  # the hearts of the runners, and these of those
    path = two_workers / "reproduce.yaml"
    assert "makes the set again" in (two_workers / "README.md").read_text()
    with pytest.raises(KeyboardInterrupt):
        reproduce(path, tmp_path / "again", pipe, progress_callback=stop_after(16))
    result = reproduce(path, tmp_path / "again", pipe, report=False)
    assert result.reproduced == {"same bytes": 35, "same pixels": 0, "different": 0}
    assert all_read(tmp_path / "again") == all_read(two_workers)  # with the digests of all summaries
    shutil.rmtree(tmp_path / "again" / ".kspec")  # which the hub does not have
    result = reproduce(tmp_path / "again" / "reproduce.yaml", tmp_path / "third", pipe, report=False)
    assert result.reproduced["same bytes"] == 35


def test_several_workers_make_a_set_again_together(two_workers, tmp_path, pipe, monkeypatch):
    path, join = two_workers / "reproduce.yaml", tmp_path / "run"
    named(monkeypatch, "d")  # which cannot begin the runners before there are hearts
    with pytest.raises(KeyboardInterrupt):
        reproduce(path, None, pipe, join=join, progress_callback=stop_after(6))
    named(monkeypatch, "c")
    reproduce(path, tmp_path / "again", pipe, report=False, join=join)
    assert compare_with_original(two_workers, tmp_path / "again")["same bytes"] == 35


def test_a_unit_that_waits_is_read_again_only_when_there_is_what_it_waits_for(two_workers, tmp_path, pipe, monkeypatch):
    class BusyHearts(Leases):
        def take(self, order=None):
            return super().take([unit for unit in order if unit != 0])

    waits = []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(elastic, "Leases", partial(BusyHearts, worker="d"))
    monkeypatch.setattr(elastic, "work", partial(elastic.work, sleep=sleep))
    with pytest.raises(KeyboardInterrupt):
        reproduce(two_workers / "reproduce.yaml", None, pipe, join=tmp_path / "run")
    assert Leases(Storage(str(tmp_path / "run")), 2).tokens() == {1: 1}  # the runners had one owner


@pytest.mark.parametrize("fault", ["middle", "last", "lost", "units", "impossible", "no units", "weights"])
def test_what_cannot_be_followed_is_named(two_workers, tmp_path, pipe, monkeypatch, fault):
    out = tmp_path / "set"
    shutil.copytree(two_workers, out)
    records = out / ".kspec" / "epoch-000" / "rank-0001"
    path, message = records / "000004.safetensors", "records in .*rank-0001 are not the 5 that .*units.jsonl names"
    if fault in ("middle", "last"):
        path = records / "000001.safetensors" if fault == "middle" else path
        message = "rank-0001/000002.safetensors does not follow" if fault == "middle" else message
        record = UnitLog(Storage(records.parent)).read(1, int(path.stem))
        record.lease["read"] = {"0": ["0" * 64]}
        path.write_bytes(encode_tensors("batch", record.tensors, record.description()))
    elif fault == "lost":
        path.unlink()
    elif fault == "units":
        text = (out / "units.jsonl").read_text()
        (out / "units.jsonl").write_text(text.replace('"batches": 5', '"batches": 4'))
        message = "units.jsonl is not the file that reproduce.yaml names"
    elif fault == "impossible":
        text = (out / "units.jsonl").read_text().replace('"read": {"0": {"0": 2}}', '"read": {"0": {"0": 3}}')
        text, old = text.encode(), hashlib.sha256((out / "units.jsonl").read_bytes()).hexdigest()
        recipe = (out / "reproduce.yaml").read_text()
        (out / "reproduce.yaml").write_text(recipe.replace(old, hashlib.sha256(text).hexdigest()))
        (out / "units.jsonl").write_bytes(text)
        message = "batch 4 of unit 0 has read what was not there before it"
    elif fault == "no units":
        (out / "units.jsonl").unlink()
        message = r"cannot read .*units.jsonl, .*keep it beside reproduce.yaml"
    else:
        weight = next(p for p in pipe.unet.parameters() if p.ndim > 1)
        monkeypatch.setattr(weight, "data", weight.data + 1)
        message = "networks.unet"
    with pytest.raises(SynthesisError, match=message):
        reproduce(out / "reproduce.yaml", tmp_path / "again", pipe)
    assert not (tmp_path / "again").exists()


def test_a_folder_with_images_of_another_order_is_not_continued(two_workers, tmp_path, pipe):
    with pytest.raises(KeyboardInterrupt):  # the hearts are finished before there are runners
        make(tmp_path / "other", pipe, progress_callback=stop_after(17))
    with pytest.raises(CheckpointError, match=r"record 0 of unit 1 .* than the set that is made again"):
        reproduce(two_workers / "reproduce.yaml", tmp_path / "other", pipe)
