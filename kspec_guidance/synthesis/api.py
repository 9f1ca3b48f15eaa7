"""synthesize: prompts in, a dataset of varied images out."""

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import torch

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.selection import Selector
from kspec_guidance.synthesis.arms import Arm
from kspec_guidance.synthesis.assignment import share_out
from kspec_guidance.synthesis.conclusion import Ending, conclude
from kspec_guidance.synthesis.deduplication import check_cosine
from kspec_guidance.synthesis.distributed import OneProcess, Processes
from kspec_guidance.synthesis.elastic import join_run, run_with_workers
from kspec_guidance.synthesis.engines import ENGINES
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.filters import Filter
from kspec_guidance.synthesis.folder import open_folder, prompt_numbers
from kspec_guidance.synthesis.publication import compare_with_original
from kspec_guidance.synthesis.quotas import Attribute
from kspec_guidance.synthesis.reproduction import Recipe, read_recipe
from kspec_guidance.synthesis.result import Synthesis
from kspec_guidance.synthesis.rewards import Reward
from kspec_guidance.synthesis.run import Run, prepared
from kspec_guidance.synthesis.schedule import Target
from kspec_guidance.synthesis.settings import check_counts
from kspec_guidance.synthesis.signing import AUTO, resolve_sign
from kspec_guidance.synthesis.stages import ScoreFilter
from kspec_guidance.synthesis.worker import Progress
from kspec_guidance.utils.arguments import is_number, renamed_arguments

__all__ = ["Synthesis", "reproduce", "synthesize"]


