import time

import pytest

from kspec_guidance.synthesis.leases import LeaseLostError, Leases
from kspec_guidance.synthesis.storage import Storage
from tests.synthesis.small_workers import Clock, in_threads

HOURS = 3600.0


def workers(tmp_path, number, units=1, seconds=10.0):
    """Workers whose clocks disagree by hours."""
    clocks = [Clock((-1) ** k * 7 * k * HOURS) for k in range(number)]
    return clocks, [Leases(Storage(tmp_path), units, seconds, f"w{k}", clock) for k, clock in enumerate(clocks)]


def test_a_unit_has_one_owner_however_far_the_clocks_are_off(tmp_path):
    clocks, (a, b, c) = workers(tmp_path, 3)
    lease = a.take()
    assert (lease.unit, lease.token) == (0, 1)
    for other, clock in ((b, clocks[1]), (c, clocks[2])):
        assert other.take() is None
        clock.now += 9
        assert other.take() is None
        lease.beat()  # the owner lives
        clock.now += 9
        assert other.take() is None
        clock.now += 9
        assert other.take() is None
        lease.beat()


def test_a_dead_owner_is_known_by_the_clock_of_the_one_who_looks(tmp_path):
    clocks, (a, b, c) = workers(tmp_path, 3)
    lease = a.take()
    assert b.take() is None
    clocks[1].now += 10
    assert c.take() is None  # which sees it for the first time
    taken = b.take()
    assert taken.token == 2
    clocks[2].now += 11
    assert c.take() is None  # another owner than before
    clocks[2].now += 9
    assert c.take() is None
    with pytest.raises(LeaseLostError):
        lease.check()
    taken.check()


def test_what_is_released_is_taken_at_once_and_what_is_done_never(tmp_path):
    _, (a, b) = workers(tmp_path, 2, units=2)
    first, second = a.take(), a.take()
    assert b.take() is None
    first.release("digest of its records")
    second.release()
    second.beat()  # of a thread that was late
    assert b.take().unit == 1
    assert a.take() is None
    assert (a.done(), a.tokens()) == ({0}, {0: 1, 1: 2})


def test_files_of_others_among_the_leases_are_left_alone(tmp_path):
    _, (a,) = workers(tmp_path, 1, units=2)
    lease = a.take()
    lease.images = 3
    lease.release("digest of its records")
    storage = a.storage
    for name in ("Thumbs.db", "000001 (copy)", "000001", "sub/file", "000099", "000099-000001", "-", "000001-000001-x"):
        storage.create(f"leases/{name}", b"")
        if name not in ("000001", "000099"):
            storage.create(f"done/{name}", b"")
    storage.create("done/000099", b"")
    assert (a.done(), a.tokens(), a.images()) == ({0}, {0: 1}, 3)
    for beat in (b"", b"abc", b"[]", b'{"images": "x"}'):
        storage.write("beats/000000-000001", beat)
        assert a.images() == 0


def test_units_without_an_owner_come_first(tmp_path):
    _, (a, b) = workers(tmp_path, 2, units=3)
    a.take([1]).release()
    assert [b.take([1, 2, 0]).unit for _ in range(3)] == [2, 0, 1]


def test_many_workers_that_look_at_once_own_different_units(tmp_path):
    _, all_workers = workers(tmp_path, 12, units=9)
    taken = []
    in_threads([lambda w=w: taken.append(w.take()) for w in all_workers])
    owned = [lease.unit for lease in taken if lease is not None]
    assert sorted(set(owned)) == sorted(owned)
    while (lease := all_workers[0].take()) is not None:
        owned.append(lease.unit)
    assert sorted(owned) == list(range(9))


def test_two_that_find_an_owner_dead_at_the_same_time(tmp_path):
    for k in range(10):
        clocks, (a, b, c) = workers(tmp_path / str(k), 3)
        a.take()
        assert (b.take(), c.take()) == (None, None)
        clocks[1].now += 11
        clocks[2].now += 11
        taken = []
        in_threads([lambda w=w, found=taken: found.append(w.take()) for w in (b, c)])
        assert sorted(lease is not None for lease in taken) == [False, True]


def test_the_thread_of_an_owner_shows_that_it_lives(tmp_path):
    lease = Leases(Storage(tmp_path), 1).take()
    before = (tmp_path / "beats" / "000000-000001").read_bytes()
    with lease.beating(0.02):
        for _ in range(200):
            if (tmp_path / "beats" / "000000-000001").read_bytes() != before:
                return
            time.sleep(0.01)
    pytest.fail("no heartbeat")
