"""compare: images of all methods on one model, from the same seeds, into a folder that a broken-off run continues.

A group, the images of one prompt with one strength of a method, depends on nothing but the settings: each begins with a
new guide and an empty memory. So processes share the prompts without exchanges, and a run that was broken off gives the
images of one that was not.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.bench.methods import Method
from kspec_guidance.bench.methods.guides import TowardReference
from kspec_guidance.bench.models import Recipe
from kspec_guidance.bench.plan import Choice, text
from kspec_guidance.bench.prompts import BenchPrompt
from kspec_guidance.bench.sampler import Case, Sampler
from kspec_guidance.bench.store import PLAIN, Group, Run, Writer, begin_run, image_file, settings_in
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.marks import Marks
from kspec_guidance.synthesis.provenance import package_versions
from kspec_guidance.synthesis.settings import as_json, check_counts
from kspec_guidance.utils.hashing import hash_tensors
from kspec_guidance.utils.messages import readable_size, readable_time, warn_user

__all__ = ["Comparison", "Job", "Plan", "compare", "plan"]

TRIAL_STEPS = (2, 4)  # of a plan, from which the time of all steps is computed


@dataclass(frozen=True)
class Job:
    """What is compared on what.

    Attributes:
        pipe: the pipeline.
        recipe: of its model.
        prompts: in order.
        methods: with their strengths.
        images: of each prompt.
        batch_size: images made at once; within a batch they repel each other directly.
        seed: of the run.
        call: arguments of every call of the pipeline.
        reference: latents ``[m, ...]`` of reference images, for methods that need them.
        baseline: latents ``[b, ...]`` that the pipeline makes without guidance, for the same methods.
    """

    pipe: Any
    recipe: Recipe
    prompts: Sequence[BenchPrompt]
    methods: Sequence[Choice]
    images: int
    batch_size: int
    seed: int
    call: Mapping[str, Any]
    reference: Tensor | None = None
    baseline: Tensor | None = None

    def settings(self) -> dict[str, Any]:
        """What makes two runs the same, as JSON has it, and where it was run."""
        prompts = [
            {"index": k, "text": p.text} | ({"truth": p.truth} if p.truth else {}) for k, p in enumerate(self.prompts)
        ]
        reference = None if self.reference is None else hash_tensors({"reference": self.reference.float()}, digits=12)
        return {
            "model": {
                "name": self.recipe.model, "pipeline": type(self.pipe).__name__, "dtype": self.recipe.dtype,
                "call": as_json(dict(self.call)),
            },
            "steps": self.call.get("num_inference_steps"), "images": self.images, "batch_size": self.batch_size,
            "seed": self.seed, "reference": reference, "prompts": as_json(prompts),
            "methods": as_json([choice.describe() for choice in self.methods]), "device": self.device_name(),
            "versions": package_versions(),
        }  # fmt: skip

    def sampler(self) -> Sampler:
        """The pipeline as methods sample from it."""
        return Sampler(self.pipe, self.call, self.images, self.batch_size, [self.case(k) for k in range(len(self.prompts))])

    def case(self, prompt: int) -> Case:
        """The images of a prompt."""
        return Case.of(self.seed, prompt, self.prompts[prompt].text, self.images)

    def make(self, choice: Choice, value: float | None) -> Method:
        """A method at one of its strengths, with the references and the baseline if it needs them."""
        method = choice.make(value)
        if isinstance(method, TowardReference):
            method.reference, method.baseline = self.reference, self.baseline
        return method

    def device_name(self) -> str:
        """The name of the GPU, or ``cpu``."""
        device = self.sampler().device
        return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


@dataclass
class Comparison:
    """What a run has done.

    Attributes:
        run: its folder.
        made: images that this process made now.
        seconds: that it took.
        failed: methods that could not go on, with the error; the others have finished.
        first: whether this is the first process, which judges and prints for all.
    """

    run: Run
    made: int = 0
    seconds: float = 0.0
    failed: dict[str, str] = field(default_factory=dict)
    first: bool = True


def compare(job: Job, out: str | Path, progress: Callable[[int, int], None] | None = None) -> Comparison:
    """Make the images of a comparison that are not finished.

    Args:
        job: what is compared.
        out: folder of the run.
        progress: called with the number of finished images of this process, and of all that it makes.

    Raises:
        FolderError: if the folder holds another comparison or anything else, or another run writes to it.
        RunFailedError: if plain sampling fails, memory does not suffice, or the disk cannot be written to.
        SynthesisError: for arguments that the pipeline does not take.
    """
    check_counts(images=job.images, batch_size=job.batch_size)
    check_counts(0, seed=job.seed)
    sampler, processes, out = job.sampler(), Processes(), Path(out)
    lock = begin_run(out, job.settings()) if processes.rank == 0 else None
    try:
        processes.wait_for_all()
        run = Run(out)
        records = run.records()
        finished = {(r["method"], r["strength"], r["prompt"]) for r in records}
        plain_seconds = {r["prompt"]: r["seconds"] for r in records if r["method"] == PLAIN}
        todo = _todo(job, processes)
        done, result = sum(group in finished for group, *_ in todo), Comparison(run, first=processes.rank == 0)
        writer, began = Writer(out, processes.rank), time.perf_counter()
        if sampler.device.type == "cuda" and done < len(todo):
            _warm_up(sampler, job.case(0))
        for group, choice, value in todo:
            if group not in finished and choice.code not in result.failed:
                _make_group(job, sampler, writer, group, choice, value, plain_seconds, result)
                done += 1
                if progress is not None:
                    progress(done * job.images, len(todo) * job.images)
        result.seconds = time.perf_counter() - began
        processes.wait_for_all()
        return result
    finally:
        if lock is not None:
            lock.release()


def _todo(job: Job, processes: Processes) -> list[tuple[Group, Choice, float | None]]:
    """The groups of a process, finished or not: each prompt, with all methods, belongs to one process."""
    return [
        ((choice.code, text(value), prompt), choice, value)
        for prompt in range(processes.rank, len(job.prompts), processes.world_size)
        for choice in job.methods
        for value in choice.values
    ]


def _make_group(
    job: Job,
    sampler: Sampler,
    writer: Writer,
    group: Group,
    choice: Choice,
    value: float | None,
    plain_seconds: dict[int, float],
    result: Comparison,
) -> None:
    """Make and commit one group; a method that fails, but not plain sampling, is noted."""
    method, strength, prompt = group
    case = job.case(prompt)
    try:
        with sampler.caller.explained(f"method {method}", [case.prompt] * job.images, case.seeds):
            images, seconds, peak = _timed(sampler, job.make(choice, value), case)
    except SynthesisError as error:
        if method == PLAIN or isinstance(error.__cause__, torch.OutOfMemoryError):
            raise
        result.failed[method] = str(error)
        warn_user(f"{method} is left out: {error}")
        return
    share = seconds / job.images
    if method == PLAIN:
        plain_seconds[prompt] = share
    added = share - plain_seconds[prompt] if prompt in plain_seconds else None
    marks = Marks()
    records = [
        {
            "method": method, "strength": strength, "prompt": prompt, "number": k, "seed": case.seeds[k],
            "file": image_file(method, strength, prompt, k), "seconds": round(share, 5),
            "added_seconds": None if added is None else round(added, 5), "peak_bytes": peak,
        }
        for k in range(job.images)
    ]  # fmt: skip
    writer.commit([marks.encode(image, {"prompt": case.prompt}) for image in images], records)
    result.made += len(images)


def _timed(sampler: Sampler, method: Method, case: Case) -> tuple[list[Image.Image], float, int | None]:
    """The images of a group, the seconds that they took, and the largest memory of the device in that time."""
    device, cuda = sampler.device, sampler.device.type == "cuda"
    if hasattr(method, "radius_unit"):
        sampler.radius_unit()  # once for a process, and none of this group's time
    if cuda:
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    images = sampler.sample(method, case)
    if cuda:
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - began
    return images, seconds, torch.cuda.max_memory_allocated(device) if cuda else None


def _warm_up(sampler: Sampler, case: Case) -> None:
    """A run of few steps, after which times are those of a warm device."""
    steps = {"num_inference_steps": 2} if "num_inference_steps" in sampler.caller.call else {}
    short = Sampler(sampler.pipe, {**sampler.caller.call, **steps}, sampler.images, sampler.batch_size)
    short.run(case, sampler.batch_size)


# -- plans -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """What a run would take.

    Attributes:
        images: of all prompts, methods and strengths.
        finished: of these, those that the folder has.
        seconds: of an image, by method.
        total_seconds: of what is left, for all processes together.
        processes: that share the work.
        disk_bytes: of what is left.
        peak_bytes: of the device while images are made; None where it is not measured.
        timed_steps: of the runs from which the times are computed; None if all steps were run.
    """

    images: int
    finished: int
    seconds: dict[str, float]
    total_seconds: float
    processes: int
    disk_bytes: int
    peak_bytes: int | None
    timed_steps: int | None

    @property
    def hours(self) -> float:
        """Until the last process has finished, if all are as fast as this one."""
        return self.total_seconds / self.processes / 3600

    def __str__(self) -> str:
        steps = "all steps" if self.timed_steps is None else f"runs of up to {self.timed_steps} steps"
        each = f" on each of {self.processes} processes" if self.processes > 1 else ""
        memory = "" if self.peak_bytes is None else f"memory of the device: {readable_size(self.peak_bytes)}\n"
        return (
            f"{self.images} images, {self.finished} of them finished\n"
            f"about {readable_time(self.total_seconds / self.processes)} ({self.hours:.2f} hours){each}, by {steps} now\n"
            f"{memory}disk: about {readable_size(self.disk_bytes)} ({self.disk_bytes / 1e9:.3f} GB)\nnothing was written"
        )


def plan(job: Job, out: str | Path, processes: int | None = None) -> Plan:
    """Estimate a run from short runs of each method on the first prompt; nothing is written.

    Args:
        job: what is compared.
        out: folder of the run, of which finished images are counted.
        processes: that would share it; those of this program by default.

    Raises:
        FolderError: if the folder holds another comparison or anything else.
        RunFailedError: if a method fails.
    """
    out = Path(out)
    finished: set[Group] = set()
    settings_in(out, job.settings())
    if (out / "settings.json").exists():
        finished = {(r["method"], r["strength"], r["prompt"]) for r in Run(out).records()}
    steps = job.call.get("num_inference_steps")
    short = isinstance(steps, int) and steps > max(TRIAL_STEPS)
    counts = TRIAL_STEPS if isinstance(steps, int) and short else (steps,)
    seconds: dict[str, float] = {}
    peak, file_bytes = None, 0.0
    for choice in job.methods:
        times = []
        for count in (counts[0], *counts):  # the first is a warm-up
            trial = Sampler(
                job.pipe, {**job.call, "num_inference_steps": count} if count else job.call, job.images, job.batch_size,
                [job.case(k) for k in range(len(job.prompts))],
            )  # fmt: skip
            case = job.case(0)
            with trial.caller.explained(f"method {choice.code}", [case.prompt] * job.images, case.seeds):
                images, took, memory = _timed(trial, job.make(choice, choice.chosen), case)
            times.append(took)
            peak = memory if peak is None or memory is None else max(peak, memory)
            file_bytes = file_bytes or sum(len(Marks().encode(image, {})) for image in images) / len(images)
        total = times[-1]
        if short and isinstance(steps, int):
            total += (steps - TRIAL_STEPS[1]) * max(0.0, times[-1] - times[-2]) / (TRIAL_STEPS[1] - TRIAL_STEPS[0])
        seconds[choice.code] = total / job.images
    groups = [(c.code, text(v), k) for k in range(len(job.prompts)) for c in job.methods for v in c.values]
    left = [group for group in groups if group not in finished]
    world = processes or Processes().world_size
    return Plan(
        images=len(groups) * job.images,
        finished=(len(groups) - len(left)) * job.images,
        seconds=seconds,
        total_seconds=sum(seconds[method] for method, *_ in left) * job.images,
        processes=min(world, len(job.prompts)),
        disk_bytes=int(len(left) * job.images * (file_bytes + 300)),
        peak_bytes=peak,
        timed_steps=max(TRIAL_STEPS) if short else None,
    )
