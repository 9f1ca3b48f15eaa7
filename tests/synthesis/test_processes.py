"""Synthesis that is killed, and synthesis by several real processes (gloo, under torchrun and accelerate)."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import GaussianKernel
from kspec_guidance.memory import CentroidMemory, MemoryBank, RandomFeatureMemory
from kspec_guidance.synthesis.exchange import absorb, delta
from kspec_guidance.synthesis.records import Store
from tests.synthesis.small_runs import contents, rows_of

ROOT = Path(__file__).parents[2]


def environment():
    port = random.Random(time.time_ns()).randrange(20000, 50000)
    return {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_PORT": str(port)}


def torchrun(out, processes, *more):
    line = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port",
            environment()["MASTER_PORT"], "-m", "tests.synthesis.worker", str(out), *more]  # fmt: skip
    return subprocess.Popen(
        line,
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def run(out, processes, *more):
    started = torchrun(out, processes, *more)
    text, _ = started.communicate(timeout=300)
    assert started.returncode == 0, text[-3000:]
    said = [json.loads(p.read_text()) for p in sorted(Path(out).glob("said-*.json"))]
    for path in Path(out).glob("said-*.json"):
        path.unlink()
    return said


@pytest.mark.slow
def test_killed_at_twenty_random_moments_and_at_every_step_to_the_disk_it_ends_with_the_same_set(tmp_path):
    line = [sys.executable, "-m", "tests.synthesis.killed_runs", str(tmp_path / "runs")]
    found = json.loads(subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=True, env=environment()).stdout)
    assert found["killed"] == 20
    assert found["killed_at_steps"] == 30
    assert found["states"][0][0] < found["states"][-1][0]  # it came further from kill to kill
    for name in ("random", "steps"):
        assert found[name] == {"same": True, "differ": [], "missing": [], "extra": [], "twice": 0}


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two") / "set"
    return out, run(out, 2)


@pytest.mark.slow
def test_two_processes_make_the_set_and_repel_each_others_images(two):
    out, said = two
    rows = rows_of(out)
    assert len(rows) == 48
    assert len({row["file_name"] for row in rows}) == 48
    assert [s["made"] for s in said] == [24, 24]
    assert {s["images"] for s in said} == {48}
    for s in said:
        assert s["exchanges"] >= 4
        assert s["told"][-1][1] > s["made"]  # its memory holds images of the other one
    store = Store(out)
    assert store.ranks(0) == [0, 1]
    owners = {row["prompt"]: record.rank for record in store.records() for row in record.rows}
    assert owners["heart"] == owners["red heart"]
    assert len({owner for prompt, owner in owners.items() if "runner" in prompt}) == 2  # six of eight must be parted


@pytest.mark.slow
def test_the_result_depends_on_the_seed_and_the_number_of_processes_only(two, tmp_path):
    assert len(run(tmp_path / "again", 2)) == 2
    assert contents(tmp_path / "again") == contents(two[0])


@pytest.mark.slow
def test_two_processes_killed_and_resumed_end_with_the_same_set(two, tmp_path):
    rng, out = random.Random(3), tmp_path / "killed"
    progress = []
    for _ in range(4):
        started = torchrun(out, 2)
        seen, waited = len(list(out.glob(".kspec/*/*/0*.safetensors"))), time.monotonic()
        while len(list(out.glob(".kspec/*/*/0*.safetensors"))) <= seen and time.monotonic() - waited < 60:
            time.sleep(0.02)
        time.sleep(rng.uniform(0, 1.0))
        os.killpg(started.pid, signal.SIGKILL)
        for line in os.popen(f"pgrep -f {out}").read().split():
            os.kill(int(line), signal.SIGKILL)
        started.communicate()
        progress.append(len(list(out.glob(".kspec/*/*/0*.safetensors"))))
    run(out, 2)
    assert contents(out) == contents(two[0]), progress


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "kind"), [(1, "exact"), (4, "exact"), (2, "centroids")])
def test_other_numbers_of_processes_and_other_memories(tmp_path, processes, kind):
    said = run(tmp_path / "set", processes, kind)
    assert len(rows_of(tmp_path / "set")) == 48
    assert len(said) == processes
    assert sum(s["made"] for s in said) == 48
    assert max(s["made"] for s in said) <= 48 // processes + 6


@pytest.mark.slow
def test_a_group_with_a_memory_of_its_own_stays_in_one_process(tmp_path):
    said = run(tmp_path / "set", 2, "groups")
    assert sorted(s["made"] for s in said) == [12, 36]
    owners = {(row["group"], record.rank) for record in Store(tmp_path / "set").records() for row in record.rows}
    assert len(owners) == 2
    assert all(s["told"] == [] for s in said)


@pytest.mark.slow
def test_accelerate_launches_the_command_line(tmp_path):
    (tmp_path / "p.txt").write_text("heart\nrunner\nman\ncat face\n")
    line = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2",
            "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no",
            "--main_process_port", environment()["MASTER_PORT"],
            "-m", "kspec_guidance", "generate", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "set"),
            "--images", "4", "--batch", "2", "--steps", "3", "--no-report"]  # fmt: skip
    done = subprocess.run(line, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("16 images in") == 1
    assert len(rows_of(tmp_path / "set")) == 16
    assert Store(tmp_path / "set").ranks(0) == [0, 1]


# -- what is told --------------------------------------------------------------------------------------------------------


def memories():
    phi, psi = RandomFourierFeatures(GaussianKernel(1.0), 12, 64), RandomFourierFeatures(GaussianKernel(1.0), 3, 16)
    return {"rows": MemoryBank, "means": lambda: CentroidMemory(32), "sum": lambda: RandomFeatureMemory(phi, psi)}


@pytest.mark.parametrize("kind", ["rows", "means", "sum"])
def test_what_is_told_is_as_good_as_having_made_it(kind, g):
    make = memories()[kind]
    x, t = torch.randn(20, 3, 2, 2, generator=g), torch.randn(20, 3, generator=g)
    t = t / t.norm(dim=1, keepdim=True)
    mine, whole = make(), make()
    mine.add(x[:12], t[:12])
    whole.add(x, t)
    told = delta(make(), x[12:], t[12:])
    absorb(mine, told, (3, 2, 2), 3)
    assert len(mine) == len(whole) == 20
    if kind == "sum":
        assert torch.equal(mine.total, whole.total)
        assert told.shape == (1, 64 * 16 + 1)
    else:
        torch.testing.assert_close(mine.x, whole.x)
        torch.testing.assert_close(mine.prompts, whole.prompts)
    absorb(mine, delta(make(), x[:0], t[:0]), (3, 2, 2), 3)
    assert len(mine) == 20
