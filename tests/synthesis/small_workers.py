"""Runs with leases for the tests: workers of this process, whose batches take no time, on storage that fails as asked."""

import threading
from contextlib import contextmanager, nullcontext
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.synthesis import synthesize
from kspec_guidance.synthesis.assignment import units_of
from kspec_guidance.synthesis.distributed import OneProcess
from kspec_guidance.synthesis.elastic import work
from kspec_guidance.synthesis.generator import GeneratedBatch, Generator
from kspec_guidance.synthesis.leases import Leases
from kspec_guidance.synthesis.run import prepared
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import UnitLog, load_images

PROMPTS = ["heart", "red heart", "runner", "runner, woman", "cat face"]
DEFAULTS = {
    "call": {"num_inference_steps": 1}, "images_per_prompt": 7, "batch_size": 3, "seed": 0, "quotas": None, "target": None,
    "filter": None, "duplicates": None, "candidates": 1, "start_candidates": 1, "arms": None, "select": "mixture-greedy",
    "reward": None, "memory": "auto", "memory_by": "all", "exchange": 2, "format": "imagefolder", "shard_size": 8,
    "embedder": None, "licence": "CC0-1.0", "marks": True, "sign": None, "lease_seconds": 10.0,
}  # fmt: skip
DIRECTIONS = {"heart": (1.0, 0.0), "runner": (0.6, 0.8), "cat face": (-1.0, 0.0)}  # heart and runner repel each other


def _features(self, texts, batch_size=None):
    rows = []
    for text in texts:
        first = next(key for key in DIRECTIONS if key in text)
        rows.append([*DIRECTIONS[first], 0.01 * len(text)])
    x = torch.tensor(rows)
    return x / x.norm(dim=1, keepdim=True)


def _make(self, batch):
    """Images that depend on the seeds and on all entries of the memory."""
    memory = self.guide.memory
    earlier = float(memory.x.double().sum()) if len(memory) and hasattr(memory, "x") else 0.0
    x, images = [], []
    for sample in batch:
        noise = torch.randn(1, 2, 2, generator=torch.Generator().manual_seed(sample.seed))
        x.append(noise + 0.1 * np.sin(earlier))
        values = (x[-1].flatten() * 40 + 128).clamp(0, 255).to(torch.uint8).numpy()
        images.append(Image.fromarray(np.tile(values[:3], (4, 4, 1)) + np.arange(16, dtype=np.uint8).reshape(4, 4, 1)))
    return GeneratedBatch(images, torch.stack(x), self.prompt_features([s.job.prompt.text for s in batch]))


def without_model(monkeypatch):
    """Let batches be made without running the pipeline."""
    monkeypatch.setattr(Generator, "make", _make)
    monkeypatch.setattr(Generator, "prompt_features", _features)
    monkeypatch.setattr(Generator, "one_step", lambda self, texts: None)
    monkeypatch.setattr("kspec_guidance.synthesis.assignment.LARGE_UNITS", 2)  # so that groups are not split
    monkeypatch.setattr(KernelGuidance, "attach", lambda self, pipe: nullcontext())


@contextmanager
def small_run(pipe, prompts=PROMPTS, guide=None, **changes):
    with prepared(prompts, pipe, guide, OneProcess(), **DEFAULTS | changes) as run:
        yield run


def make(out, pipe, prompts=PROMPTS, **changes):
    settings = {
        "images_per_prompt": 7, "batch_size": 3, "exchange": 2, "call": {"num_inference_steps": 1}, "report": False,
        "licence": "CC0-1.0", "workers": 1, "sign": None,
    }  # fmt: skip
    return synthesize(prompts, out, pipe, **settings | changes)


class Killed(BaseException):
    """The end of a process without any further action."""


class FailingStorage(Storage):
    """Storage of a worker that is killed, or paused, at one of its operations."""

    def __init__(self, place, kill_at=None, pause_before=None):
        super().__init__(place, sleep=lambda seconds: None)
        self.kill_at, self.pause_before, self.operations, self.dead = kill_at, pause_before, 0, False

    def _repeated(self, operation):
        self.operations += 1
        if self.dead or self.operations == self.kill_at:
            self.dead = True
            raise Killed
        return super()._repeated(operation)

    def create(self, name, data):
        if self.pause_before is not None and name.startswith("rank-0000"):
            pause, self.pause_before = self.pause_before, None
            pause(name)
        return super().create(name, data)


class Clock:
    """A clock that is off by some seconds, and goes on when told."""

    def __init__(self, now=0.0):
        self.now = now

    def __call__(self):
        return self.now

    def sleep(self, seconds):
        self.now += max(seconds, 1.0)


def one_worker(run, storage, clock=None, out=None, name=None, in_order=True):
    """Work until all units are finished; returns the number of images made."""
    clock = clock or Clock()
    store = Store(out or storage.folder)
    units = units_of(run, run.jobs(), storage)
    leases = Leases(storage, units.number, run.arguments["lease_seconds"], name, clock)
    return work(
        run, store, UnitLog(storage), units, leases, run.jobs, in_order=in_order, sleep=lambda s: clock.sleep(3 * s)
    )


def made_by(storage, units):
    """All records, by unit, and the images on the storage by file name, with how often each is listed."""
    log = UnitLog(storage)
    records = {unit: [record for record, _ in log.records(unit)] for unit in range(units)}
    names = [row["file_name"] for unit in records.values() for record in unit for row in record.rows]
    images = {}
    for unit in records.values():
        for record in unit:
            images |= load_images(storage, record) or {}
    return records, names, images


def in_threads(functions):
    """Run functions at the same time; an error of one is raised."""
    errors = []

    def guarded(function):
        try:
            function()
        except Killed:
            pass
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(function,)) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def without_lease(record):
    return replace(record, lease=None, time=None)


def broken(image, row):
    """A filter that fails."""
    raise ValueError("broken here")
