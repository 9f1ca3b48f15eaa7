import errno
import os

import pytest

from kspec_guidance.synthesis.errors import FolderError, RunFailedError, SynthesisError
from kspec_guidance.synthesis.storage import Storage
from tests.synthesis.small_workers import in_threads


def storage_at(place):
    return Storage(place, sleep=lambda seconds: None)


def test_a_file_is_created_once_and_as_a_whole(tmp_path):
    storage = storage_at(tmp_path)
    storage.check()
    assert list(tmp_path.iterdir()) == []
    assert storage.create("a/b", b"one")
    assert not storage.create("a/b", b"two")
    assert not storage.create("a/b", b"one")  # also with the same bytes: another writer's
    assert storage.read("a/b") == b"one"
    storage.write("a/b", b"three")
    assert (storage.read("a/b"), storage.read("a/c")) == (b"three", None)
    assert storage.names("a") == os.listdir(tmp_path / "a") == ["b"]
    assert storage.names() == ["a"]
    assert (storage.exists("a/b"), storage.exists("a/c"), storage.names("c")) == (True, False, [])
    storage.delete("a")
    storage.delete("a")
    assert storage.names("a") == []


def test_of_many_writers_one_creates_the_file(tmp_path):
    created = []
    for k in range(20):
        storages = [storage_at(tmp_path) for _ in range(8)]
        in_threads(
            [lambda s=s, n=n, k=k: created.append(n) if s.create(f"f{k}", bytes([n])) else None
             for n, s in enumerate(storages)]
        )  # fmt: skip
        assert len(created) == k + 1
        assert storages[0].read(f"f{k}") == bytes([created[-1]])


class Late(Storage):
    """Answers after the time limit: the first operations take place, or not, and fail."""

    def __init__(self, place, takes_place, failures, error=TimeoutError):
        super().__init__(place, sleep=lambda seconds: None)
        self.takes_place, self.failures, self.error = takes_place, failures, error

    def _create_once(self, name, data):
        late = self.failures > 0
        self.failures -= 1
        if not late or self.takes_place:
            super()._create_once(name, data)
        if late:
            raise self.error("no answer")


@pytest.mark.parametrize("takes_place", [True, False])
@pytest.mark.parametrize("error", [TimeoutError, ConnectionResetError, RuntimeError])
def test_an_answer_that_comes_late_or_never_is_found_out(tmp_path, takes_place, error):
    assert Late(tmp_path, takes_place, 2, error).create("a", b"mine")
    assert not Late(tmp_path, True, 1, error).create("a", b"of another")
    assert storage_at(tmp_path).read("a") == b"mine"


def test_storage_that_never_answers_is_an_error(tmp_path):
    with pytest.raises(RunFailedError, match="finished images are safe"):
        Late(tmp_path, False, 99, RuntimeError).create("a", b"mine")
    with pytest.raises(RunFailedError, match="Finished images are safe"):
        Late(tmp_path, False, 99).create("a", b"mine")


def test_a_link_that_was_made_and_reported_as_there_already(tmp_path, monkeypatch):
    link = os.link

    def twice(source, target):  # as a network file system repeats a request whose answer was lost
        link(source, target)
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", twice)
    assert storage_at(tmp_path).create("a", b"mine")


def test_storage_that_ignores_the_condition_is_refused(tmp_path):
    class Careless(Storage):
        def _create_once(self, name, data):
            (self.folder / name).write_bytes(data)

    with pytest.raises(FolderError, match="If-None-Match"):
        Careless(tmp_path).check()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("place", ["hf://datasets/a/b", "ftp://host/a", "memory://a", "abc://x", "http://host/a"])
def test_storage_without_conditional_create_is_refused(place):
    with pytest.raises(SynthesisError, match=r"creates a file only if there is none.*s3://"):
        Storage(place)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_full_and_read_only_storage_is_named(tmp_path, monkeypatch, number):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    monkeypatch.setattr(os, "replace", fail)
    what = "no space left" if number == errno.ENOSPC else "cannot write to"
    for write in (Storage(tmp_path).create, Storage(tmp_path).write):
        with pytest.raises(RunFailedError, match=what):
            write("a", b"")
    assert list(tmp_path.iterdir()) == []


def test_a_file_system_without_hard_links_is_named(tmp_path, monkeypatch):
    def fail(*args):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", fail)
    with pytest.raises(RunFailedError, match="hard links"):
        Storage(tmp_path).check()


def test_s3(bucket):
    storage = storage_at(bucket)
    storage.check()
    assert storage.create("a/b", b"one")
    assert not storage.create("a/b", b"two")
    storage.write("a/c", b"three")
    assert [storage.read(f"a/{name}") for name in "bcd"] == [b"one", b"three", None]
    assert (storage.exists("a/b"), storage.exists("a/d")) == (True, False)
    assert (storage.names("a"), storage.names("z"), storage.names()) == (["b", "c"], [], ["a"])
    with storage.local("a/b") as path:
        assert path.read_bytes() == b"one"
    with pytest.raises(FileNotFoundError), storage.local("a/d"):
        pass
    created = []
    in_threads([lambda n=n: created.append(n) if storage_at(bucket).create("x", bytes([n])) else None for n in range(6)])
    assert len(created) == 1
    storage.delete("a")
    assert storage.names("a") == []


def test_a_read_of_s3_is_one_get(bucket, monkeypatch):
    storage, calls = storage_at(bucket), []
    storage.create("a/b", b"one")
    call = type(storage.fs)._call_s3

    async def counted(self, method, *args, **kwargs):
        calls.append(method)
        return await call(self, method, *args, **kwargs)

    monkeypatch.setattr(type(storage.fs), "_call_s3", counted)
    assert (storage.read("a/b"), storage.read("a/c")) == (b"one", None)
    assert (storage.exists("a/b"), storage.exists("a/c")) == (True, False)
    assert calls == ["get_object"] * 4


def test_a_bucket_that_is_not_there(bucket):
    with pytest.raises(RunFailedError, match="s3://nowhere/run"):
        Storage("s3://nowhere/run").check()