@renamed_arguments(images="images_per_prompt", batch="batch_size", tick="progress_callback")
@torch.inference_mode(False)  # tensors of inference mode could not be added to a memory, nor used by gradients
@torch.no_grad()
def synthesize(
    prompts: Any,
    out: str | Path | None,
    pipe: Any = None,
    guide: KernelGuidance | None = None,
    images_per_prompt: int = 8,
    batch_size: int = 8,
    *,
    call: Mapping[str, Any] | None = None,
    seed: int = 0,
    quotas: Mapping[str, int | Attribute] | None = None,
    target: str | Target | None = None,
    filter: Filter | ScoreFilter | str | Sequence[Filter | ScoreFilter | str] | None = None,
    duplicates: float | None = None,
    candidates: int = 1,
    start_candidates: int = 1,
    arms: Sequence[Arm] | None = None,
    select: str | Selector = "mixture-greedy",
    reward: Reward | None = None,
    memory: str = "auto",
    memory_by: str = "all",
    exchange: int = 8,
    format: str = "imagefolder",
    shard_size: int = 1000,
    embedder: ImageEmbedder | str | None = None,
    report: bool = True,
    licence: str | None = None,
    marks: bool = True,
    sign: str | Path | None = AUTO,
    push_to_hub: str | None = None,
    semantic_duplicates: float | None = None,
    drop: Collection[str] = (),
    force: bool = False,
    progress_callback: Callable[[Progress], None] | None = None,
    memory_file: str | Path | None = None,
    recipe: Recipe | None = None,
    workers: int | None = None,
    engine: str = "processes",
    join: str | Path | None = None,
    lease_seconds: float = 120.0,
) -> Synthesis:
    """Make a dataset in which each image is repelled by the earlier images *of similar prompts*, over the whole run.

    A run that ended in any way, a crash included, continues when it is started again: finished images are never made
    twice, and the set is the same as that of a run without interruption. Under ``accelerate launch`` or ``torchrun`` the
    prompts are shared out among the processes, which exchange their samples at fixed intervals. With ``workers`` or
    ``join``, workers may come and go: see ``docs/scaling.md``.

    The first six arguments are the important ones.

    Args:
        prompts: a list, a file or a dataset, see :func:`read_prompts`.
        out: the folder, or None with ``join``; ``datasets.load_dataset("imagefolder", data_dir=out)`` reads it.
        pipe: a text-to-image pipeline; the embedded one by default.
        guide: :class:`SPARKE` by default; ``SPARKE(0)`` is plain sampling. If its memory holds samples, they repel the new
            images, which are then added to it; an empty memory with default settings is left empty.
        images_per_prompt: number of images of each prompt.
        batch_size: images made at once; they repel each other directly.
        call: arguments of every pipeline call, such as ``num_inference_steps``, ``guidance_scale``, ``height``; a
            ``negative_prompt``, ``prompt_2`` and the like is one text, for all images.
        seed: of the run; the seed of an image depends on it, the prompt and the attempt.
        quotas: ``{"group": number}`` of images of a group of prompts, in place of ``images_per_prompt``; and
            ``{"name": Attribute(reference, share)}`` for attributes in wanted shares.
        target: ``"vendi>=12"`` or a :class:`Target`: stop a prompt before ``images_per_prompt`` once its score is reached.
        filter: one or several, applied in order: a function, called with an image and its metadata, of which True keeps it,
            and False or a reason drops it; a :class:`ScoreFilter`, or its text (``blur<=0.6``, ``agreement>=25``, see
            :func:`~kspec_guidance.synthesis.stages.parse_score_filter`). Dropped images are made again, with other seeds.
        duplicates: drop images whose features have at least this cosine with those of an image that this process kept.
        candidates: images made for each one that is kept. Of those that are not dropped, the one is kept that adds most to
            the entropy of the batch and of the prompt's earlier images, given the prompts; see
            :func:`~kspec_guidance.synthesis.candidates.choose_candidates`. At most ``batch_size``, which counts them all.
        start_candidates: noises drawn for each image, of which one is chosen by its first prediction, against memory and
            batch, for as many further denoiser calls a batch: for samplers of few steps, see
            :meth:`KernelGuidance.choose_start <kspec_guidance.guidance.KernelGuidance.choose_start>`.
        arms: two or more :class:`Arm`, settings of which each batch has one. Their images share one memory.
        select: chooses the arm of each batch from the images so far: ``mixture-greedy`` (the shares of the largest RKE),
            ``mixture-ucb``, ``greedy`` (the largest mean reward), ``uniform``; by the prompt of each image ``pak-ucb`` or
            ``rff-ucb`` (the largest reward that is expected), ``dak-ucb`` (reward and diversity), ``promptwise`` (a kept
            image at the least cost; its reward is 1 for a kept one); or a new
            :class:`~kspec_guidance.selection.Selector`. It is told the features at norm 1, the reward, the cost, and the
            embedding of the prompt at norm 1. Choices by prompt run one step for each prompt first.
        reward: with ``arms``, a function of an image and its metadata that returns a number, larger for better images; or
            a :class:`~kspec_guidance.evaluation.judges.PromptJudge` or its name, such as ``open_clip:NAME:FILE``. By
            default 1. The reward of an image that a filter drops is 0.
        memory: ``auto`` (see :func:`choose_memory`), ``exact``, ``centroids``, or ``guide`` for the kind of the guide's
            memory. A memory of the guide that has entries, or settings other than the default, is used in any case.
        memory_by: ``all``, or ``group`` for a memory of each group of prompts.
        exchange: batches between two exchanges of samples among the processes.
        format: ``imagefolder``, ``webdataset`` or ``parquet``.
        shard_size: images in a shard of ``webdataset`` or ``parquet``.
        embedder: features for scores, targets and duplicates, or their name; the samples themselves by default.
        report: write ``report.html`` at the end, of 2,000 images at most.
        licence: of the images, an SPDX identifier such as ``CC0-1.0``, for metadata, marks and card.
        marks: write into each image that a model made it (IPTC digital source type ``trainedAlgorithmicMedia``).
        sign: add a C2PA manifest to each image, signed with the certificate and key of this PEM file, or ``self-signed``:
            with a certificate of this process, which says so. ``auto`` is ``self-signed`` where c2pa-python is installed;
            None leaves signatures out. They are random: the same run has the same pixels, but the same bytes only without.
        semantic_duplicates: cosine of features, such as 0.95, from which an image repeats an earlier one of any prompt; at
            the end, the names of such images are written to ``semantic-duplicates.txt``, by an approximate index.
        drop: file names of finished images to leave out, as such lists have them; others are made in their place.
        push_to_hub: dataset repository of the Hugging Face hub, ``user/name``, to which the finished set is uploaded.
        force: continue although settings changed or something is damaged; finished images are kept and counted.
        progress_callback: called with a :class:`Progress` after each batch.
        memory_file: where to save, at the end, an exact memory of the entries of the guide's memory and of the whole set.
        recipe: of a set that this run is to make again, see :func:`reproduce`; other settings are refused.
        workers: number of processes that make groups of similar prompts, each with a memory of its own, and may end at any
            time. They read all settings from a file: functions must be importable, and the model have a name.
        engine: that starts them: ``processes`` of this machine, or ``ray``, on its cluster or on this machine.
        join: folder or URL (``s3://bucket/run``) that is shared by any number of workers, of which this process is one.
            Each is started with the same arguments, at any time. The set is made in ``out`` when all is finished; with
            ``out=None`` it is left to another worker.
        lease_seconds: after which a worker that shows no life counts as dead.

    Raises:
        SynthesisError: for arguments that do not fit each other or the pipeline, before any image is made if possible; if
            the folder cannot be written to; for changed settings or damaged records, without ``force``; if the pipeline or
            the filter fails, with the prompts and seeds of the batch, and their exception as its cause.
    """
    check_cosine(semantic_duplicates)
    sign = resolve_sign(sign, marks)
    leases = workers is not None or join is not None
    if out is None and join is None:
        raise SynthesisError("out is the folder of the set; only a worker that joins a run (join=) goes without")
    _check_leases(workers, engine, join, lease_seconds, drop, force)
    processes = OneProcess() if leases else Processes()
    with prepared(
        prompts, pipe, guide, processes, call=call, images_per_prompt=images_per_prompt, batch_size=batch_size, seed=seed,
        quotas=quotas, target=target, filter=filter, duplicates=duplicates, candidates=candidates,
        start_candidates=start_candidates, arms=arms, select=select, reward=reward, memory=memory, memory_by=memory_by,
        exchange=exchange, format=format, shard_size=shard_size, embedder=embedder, licence=licence, marks=marks, sign=sign,
        lease_seconds=float(lease_seconds) if leases else None,
    ) as run:  # fmt: skip
        history = None
        if recipe is not None:
            recipe.check(run.settings)
            history = recipe.read_history(len(run.prompts))
        ending = Ending(report, semantic_duplicates, memory_file, push_to_hub)
        if join is not None:
            return join_run(run, str(join), None if out is None else Path(out), ending, history, progress_callback)
        folder = Path(str(out))
        if workers is not None:
            return run_with_workers(
                run, folder, workers, engine, ending, force, drop, sign, work_on_recipe, history, progress_callback
            )  # fmt: skip
        return _run_in_step(run, folder, processes, ending, force, drop, progress_callback)


