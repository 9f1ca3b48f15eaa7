import functools
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from PIL import Image

from kspec_guidance import load_demo_pipeline
from kspec_guidance.bench.compare import compare, plan
from kspec_guidance.bench.methods import CODES
from kspec_guidance.bench.models import RECIPES
from kspec_guidance.bench.plan import unfit
from kspec_guidance.bench.sampler import Case, Sampler
from kspec_guidance.bench.store import Run
from kspec_guidance.synthesis.errors import FolderError, RunFailedError
from tests.bench.jobs import small_job
from tests.cli.commands import call
from tests.devices.simulated import SimulatedDevice
from tests.processes import Popen, launch
from tests.tiny import build

TINY = {name: recipe for name, recipe in RECIPES.items() if name != "demo"}


@pytest.fixture(scope="module")
def pipe():
    return build("StableDiffusionPipeline")


def job(pipe, **changes):
    return small_job("sd-1.5", pipe=pipe, **changes)


def digests(folder):
    """SHA-256 of the files of all finished images, by their names."""
    files = [record["file"] for record in Run(folder).records()]
    return {file: hashlib.sha256((folder / file).read_bytes()).hexdigest() for file in files}


@pytest.mark.parametrize("name", TINY)
def test_each_recipe_runs_on_its_class_with_tiny_weights(name, tmp_path):
    found = compare(small_job(name, prompts=("a red heart",)), tmp_path)
    assert (found.made, found.failed) == (4, {})
    groups = found.run.groups()
    assert list(groups) == [("plain", None), ("sparke", "50")]
    plain, guided = (groups[key][0] for key in groups)
    assert all(isinstance(image, Image.Image) for image in (*plain, *guided))
    assert plain[0].tobytes() != plain[1].tobytes()
    assert [i.tobytes() for i in plain] != [i.tobytes() for i in guided]
    settings = found.run.settings
    assert settings["model"]["pipeline"] == RECIPES[name].pipeline
    assert settings["steps"] == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", {recipe.pipeline: name for name, recipe in reversed(TINY.items())}.values())
def test_every_method_that_fits_a_recipe_runs_on_it_in_half_precision(name, tmp_path):
    pipe = build(RECIPES[name].pipeline)
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.to(torch.bfloat16)
    codes = [code for code, method in CODES.items() if unfit(method, RECIPES[name]) is None]
    found = compare(small_job(name, ",".join(codes), ("a red heart",), pipe), tmp_path)
    assert (found.made, found.failed) == (2 * len(codes), {})


def test_a_record_has_the_time_beside_plain_sampling_and_the_same_seeds(pipe, tmp_path):
    records = compare(job(pipe, images=3, batch_size=2), tmp_path).run.records()
    plain, sparke = ([r for r in records if r["method"] == name] for name in ("plain", "sparke"))
    assert [r["seed"] for r in plain] == [r["seed"] for r in sparke]
    assert len({r["seed"] for r in plain}) == 6
    assert all(r["seconds"] > 0 and r["peak_bytes"] is None for r in records)
    assert all(r["added_seconds"] == 0 for r in plain)
    assert sparke[0]["added_seconds"] == pytest.approx(sparke[0]["seconds"] - plain[0]["seconds"], abs=2e-5)


def test_images_are_those_of_the_pipeline_itself(pipe, tmp_path):
    run = compare(job(pipe), tmp_path).run
    record = run.records()[0]
    alone = pipe("a red heart", **job(pipe).call, generator=torch.Generator().manual_seed(record["seed"])).images[0]
    difference = torch.tensor(list(run.groups()["plain", None][0][0].tobytes())) - torch.tensor(list(alone.tobytes()))
    assert difference.abs().max() <= 1  # a batch of two and one of one


def test_a_run_that_ended_in_between_gives_the_images_of_one_that_did_not(pipe, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    compare(job(pipe), whole)

    def stop(done, total):
        if done == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare(job(pipe), broken, stop)
    path = broken / "records" / "rank-0000.jsonl"
    with path.open("a") as file:
        file.write('{"method": "pl')  # a write that was cut off
    found = compare(job(pipe), broken)
    assert found.made == 4
    assert digests(broken) == digests(whole)
    assert all(json.loads(line) for line in path.read_text().splitlines())
    assert compare(job(pipe), broken).made == 0


def test_lost_images_and_damaged_groups_are_made_again(pipe, tmp_path):
    compare(job(pipe), tmp_path)
    before = digests(tmp_path)
    (tmp_path / "images/sparke/50/000001-000.png").unlink()
    assert compare(job(pipe), tmp_path).made == 2
    assert digests(tmp_path) == before


def test_prompts_methods_and_strengths_may_be_added(pipe, tmp_path):
    compare(job(pipe, prompts=("a red heart",)), tmp_path)
    found = compare(job(pipe, methods="sparke@25,particle"), tmp_path)
    assert found.made == 8
    groups = found.run.groups()
    done = {key: list(of) for key, of in groups.items()}
    assert done == {("sparke", "25"): [0, 1], ("sparke", "50"): [0], ("particle", "0.3"): [0, 1], ("plain", None): [0]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": 3}, "images: 2 before, now 3"),
        ({"seed": 1}, "seed: 0 before, now 1"),
        ({"prompts": ("another",)}, "prompt 0: a red heart before, now another"),
        ({"call": {"num_inference_steps": 3}}, "steps: 2 before, now 3"),
        ({"batch_size": 1}, "batch_size: 2 before, now 1"),
    ],
)
def test_a_folder_of_another_comparison_is_refused(pipe, change, message, tmp_path):
    compare(job(pipe, prompts=("a red heart",)), tmp_path)
    before = (tmp_path / "settings.json").read_bytes()
    with pytest.raises(FolderError, match=message):
        compare(job(pipe, **({"prompts": ("a red heart",)} | change)), tmp_path)
    assert (tmp_path / "settings.json").read_bytes() == before


