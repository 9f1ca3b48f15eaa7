"""Runs that are killed, runs of several processes (gloo, under torchrun and accelerate), and their messages."""

import json
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kspec_guidance import SPARKE
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryBank, RandomFeatureMemory
from kspec_guidance.synthesis.arms import ArmChoice, make_selector
from kspec_guidance.synthesis.distributed import add_message, encode_message
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.store import Store
from tests.processes import Launch, Popen, launch
from tests.synthesis import one_process
from tests.synthesis.one_process import ARMS
from tests.synthesis.small_runs import CALL, contents, quiet_pipeline, rows_of

ROOT = Path(__file__).parents[2]


def start(out, processes, *arguments):
    return Launch(one_process.main, processes, (out, *arguments), out.with_suffix(".log"))


def run(out, processes, *arguments):
    start(out, processes, *arguments).wait()
    return results_of(out)


def results_of(out):
    paths = sorted(Path(out).glob("result-*.json"))
    found = [json.loads(path.read_text()) for path in paths]
    for path in paths:
        path.unlink()
    return found


@pytest.mark.slow
def test_runs_killed_at_random_times_and_at_each_disk_operation_end_with_the_same_set(tmp_path):
    line = [sys.executable, "-m", "tests.synthesis.killed_runs", str(tmp_path / "runs")]
    with Popen(line, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        found = json.loads(process.communicate()[0])
    assert found["killed"] == 20
    assert found["killed_at_steps"] == 30
    assert found["states"][0][0] < found["states"][-1][0]  # each run continued the last one
    for name in ("random", "steps"):
        assert found[name] == {"same": True, "differ": [], "missing": [], "extra": [], "twice": 0}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The set of two processes that torchrun itself started."""
    out = tmp_path_factory.mktemp("two") / "set"
    launch(["torchrun", "--nproc-per-node", "2", "--standalone", "-m", "tests.synthesis.one_process", str(out)])
    return out, results_of(out)


@pytest.mark.slow
def test_two_processes_make_the_set_and_exchange_their_images(two):
    out, results = two
    rows = rows_of(out)
    assert len(rows) == 48
    assert len({row["file_name"] for row in rows}) == 48
    assert [r["made"] for r in results] == [24, 24]
    assert {r["images"] for r in results} == {48}
    for r in results:
        assert r["exchanges"] >= 4
        assert r["received"][-1][1] > r["made"]  # its memory holds images of the other process
    store = Store(out)
    assert store.ranks(0) == [0, 1]
    owners = {row["prompt"]: record.rank for record in store.records() for row in record.rows}
    assert owners["heart"] == owners["red heart"]
    assert len({owner for prompt, owner in owners.items() if "runner" in prompt}) == 2  # six of eight prompts must be split


@pytest.mark.slow
def test_two_processes_are_reproducible(two, tmp_path):
    assert len(run(tmp_path / "again", 2)) == 2
    assert contents(tmp_path / "again") == contents(two[0])


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_set(two, tmp_path):
    rng, out = random.Random(3), tmp_path / "killed"
    progress = []
    for _ in range(4):
        started = start(out, 2)
        before, waited = len(list(out.glob(".kspec/*/*/0*.safetensors"))), time.monotonic()
        while len(list(out.glob(".kspec/*/*/0*.safetensors"))) <= before and time.monotonic() - waited < 60:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        started.kill()
        progress.append(len(list(out.glob(".kspec/*/*/0*.safetensors"))))
    run(out, 2)
    assert contents(out) == contents(two[0]), progress


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kind"), [(1, "exact"), (4, "exact"), (2, "centroids")])
def test_other_numbers_of_processes_and_other_memories(tmp_path, processes, kind):
    results = run(tmp_path / "set", processes, kind)
    assert len(rows_of(tmp_path / "set")) == 48
    assert len(results) == processes
    assert sum(r["made"] for r in results) == 48
    assert max(r["made"] for r in results) <= 48 // processes + 6


def pictures(out):
    return {path.name: path.read_bytes() for path in out.rglob("*.png")}


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["exact", "guide"])
def test_more_processes_than_prompts(tmp_path, kind):
    """The last prompt of the list: one process has work, and makes the images that a single process makes."""
    run(tmp_path / "one", 1, kind, "7")
    results = run(tmp_path / "three", 3, kind, "7")
    assert sorted(r["made"] for r in results) == [0, 0, 7]
    assert [r["total_made"] for r in results] == [7] * 3
    assert pictures(tmp_path / "three") == pictures(tmp_path / "one")
    assert len(rows_of(tmp_path / "three")) == 7
    again = run(tmp_path / "three", 3, kind, "7")  # nothing is left
    assert [(r["made"], r["images"]) for r in again] == [(0, 7)] * 3
    assert pictures(tmp_path / "three") == pictures(tmp_path / "one")


@pytest.mark.slow
def test_a_process_that_ends_long_before_the_others(tmp_path):
    results = run(tmp_path / "set", 3, "exact", "0,1,17")
    assert sorted(r["made"] for r in results) == [0, 1, 17]
    assert len(rows_of(tmp_path / "set")) == 18


@pytest.mark.slow
def test_a_group_with_its_own_memory_stays_in_one_process(tmp_path):
    results = run(tmp_path / "set", 2, "groups")
    assert sorted(r["made"] for r in results) == [12, 36]
    owners = {(row["group"], record.rank) for record in Store(tmp_path / "set").records() for row in record.rows}
    assert len(owners) == 2
    assert all(r["received"] == [] for r in results)


@pytest.mark.slow
def test_accelerate_launches_the_command_line(tmp_path, capfd):
    (tmp_path / "p.txt").write_text("heart\nrunner\nman\ncat face\n")
    launch(["accelerate", "launch", "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", "0",  # a free one
            "-m", "kspec_guidance", "generate", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "set"),
            "--images", "4", "--batch-size", "2", "--steps", "3", "--no-report"])  # fmt: skip
    assert capfd.readouterr().out.count("16 images in") == 1
    assert len(rows_of(tmp_path / "set")) == 16
    assert Store(tmp_path / "set").ranks(0) == [0, 1]


# -- messages ------------------------------------------------------------------------------------------------------------


def memories():
    phi, psi = RandomFourierFeatures(GaussianKernel(1.0), 12, 64), RandomFourierFeatures(GaussianKernel(1.0), 3, 16)
    return {"rows": MemoryBank, "means": lambda: CentroidMemory(32), "sum": lambda: RandomFeatureMemory(phi, psi)}


@pytest.mark.parametrize("kind", ["rows", "means", "sum"])
def test_a_message_adds_what_the_samples_themselves_would(kind, g):
    make = memories()[kind]
    x, t = torch.randn(20, 3, 2, 2, generator=g), torch.randn(20, 3, generator=g)
    t = t / t.norm(dim=1, keepdim=True)
    part, whole = make(), make()
    part.add(x[:12], t[:12])
    whole.add(x, t)
    message = encode_message(make(), x[12:], t[12:])
    add_message(part, message, (3, 2, 2), 3)
    assert len(part) == len(whole) == 20
    if kind == "sum":
        assert torch.equal(part.total, whole.total)
        assert message.shape == (1, 64 * 16 + 1)
    else:
        torch.testing.assert_close(part.x, whole.x)
        torch.testing.assert_close(part.prompts, whole.prompts)
    add_message(part, encode_message(make(), x[:0], t[:0]), (3, 2, 2), 3)
    assert len(part) == 20


@pytest.mark.slow
@pytest.mark.parametrize("select", ["arms", "pak-ucb", "promptwise"])
def test_two_processes_with_arms_choose_the_same_again_and_after_a_crash(select, tmp_path):
    run(tmp_path / "once", 2, select)
    names = {record.arm["arm"] for record in Store(tmp_path / "once").records()}
    assert names == {"low", "high"}
    shutil.copytree(tmp_path / "once", tmp_path / "crashed")
    for rank, lost in ((0, 1), (1, 3)):  # the last batches of each process
        for path in sorted((tmp_path / "crashed" / ".kspec" / "epoch-000" / f"rank-{rank:04d}").glob("*"))[-lost:]:
            path.unlink()
    run(tmp_path / "crashed", 2, select)
    assert contents(tmp_path / "crashed") == contents(tmp_path / "once")


@pytest.mark.slow
def test_the_events_of_four_processes_replay_in_one(tmp_path):
    out = tmp_path / "set"
    run(out, 4, "arms")
    store, pipe, guide = Store(out), quiet_pipeline(), SPARKE()
    records = [list(store.process_records(rank)) for rank in range(4)]

    def choice(rank):
        selector = make_selector("mixture-greedy", ARMS, 0, rank)
        return ArmChoice(ARMS, selector, guide, Generator(pipe, guide, dict(CALL)))

    for rank in range(4):  # the choices of each follow from the records of all
        replayed, exchanges = choice(rank), 0
        for k, record in enumerate(records[rank]):
            while k >= (exchanges + 1) * 2:
                for other in range(4):
                    for heard in records[other][2 * exchanges : 2 * exchanges + 2] if other != rank else ():
                        replayed.learn(heard)
                exchanges += 1
            assert replayed.choose().name == record.arm["arm"]
            replayed.learn(record)
        assert exchanges > 0

    one, parts = choice(0), [choice(rank) for rank in range(4)]
    for rank in range(4):
        for record in records[rank]:
            one.learn(record)
            parts[rank].learn(record)
    merged = parts[0].selector
    for part in parts[1:]:
        merged.merge(part.selector)
    assert float(one.selector.kept.sum()) == len(rows_of(out)) == 48
    assert torch.equal(merged.told, one.selector.told)
    assert torch.allclose(merged.weights(), one.selector.weights())