def _run_in_step(
    run: Run,
    out: Path,
    processes: Processes,
    ending: Ending,
    force: bool,
    drop: Collection[str],
    progress_callback: Callable[[Progress], None] | None,
) -> Synthesis:
    """Make a set in this process, or in those of torchrun, which exchange their samples after as many batches."""
    store = run.store(out)
    packer, generator, first = run.packer(store), run.generator, processes.rank == 0
    open_folder(store, processes, run.settings, force, run.types, drop)
    try:
        jobs = run.jobs(prompt_numbers(store))
        owners, prompt_features, contexts = share_out(
            store, processes, generator, jobs, run.arguments["batch_size"], run.arguments["memory_by"] == "group",
            run.by_prompt,
        )  # fmt: skip
        total = sum(job.goal for job in jobs)
        worker = run.worker(
            [job for job, owner in zip(jobs, owners, strict=True) if owner == processes.rank], total, store, processes,
            packer, prompt_features, contexts, progress_callback if first else None,
        )  # fmt: skip
        if first:
            ending.prepare(total, run.arguments["format"])
        worker.resume()
        generator.check_mixed(worker.jobs, run.arguments["batch_size"], run.screened)
        made_before, start = worker.made, perf_counter()
        worker.run()
        seconds = perf_counter() - start
        if packer is not None:
            packer.finish(store.epoch, processes.rank)
        made = worker.made - made_before
        result = Synthesis(
            out,
            images=0,
            made=made,
            total_made=sum(number for (number,) in processes.gather_integers(made)),
            seconds=seconds,
            guidance_seconds=generator.guidance_seconds,
            exchanges=worker.exchanges,
            bytes_sent=processes.bytes_sent,
            first=first,
        )
        return conclude(run, store, processes, worker, result, ending)
    finally:
        if first:
            store.unlock()


