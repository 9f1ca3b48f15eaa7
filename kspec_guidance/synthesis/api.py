"""synthesize: prompts in, a dataset of varied images out."""

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.loop.components import denoiser_of, find_scheduler
from kspec_guidance.memory import MemoryBank
from kspec_guidance.memory.io import read_tensors, write_tensors
from kspec_guidance.objectives import Balance
from kspec_guidance.synthesis.errors import SynthesisError, explained
from kspec_guidance.synthesis.export import FORMATS, Packer
from kspec_guidance.synthesis.filters import Filter, Screen
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.jobs import Job, make_jobs
from kspec_guidance.synthesis.processes import Processes
from kspec_guidance.synthesis.prompts import Prompt, read_prompts
from kspec_guidance.synthesis.quotas import Attribute, split_quotas
from kspec_guidance.synthesis.records import Store
from kspec_guidance.synthesis.sharding import shard, shard_groups
from kspec_guidance.synthesis.targets import Target
from kspec_guidance.synthesis.worker import Progress, Settings, Worker, back, check_memory
from kspec_guidance.utils.hashing import fingerprint

__all__ = ["Synthesis", "synthesize"]


@dataclass
class Synthesis:
    """What a run did. Times and what was sent are this process's and this call's; the rest is the whole set's."""

    out: Path
    images: int
    rejected: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    made: int = 0
    seconds: float = 0.0
    guidance_seconds: float = 0.0
    exchanges: int = 0
    bytes_sent: int = 0
    report: Path | None = None
    first: bool = True  # of several processes, this is the one that speaks for all

    def __str__(self) -> str:
        lines = [f"{self.images} images in {self.out}"]
        if self.made != self.images:
            lines[0] += f", {self.made} of them made now"
        for name in ("rejected", "stopped", "attributes"):
            found = getattr(self, name)
            if found:
                lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in sorted(found.items())))
        if self.seconds:
            lines.append(f"{self.seconds:.1f} s, of which guidance {self.guidance_seconds:.1f} s")
        return "\n".join(lines)