def test_a_folder_with_other_files_is_refused(pipe, tmp_path):
    (tmp_path / "metadata.jsonl").write_text("{}")
    with pytest.raises(FolderError, match="is not empty, and holds no comparison"):
        compare(job(pipe), tmp_path)


def test_a_method_that_fails_is_named_and_the_others_finish(pipe, tmp_path, monkeypatch):
    def fail(self, m):
        raise ZeroDivisionError("nothing to divide by")

    monkeypatch.setattr(CODES["particle"], "move", fail)
    with pytest.warns(UserWarning, match="particle is left out: .*nothing to divide by"):
        found = compare(job(pipe, methods="plain,particle,sparke"), tmp_path)
    assert found.made == 8
    assert list(found.failed) == ["particle"]
    assert found.run.groups()["particle", "0.3"] == {}


def test_too_little_memory_in_the_run_stops_it_with_advice(pipe, tmp_path, monkeypatch):
    def fail(self, m):
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(CODES["particle"], "move", fail)
    with pytest.raises(RunFailedError, match="give a smaller batch_size; finished images are safe"):
        compare(job(pipe, methods="plain,particle"), tmp_path)


def test_a_plan_counts_what_is_left_and_writes_nothing(pipe, tmp_path):
    found = plan(job(pipe), tmp_path / "none", processes=2)
    assert not (tmp_path / "none").exists()
    assert (found.images, found.finished, found.processes) == (8, 0, 2)
    assert set(found.seconds) == {"plain", "sparke"}
    assert found.hours == pytest.approx(4 * sum(found.seconds.values()) / 2 / 3600)
    assert found.disk_bytes > 0
    compare(job(pipe, prompts=("a red heart",)), tmp_path)
    assert plan(job(pipe), tmp_path).finished == 4


def test_times_of_many_steps_are_computed_from_few(pipe, tmp_path, monkeypatch):
    seen = []
    original = type(pipe).__call__

    @functools.wraps(original)
    def count(self, *args, **kwargs):
        seen.append(kwargs["num_inference_steps"])
        return original(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", count)
    call = {**job(pipe).call, "num_inference_steps": 100}
    found = plan(job(pipe, methods="plain", call=call), tmp_path)
    assert seen == [2, 2, 4]
    assert found.timed_steps == 4


def test_start_noises_give_the_images_of_their_seeds(pipe):
    small = job(pipe)
    sampler, case = Sampler(pipe, small.call, 3, 2), Case.of(0, 0, "a red heart", 3)
    start = sampler.start(case, 3)
    assert start.shape[0] == 3
    for a, b in zip(sampler.run(case, 3), sampler.run(case, 3, start), strict=True):
        assert a.tobytes() == b.tobytes()
    assert sampler.radius_cases == ()
    assert Sampler(pipe, small.call, 3, 2, [case]).radius_unit() > 0


COMMAND = ("bench", "--methods", "plain,sparke", "--prompts", "bundled:3", "--images", "2", "--steps", "2",
           "--metrics", "vendi", "--out")  # fmt: skip


@pytest.mark.slow
def test_a_killed_command_continues_with_the_same_images(tmp_path):
    command = [sys.executable, "-m", "kspec_guidance", *COMMAND, str(tmp_path / "killed")]
    killed = Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    records = tmp_path / "killed" / "records" / "rank-0000.jsonl"
    while killed.poll() is None and not (records.exists() and records.read_text().count("\n") >= 4):
        time.sleep(0.02)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    for name in ("killed", "whole"):
        result = call(*COMMAND, tmp_path / name)
        assert result.exit_code == 0, result.output
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")
    assert (tmp_path / "killed" / "bench.html").exists()


@pytest.mark.slow
def test_two_processes_make_the_images_of_one(tmp_path):
    several = ["torchrun", "--standalone", "--nproc-per-node", "2", "-m"]
    launch([*several, "kspec_guidance", *COMMAND, str(tmp_path / "two")])
    assert call(*COMMAND, tmp_path / "one").exit_code == 0
    assert digests(tmp_path / "two") == digests(tmp_path / "one")
    assert len(list((tmp_path / "two" / "records").glob("rank-*.jsonl"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sd-1.5", "sd-3.5-medium"])
def test_methods_give_the_images_of_the_cpu_on_a_device_that_mixes_with_no_other(name):
    codes = ",".join(code for code, method in CODES.items() if unfit(method, RECIPES[name]) is None)
    small = small_job(name, codes, ("a red heart",), images=3, batch_size=3)

    def made():
        sampler = small.sampler()
        return {c.code: sampler.sample(small.make(c, c.chosen), small.case(0)) for c in small.methods}

    expected = made()
    with SimulatedDevice() as device:
        small.pipe.to(device.device)
        found = made()
    for code, images in expected.items():
        for a, b in zip(images, found[code], strict=True):
            difference = torch.tensor(list(a.tobytes())) - torch.tensor(list(b.tobytes()))
            assert difference.abs().max() <= 1, code


def test_the_embedded_pipeline_has_what_its_recipe_says():
    assert type(load_demo_pipeline()).__name__ == RECIPES["demo"].pipeline