def _check_leases(
    workers: int | None, engine: str, join: Any, lease_seconds: float, drop: Collection[str], force: bool
) -> None:
    """Check the arguments of runs whose workers come and go."""
    if workers is not None:
        check_counts(workers=workers)
    if engine not in ENGINES:
        raise SynthesisError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")
    if engine != ENGINES[0] and workers is None:
        raise SynthesisError(f"engine {engine!r} starts the workers; give their number (workers=)")
    if workers is not None and join is not None:
        raise SynthesisError("workers are started here, and join makes this process one of a run; give one of them")
    if not (is_number(lease_seconds) and 0 < lease_seconds < float("inf")):
        raise SynthesisError(f"lease_seconds must be a positive number, got {lease_seconds!r}")
    if join is not None and (drop or force):
        raise SynthesisError("force and drop begin a new part of a set in its folder, and a worker that joins cannot")
    if (workers is not None or join is not None) and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SynthesisError("processes of torchrun work in step; start workers without it")


def work_on_recipe(files: Mapping[str, bytes], place: str, model: str, device: str | None, sign: str | None) -> int:
    """Join a run as a worker that was started by an engine; returns the number of images that it made.

    Args:
        files: the recipe of the run: reproduce.yaml, its prompts, and what its guide has.
        place: storage of the run.
        model: ``demo``, a folder, or an id of the hub.
        device: of the model.
        sign: as in :func:`synthesize`.
    """
    with TemporaryDirectory() as folder:
        for name, data in files.items():
            path = Path(folder, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        recipe = read_recipe(Path(folder, "reproduce.yaml"))
        recipe.model["name"] = model
        pipe = recipe.pipeline()
        if device not in (None, "cpu"):
            pipe.to(device)
        pipe.set_progress_bar_config(disable=True)
        return reproduce(Path(folder, "reproduce.yaml"), None, pipe, join=place, sign=sign).made


def reproduce(
    path: str | Path,
    out: str | Path | None,
    pipe: Any = None,
    *,
    report: bool = True,
    force: bool = False,
    progress_callback: Callable[[Progress], None] | None = None,
    join: str | Path | None = None,
    sign: str | Path | None = AUTO,
) -> Synthesis:
    """Make a set again from its ``reproduce.yaml`` and ``prompts.jsonl``, and compare its images with those beside them.

    Args:
        path: of ``reproduce.yaml``.
        out: the new folder.
        pipe: the pipeline that made the set, if it cannot be loaded by its name; its scheduler is replaced during the run.
        report: write ``report.html`` at the end.
        force: continue although settings changed or something is damaged.
        progress_callback: called with a :class:`Progress` after each batch.
        join: storage of the run that the file describes, of which this process is a worker.
        sign: as in :func:`synthesize`; ``auto`` leaves signatures out if the set has none.

    Raises:
        SynthesisError: for a file that cannot make the set again, or settings that differ, such as another model or number
            of processes; and those of :func:`synthesize`.
    """
    recipe = read_recipe(path)
    sign = None if sign == AUTO and not recipe.signed else sign
    pipe = recipe.pipeline(pipe)
    arguments = recipe.arguments() | ({} if join is None else {"workers": None})
    with recipe.scheduler_of(pipe):
        result = synthesize(
            out=out, pipe=pipe, report=report, force=force, progress_callback=progress_callback, recipe=recipe, join=join,
            sign=sign, **arguments,
        )  # fmt: skip
    if result.first and join is None:
        result.reproduced = compare_with_original(Path(path).parent, result.out)
    return result