def synthesize(
    prompts: Any,
    out: str | Path,
    pipe: Any = None,
    guide: KernelGuidance | None = None,
    images: int = 8,
    batch: int = 8,
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    quotas: Mapping[str, int | Attribute] | None = None,
    target: str | Target | None = None,
    filter: Filter | None = None,
    duplicates: float | None = None,
    memory: str = "auto",
    memory_by: str = "all",
    exchange: int = 8,
    format: str = "imagefolder",
    shard_size: int = 1000,
    embedder: ImageEmbedder | str | None = None,
    report: bool = True,
    force: bool = False,
    tick: Callable[[Progress], None] | None = None,
    memory_file: str | Path | None = None,
) -> Synthesis:
    """Make a dataset: each image kept away from the earlier images *of similar prompts*, over the whole run.

    Run it again after any end, a crash as well, and it goes on: what is finished is never made twice, and the set is the
    same as that of a run that never stopped. Under ``accelerate launch`` or ``torchrun`` the processes share the prompts
    out and tell each other of their images at set intervals.

    The important arguments are the first six; the others are for those who need them.

    Args:
        prompts: whatever :func:`read_prompts` takes: a list, a file, a dataset.
        out: the folder; ``metadata.jsonl`` in it makes ``datasets.load_dataset("imagefolder", data_dir=out)`` work.
        pipe: a text-to-image pipeline; the embedded one by default.
        guide: :class:`SPARKE` by default; ``SPARKE(0)`` is plain sampling. Images that its memory holds are heeded, and
            then it learns the new ones; an empty memory is left alone.
        images: of each prompt.
        batch: images made at once; they repel each other directly.
        call: arguments of every pipeline call, such as ``num_inference_steps``, ``guidance_scale``, ``height``.
        seed: of the run; an image's own seed follows from it, its prompt and its attempt.
        quotas: ``{"group": number}`` of images of a group of prompts, instead of ``images`` each; and
            ``{"name": Attribute(reference, share)}`` to keep attributes in wanted shares.
        target: ``"vendi>=12"`` or a :class:`Target`: a prompt stops before ``images`` when its score is that high.
        filter: called with an image and its metadata; True keeps it, False or a reason drops it. What is dropped is made
            again, with another seed.
        duplicates: drop images whose features have this cosine with an image that this process kept.
        memory: ``auto`` (see :func:`choose_memory`), ``exact``, ``centroids``, or ``guide`` for what the guide brings; what
            it brings with settings of its own, or with entries, is taken in any case.
        memory_by: ``group`` gives each group of prompts a memory of its own.
        exchange: batches between two exchanges of the processes' memories.
        format: ``imagefolder``, ``webdataset`` or ``parquet``; ``shard_size`` images to a shard of the last two.
        embedder: features for scores, targets and duplicates; the samples themselves by default, at no cost.
        report: write ``report.html`` at the end, of 5,000 images at most.
        force: go on although settings changed or something is damaged; finished images are kept and counted.
        tick: called with a :class:`Progress` after each batch.
        memory_file: where to save an exact memory of the whole set at the end, with what the guide's held before.

    Raises:
        SynthesisError: for whatever cannot work, before anything is made where that is possible.
    """
    out, call = Path(out), dict(call or {})
    for name, value in (("images", images), ("batch", batch), ("exchange", exchange), ("shard_size", shard_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < (0 if name == "images" else 1):
            raise SynthesisError(f"{name} must be a whole number of at least 1, got {value!r}")
    if format not in FORMATS:
        raise SynthesisError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    check_memory(memory, memory_by)
    found, goal = read_prompts(prompts), Target.parse(target)
    counts, attributes = split_quotas(quotas)
    screen = Screen(duplicates, filter)
    processes = Processes()
    if pipe is None:
        from kspec_guidance.demo import load_demo_pipeline

        pipe, call = load_demo_pipeline(), {"num_inference_steps": 20, "guidance_scale": 5.0} | call
        pipe.set_progress_bar_config(disable=True)
    guide = SPARKE() if guide is None else guide
    if len(guide.memories) > 1:
        raise SynthesisError(
            f"this guide keeps {len(guide.memories)} memories in different spaces, and a run keeps one; let its terms work "
            "in one space"
        )
    make_jobs(found, images, counts)  # quotas of unknown groups are refused before anything is written
    balance = None
    before, held = (guide.remember, [term.memory for term in guide.terms]), len(guide.memory)
    try:
        if attributes:
            balance = Balance([a.reference for a in attributes.values()])
            drawn = KernelGuidance(balance, 0.7, stop=0.6, transforms=("off_score", "rescale"))
            working = guide + drawn
        else:
            working = guide
        generator = Generator(pipe, working, call)
        if isinstance(embedder, str):
            from kspec_guidance.evaluation.embedders import image_embedder

            embedder = image_embedder(embedder)
        about = {
            "prompts": _prompts_digest(found, images, counts),
            "images": images,
            "batch": batch,
            "seed": seed,
            "pipeline": _pipeline(pipe),
            "call": json.loads(json.dumps(call, default=str)),
            "guide": _guide(guide),
            "attributes": {k: {"share": a.share, "reference": _digest(a.reference)} for k, a in attributes.items()},
            "target": None if goal is None else asdict(goal),
            "filter": None if filter is None else getattr(filter, "__qualname__", type(filter).__name__),
            "duplicates": duplicates,
            "memory": [memory, memory_by, len(guide.memory)],
            "samples": _meaning(pipe, guide, call, embedder),
            "format": [format, shard_size if format != "imagefolder" else None],
            "processes": processes.world,
            "exchange": exchange if processes.world > 1 else None,
        }
        store = Store(out, None if format == "imagefolder" else out / ".kspec" / "images")
        packer = None if format == "imagefolder" else Packer(store, format, shard_size)
        _open(store, processes, about, force)
        try:
            jobs = make_jobs(found, images, counts, _numbers(store))
            owners, texts = _share_out(store, processes, generator, jobs, batch, memory_by == "group")
            settings = Settings(
                batch, seed, memory, memory_by, exchange, goal,
                hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12], sum(j.goal for j in jobs),
            )  # fmt: skip
            worker = Worker(
                generator, working, [j for j, o in zip(jobs, owners, strict=True) if o == processes.rank], settings, store,
                processes, screen, embedder, packer, balance, {k: a.share for k, a in attributes.items()}, texts,
                tick if processes.rank == 0 else None,
            )  # fmt: skip
            worker.resume()
            already, began = worker.made, time.perf_counter()
            worker.run()
            seconds = time.perf_counter() - began
            if packer is not None:
                packer.finish(store.epoch, processes.rank)
            processes.wait()
            result = Synthesis(out, 0, made=worker.made - already, seconds=seconds)
            result.guidance_seconds, result.exchanges = generator.guidance_seconds, worker.exchanges
            result.bytes_sent, result.first = processes.sent, processes.rank == 0
            _conclude(store, processes, worker, result, report, embedder)
            if memory_file is not None and result.first:
                save_memory(store, before[1][0], held, Path(memory_file))
            return result
        finally:
            if processes.rank == 0:
                store.unlock()
    finally:
        guide.remember = before[0]
        for term, old in zip(guide.terms, before[1], strict=True):
            term.memory = old


def _open(store: Store, processes: Processes, about: dict[str, Any], force: bool) -> None:
    """Process 0 claims and prepares the folder; all learn whether it could."""
    failure: SynthesisError | None = None
    if processes.rank == 0:
        try:
            store.lock()
            rows = store.begin(about, force)
            store.clean({row["file_name"] for row in rows})
            if store.images == store.out:
                store.write_metadata(rows)
        except SynthesisError as error:
            store.unlock()
            failure = error
    if processes.world > 1:
        said = processes.text("" if failure is None else str(failure))
        if said and failure is None:
            raise SynthesisError(f"process 0 could not begin: {said}")
        store.epoch = processes.numbers(store.epoch)[0][0]
    if failure is not None:
        raise failure


def _numbers(store: Store) -> dict[str, int]:
    """Numbers that prompts have had in earlier epochs."""
    found: dict[str, int] = {}
    for record in store.records([e for e in store.epochs() if e < store.epoch]):
        for row in record.rows:
            found.setdefault(row["prompt"], row["prompt_number"])
    return found


def _share_out(
    store: Store, processes: Processes, generator: Generator, jobs: list[Job], batch: int, by_group: bool
) -> tuple[list[int], list[Tensor] | None]:
    """Which process has which prompt, and each one's prompt features; kept in a file for resumed runs."""
    if processes.world == 1:
        return [0] * len(jobs), None
    if by_group:  # each memory in one process: there is nothing to exchange
        return shard_groups([job.prompt.group for job in jobs], [job.goal for job in jobs], processes.world), None
    path = store.folder(store.epoch) / "prompts.safetensors"
    if not processes.numbers(int(path.exists()))[0][0]:
        part = generator.prompt_features([job.prompt.text for job in jobs[processes.rank :: processes.world]], batch)
        every = processes.gather(torch.zeros(0, 1) if part is None else part)
        seen = sum(len(p) for p in every) == len(jobs)
        features = torch.zeros(len(jobs), every[0].shape[1] if seen else 1)
        if seen:
            for rank, rows in enumerate(every):
                features[rank :: processes.world] = rows
        owners = shard(features, [job.goal for job in jobs], processes.world)
        if processes.rank == 0:
            tensors = {"features": features, "owners": torch.tensor(owners)}
            with explained(store.out):
                write_tensors(path, "prompts", tensors, {"seen": seen}, durable=True)
        processes.wait()
    tensors, about = read_tensors(path, "prompts")
    owner = tensors["owners"]
    rows = tensors["features"] if about["seen"] else tensors["features"][:, :0]
    return owner.tolist(), [rows[owner == r] for r in range(processes.world)]


def _conclude(
    store: Store,
    processes: Processes,
    worker: Worker,
    result: Synthesis,
    report: bool,
    embedder: ImageEmbedder | None,
) -> None:
    """Process 0 puts the whole set's metadata, numbers and page in place."""
    rows = store.finish()
    result.images = len(rows)
    result.rejected = dict(Counter(row["reason"] for record in store.records() for row in record.rejected))
    result.attributes = dict(Counter(row["attribute"] for row in rows if "attribute" in row))
    reasons = sorted(
        {"all images made", "target reached", "most images made", "more images add little", "too many rejected"}
    )
    mine = Counter(job.stopped or "all images made" for job in worker.jobs)
    every = processes.numbers(*(mine.get(reason, 0) for reason in reasons))
    totals = [sum(column) for column in zip(*every, strict=True)]
    result.stopped = {reason: total for reason, total in zip(reasons, totals, strict=True) if total}
    if processes.rank == 0:
        if store.images == store.out:
            store.write_metadata(rows)
        said = {k: getattr(result, k) for k in ("images", "rejected", "stopped", "attributes")}
        if worker.packer is not None:
            worker.packer.finish_earlier()
        store.write_summary(said)
        if report and len(rows) > 1:
            from kspec_guidance.synthesis.report import write_report

            result.report = write_report(store.out, rows, said, embedder)
    processes.wait()


def save_memory(store: Store, brought: Any, held: int, path: Path) -> None:
    """The ``held`` entries that the guide's memory had at first, and every image of the set, as one exact memory."""
    whole = MemoryBank(getattr(brought, "space", None), getattr(brought, "prompt_encoder", None))
    if isinstance(brought, MemoryBank) and held:
        prompts = brought.prompts
        whole.add(brought.x[:held].reshape(held, *(brought.shape or ())), None if prompts is None else prompts[:held])
    for record in store.records(tensors=True):
        x, t, _ = back(record.tensors)
        if len(x):
            whole.add(x, t)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        whole.save(path)


# -- what makes two runs the same --------------------------------------------------------------------------------------


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()[:12]


def _prompts_digest(prompts: Sequence[Prompt], images: int, quotas: Mapping[str, int]) -> dict[str, Any]:
    said = [[p.text, p.group, p.images, p.times] for p in prompts]
    return {
        "number": len(prompts),
        "first": prompts[0].text,
        "digest": hashlib.sha256(json.dumps(said).encode()).hexdigest()[:12],
        "quotas": dict(quotas),
    }


def _pipeline(pipe: Any) -> dict[str, Any]:
    """Class, weights of the denoiser as far as a sample of them tells, and the scheduler with its settings."""
    denoiser = denoiser_of(pipe)
    try:
        scheduler = find_scheduler(pipe)
        settings = {k: v for k, v in dict(scheduler.config).items() if not str(k).startswith("_")}
        named = {"class": type(scheduler).__name__, "digest": _text_digest(settings)}
    except (AttributeError, ValueError):
        named = {"class": "none", "digest": ""}
    return {
        "class": type(pipe).__name__,
        "denoiser": "none" if denoiser is None else fingerprint(denoiser),
        "dtype": str(getattr(pipe, "dtype", None)),
        "scheduler": named,
    }


def _meaning(pipe: Any, guide: KernelGuidance, call: dict[str, Any], embedder: ImageEmbedder | None) -> dict[str, Any]:
    """What decides how the tensors of a record are to be read."""
    try:
        space: Any = guide.terms[0].space.describe()
    except TypeError:  # a space of someone's own
        space = guide.terms[0].space.name
    return {
        "pipeline": [type(pipe).__name__, _pipeline(pipe)["denoiser"]],
        "space": json.loads(json.dumps(space, default=str)),
        "size": [call.get("height"), call.get("width")],
        "embedder": None if embedder is None else [embedder.name, embedder.fingerprint],
    }


def _text_digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:12]


def _guide(guide: KernelGuidance) -> dict[str, Any]:
    try:
        said, tensors = guide.to_config()
    except TypeError:  # someone's own kernel or objective, which has no settings to be compared
        return {"guide": type(guide).__name__, "terms": [type(term.objective).__name__ for term in guide.terms]}
    return {**said, "tensors": {k: _digest(v) for k, v in tensors.items()}}
