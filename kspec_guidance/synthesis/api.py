"""synthesize: prompts in, a dataset of varied images out."""

import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.demo.pipeline import is_demo
from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.calibration import call_settings, find_calibration
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.guidance.targets import STATUSES
from kspec_guidance.memory import MemoryBank
from kspec_guidance.memory.io import read_tensors, write_tensors
from kspec_guidance.objectives import Balance
from kspec_guidance.selection import Selector
from kspec_guidance.synthesis.arm_models import ArmModels
from kspec_guidance.synthesis.arms import (
    BY_PROMPT,
    SELECTORS,
    Arm,
    ArmChoice,
    arm_differences,
    arm_summary,
    check_arms,
    describe_arms,
    make_selector,
)
from kspec_guidance.synthesis.columns import column_types
from kspec_guidance.synthesis.deduplication import SEMANTIC, check_cosine, write_semantic_duplicates
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError, disk_errors
from kspec_guidance.synthesis.export import FORMATS, Packer
from kspec_guidance.synthesis.filters import Filter, Screen, describe_filters, filter_stages, score_types
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.hub import HubUpload
from kspec_guidance.synthesis.marks import Marks
from kspec_guidance.synthesis.prompt_arms import PromptArms
from kspec_guidance.synthesis.prompts import Prompt, read_prompts
from kspec_guidance.synthesis.provenance import Provenance, check_licence, package_versions
from kspec_guidance.synthesis.publication import compare_with_original, write_publication
from kspec_guidance.synthesis.quotas import Attribute, split_quotas
from kspec_guidance.synthesis.records import Store, unpack_tensors
from kspec_guidance.synthesis.reproduction import Recipe, read_recipe, recipe_of
from kspec_guidance.synthesis.rewards import Reward, as_reward, reward_name
from kspec_guidance.synthesis.schedule import NO_TRY_PAYS, Job, Target, make_jobs
from kspec_guidance.synthesis.settings import (
    DIGITS,
    FEATURE_KEYS,
    Settings,
    as_json,
    check_candidates,
    check_counts,
    check_memory,
    describe_guide,
    describe_pipeline,
    describe_prompts,
    describe_samples,
)
from kspec_guidance.synthesis.sharding import shard, shard_groups
from kspec_guidance.synthesis.signing import Signer
from kspec_guidance.synthesis.stages import ScoreFilter
from kspec_guidance.synthesis.worker import Progress, Worker
from kspec_guidance.utils.arguments import renamed_arguments
from kspec_guidance.utils.hashing import hash_json, hash_tensors

__all__ = ["Synthesis", "reproduce", "synthesize"]

STOP_REASONS = (
    "all images made",
    "more images add little",
    "most images made",
    "target reached",
    "too many rejected",
    NO_TRY_PAYS,
)


@dataclass
class Synthesis:
    """The result of a run.

    Attributes:
        out: the folder.
        images: in the whole set.
        rejected: dropped images of the whole set, by reason.
        stopped: prompts of all processes, by the reason why they ended.
        attributes: images of the whole set, by attribute.
        targets: prompts of all processes, by what the guide's target has come to.
        made: images that this process made in this call.
        total_made: images that all processes made in this call.
        seconds: that this call took to make them.
        guidance_seconds: of these, the time of guidance.
        exchanges: between the processes.
        bytes_sent: by this process in this call.
        arms: of a run with arms: images, shares, costs and scores of each; see :func:`arm_summary`.
        arm_differences: of a run with arms: where the two with most images differ; see :func:`arm_differences`.
        report: path of ``report.html``; None if none was written, and in all processes but the first.
        semantic_duplicates: images that nearly repeat others of any prompt; None if they were not looked for.
        url: of the page of the set on the hub; None if it was not uploaded.
        first: whether this is the first process, which prints and writes for all.
        reproduced: of :func:`reproduce`: files of images that have the bytes, or the pixels, of those of the earlier set.
    """

    out: Path
    images: int
    rejected: dict[str, int] = field(default_factory=dict)
    stopped: dict[str, int] = field(default_factory=dict)
    attributes: dict[str, int] = field(default_factory=dict)
    made: int = 0
    total_made: int = 0
    seconds: float = 0.0
    guidance_seconds: float = 0.0
    targets: dict[str, int] = field(default_factory=dict)
    exchanges: int = 0
    bytes_sent: int = 0
    arms: dict[str, dict[str, Any]] = field(default_factory=dict)
    arm_differences: list[dict[str, Any]] = field(default_factory=list)
    report: Path | None = None
    semantic_duplicates: int | None = None
    url: str | None = None
    first: bool = True
    reproduced: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{self.images} images in {self.out}"]
        if self.total_made != self.images:
            lines[0] += f", {self.total_made} of them made now"
        for name in ("rejected", "stopped", "attributes", "targets"):
            counts = getattr(self, name)
            if counts:
                lines.append(f"{name}: " + ", ".join(f"{k} {v}" for k, v in sorted(counts.items())))
        if self.arms:
            lines.append("arms: " + ", ".join(f"{name} {100 * a['share']:.0f}%" for name, a in self.arms.items()))
        if self.semantic_duplicates is not None:
            lines.append(f"{self.semantic_duplicates} images nearly repeat others: {self.out / SEMANTIC}")
        if self.url is not None:
            lines.append(f"uploaded to {self.url}")
        if self.reproduced:
            lines.append("as before: " + ", ".join(f"{k} {v}" for k, v in self.reproduced.items() if v))
        if self.seconds:
            lines.append(f"{self.seconds:.1f} s, of which guidance {self.guidance_seconds:.1f} s")
        return "\n".join(lines)


@renamed_arguments(images="images_per_prompt", batch="batch_size", tick="progress_callback")
@torch.inference_mode(False)  # tensors of inference mode could not be added to a memory, nor used by gradients
@torch.no_grad()
def synthesize(
    prompts: Any,
    out: str | Path,
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
    sign: str | Path | None = None,
    push_to_hub: str | None = None,
    semantic_duplicates: float | None = None,
    drop: Collection[str] = (),
    force: bool = False,
    progress_callback: Callable[[Progress], None] | None = None,
    memory_file: str | Path | None = None,
    recipe: Recipe | None = None,
) -> Synthesis:
    """Make a dataset in which each image is repelled by the earlier images *of similar prompts*, over the whole run.

    A run that ended in any way, a crash included, continues when it is started again: finished images are never made
    twice, and the set is the same as that of a run without interruption. Under ``accelerate launch`` or ``torchrun`` the
    prompts are shared out among the processes, which exchange their samples at fixed intervals.

    The first six arguments are the important ones.

    Args:
        prompts: a list, a file or a dataset, see :func:`read_prompts`.
        out: the folder; ``datasets.load_dataset("imagefolder", data_dir=out)`` reads it.
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
        sign: add a C2PA manifest to each image, signed with the certificate and key of this PEM file, or ``self-signed``.
            Signatures are random: images have the same pixels again, but not the same bytes.
        semantic_duplicates: cosine of features, such as 0.95, from which an image repeats an earlier one of any prompt; at
            the end, the names of such images are written to ``semantic-duplicates.txt``, by an approximate index.
        drop: file names of finished images to leave out, as such lists have them; others are made in their place.
        push_to_hub: dataset repository of the Hugging Face hub, ``user/name``, to which the finished set is uploaded.
        force: continue although settings changed or something is damaged; finished images are kept and counted.
        progress_callback: called with a :class:`Progress` after each batch.
        memory_file: where to save, at the end, an exact memory of the entries of the guide's memory and of the whole set.
        recipe: of a set that this run is to make again, see :func:`reproduce`; other settings are refused.

    Raises:
        SynthesisError: for arguments that do not fit each other or the pipeline, before any image is made if possible; if
            the folder cannot be written to; for changed settings or damaged records, without ``force``; if the pipeline or
            the filter fails, with the prompts and seeds of the batch, and their exception as its cause.
    """
    out, call = Path(out), dict(call or {})
    check_counts(0, images_per_prompt=images_per_prompt)
    check_counts(batch_size=batch_size, exchange=exchange, shard_size=shard_size)
    check_candidates(candidates, batch_size)
    check_counts(None, seed=seed)
    if format not in FORMATS:
        raise SynthesisError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    check_memory(memory, memory_by)
    licence = check_licence(licence)
    check_cosine(semantic_duplicates)
    if sign is not None and not marks:
        raise SynthesisError("sign adds marks to images, and marks=False leaves them out; give one of them")
    image_marks = Marks(marks, None if sign is None else Signer(sign))
    prompt_list, prompt_target = read_prompts(prompts), Target.parse(target)
    counts, attributes = split_quotas(quotas)
    processes = Processes()
    hub = None if push_to_hub is None else HubUpload(push_to_hub)
    if pipe is None:
        from kspec_guidance.demo import load_demo_pipeline

        pipe, call = load_demo_pipeline(), {"num_inference_steps": 20, "guidance_scale": 5.0} | call
        pipe.set_progress_bar_config(disable=True)
    stages = filter_stages(filter, "demo" if is_demo(pipe) else "auto", str(getattr(pipe, "device", "cpu")))
    screen = Screen(duplicates, stages)
    guide, embedder_name = SPARKE() if guide is None else guide, embedder
    selector = models = None
    rewards = None if reward is None else as_reward(reward)
    if arms is not None:
        arms = list(arms)
        if any(term.target is not None for term in guide.terms):
            raise SynthesisError("arms set the strength of the guide, and so does its target; give one of them")
        check_arms(arms, pipe, call)
        told = "given" if rewards is not None else "kept or dropped" if screen.drops else ""
        selector, models = make_selector(select, arms, seed, processes.rank, told), ArmModels(arms, pipe)
    elif rewards is not None:
        raise SynthesisError("reward is told to the selector of arms; give arms=, or leave it out")
    if len(guide.memories) > 1:
        raise SynthesisError(
            f"this guide keeps {len(guide.memories)} memories in different spaces, but a run keeps one; give all terms the "
            "same space"
        )
    make_jobs(prompt_list, images_per_prompt, counts)  # refuses quotas of unknown groups before anything is written
    with _restored(guide):
        if guide.calibration is None:  # one factor for the whole run, whatever other machines have
            guide.calibration = processes.gather(torch.tensor([[_calibration(pipe, call)]], dtype=torch.float64))[0].item()
        guide_memory, entries = guide.memory, len(guide.memory)
        balance, run_guide = None, guide
        if attributes:
            balance = Balance([a.reference for a in attributes.values()])
            run_guide = guide + KernelGuidance(balance, 0.7, stop=0.6, transforms=("off_score", "rescale"))
        generator = Generator(pipe, run_guide, call)
        if processes.rank == 0:
            _warn_of_cut(generator, prompt_list)
        if isinstance(embedder, str):
            from kspec_guidance.evaluation.embedders import image_embedder

            embedder = image_embedder(embedder)
        types = column_types([prompt.extra for prompt in prompt_list])
        types |= score_types(stages, types)
        run_settings = {
            "prompts": describe_prompts(prompt_list, counts),
            "images_per_prompt": images_per_prompt,
            "batch_size": batch_size,
            "seed": seed,
            "pipeline": describe_pipeline(pipe),
            "call": call,
            "guide": describe_guide(guide),
            "attributes": {
                name: {"share": a.share, "reference": hash_tensors({"reference": a.reference}, digits=DIGITS)}
                for name, a in attributes.items()
            },
            "target": None if prompt_target is None else asdict(prompt_target),
            "filter": describe_filters(stages),
            "duplicates": duplicates,
            "memory": [memory, memory_by, entries],
            "samples": describe_samples(pipe, guide, call, embedder),
            "format": [format, shard_size if format != "imagefolder" else None],
            "processes": processes.world_size,
            "exchange": exchange if processes.world_size > 1 else None,
        }
        if candidates > 1:  # absent in runs of earlier versions
            run_settings["candidates"] = candidates
        if licence is not None:
            run_settings["licence"] = licence
        if not marks or image_marks.signer is not None:
            run_settings["marks"] = image_marks.describe()
        if arms is not None and models is not None:
            run_settings |= describe_arms(arms, select, models)
        if reward is not None:
            run_settings["reward"] = reward_name(reward)
        run_settings = as_json(run_settings)
        if recipe is not None:
            recipe.check(run_settings)
        run = {
            "images_per_prompt": images_per_prompt, "batch_size": batch_size, "call": call, "seed": seed, "quotas": counts,
            "target": run_settings["target"], "filter": stages, "duplicates": duplicates, "candidates": candidates,
            "arms": None if arms is None else [asdict(arm) for arm in arms], "select": select, "memory": memory,
            "reward": reward,
            "memory_by": memory_by, "exchange": exchange, "format": format, "shard_size": shard_size,
            "embedder": embedder_name, "licence": licence, "marks": marks,
        }  # fmt: skip
        made_by = recipe_of(pipe, guide, run, run_settings)
        made_by.obstacles += [f"the {entries} entries of the guide's memory"] if entries else []
        made_by.obstacles += ["the references of attributes"] if attributes else []
        store = Store(out, None if format == "imagefolder" else out / ".kspec" / "images")
        packer = None if format == "imagefolder" else Packer(store, format, shard_size, types)
        _open(store, processes, run_settings, force, types, drop)
        try:
            jobs = make_jobs(prompt_list, images_per_prompt, counts, _prompt_numbers(store), candidates)
            by_prompt = selector is not None and "context" in selector.needs
            owners, prompt_features, contexts = _share_out(
                store, processes, generator, jobs, batch_size, memory_by == "group", by_prompt
            )
            choice = None
            if selector is not None:
                about = (arms or [], selector, run_guide, generator, models)
                choice = ArmChoice(*about) if contexts is None else PromptArms(*about, contexts=contexts)
            settings = Settings(
                batch_size=batch_size,
                seed=seed,
                memory=memory,
                memory_by=memory_by,
                exchange=exchange,
                target=prompt_target,
                digest=hash_json(run_settings, DIGITS),
                expected_images=sum(job.goal for job in jobs),
                grouped=any(prompt.group is not None for prompt in prompt_list),
                candidates=candidates,
            )
            worker = Worker(
                generator,
                run_guide,
                [job for job, owner in zip(jobs, owners, strict=True) if owner == processes.rank],
                settings,
                store,
                processes,
                screen,
                Provenance(
                    licence,
                    hash_json(run_settings["guide"], DIGITS),
                    image_marks.names,
                    ", ".join(f"{name} {number}" for name, number in package_versions().items()),
                ),
                image_marks,
                embedder=embedder,
                packer=packer,
                balance=balance,
                shares={name: a.share for name, a in attributes.items()},
                prompt_features=prompt_features,
                progress_callback=progress_callback if processes.rank == 0 else None,
                arms=choice,
                reward=rewards,
            )
            if hub is not None and processes.rank == 0:
                hub.prepare(settings.expected_images, format)
            if memory_file is not None and processes.rank == 0:
                _prepare(Path(memory_file))
            worker.resume()
            screened = screen.drops or prompt_target is not None or candidates > 1 or by_prompt
            generator.check_mixed(worker.jobs, batch_size, screened)
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
                first=processes.rank == 0,
            )
            _conclude(store, processes, worker, result, report, embedder)
            if result.first and result.images and semantic_duplicates is not None:
                comparable = [e for e in store.epochs() if worker.comparable(e, FEATURE_KEYS)]
                result.semantic_duplicates = write_semantic_duplicates(store, comparable, semantic_duplicates)
            if result.first and result.images:
                if any(True for _ in store.records([e for e in store.epochs() if e < store.epoch])):
                    made_by.obstacles.append(
                        "what came before: settings were changed, or images left out, while the set was made"
                    )
                write_publication(
                    store,
                    store.rows(),
                    result.rejected,
                    format,
                    result.report,
                    made_by,
                    prompt_list,
                    None if hub is None else hub.url,
                )
            if memory_file is not None and result.first:
                _save_memory(store, guide_memory, entries, Path(memory_file))
            if hub is not None and result.first and result.images:
                result.url = hub.push(out)
            return result
        finally:
            if processes.rank == 0:
                store.unlock()


def reproduce(
    path: str | Path,
    out: str | Path,
    pipe: Any = None,
    *,
    report: bool = True,
    force: bool = False,
    progress_callback: Callable[[Progress], None] | None = None,
) -> Synthesis:
    """Make a set again from its ``reproduce.yaml`` and ``prompts.jsonl``, and compare its images with those beside them.

    Args:
        path: of ``reproduce.yaml``.
        out: the new folder.
        pipe: the pipeline that made the set, if it cannot be loaded by its name; its scheduler is replaced during the run.
        report: write ``report.html`` at the end.
        force: continue although settings changed or something is damaged.
        progress_callback: called with a :class:`Progress` after each batch.

    Raises:
        SynthesisError: for a file that cannot make the set again, or settings that differ, such as another model or number
            of processes; and those of :func:`synthesize`.
    """
    recipe = read_recipe(path)
    pipe = recipe.pipeline(pipe)
    with recipe.scheduler_of(pipe):
        result = synthesize(
            out=out, pipe=pipe, report=report, force=force, progress_callback=progress_callback, recipe=recipe,
            **recipe.arguments(),
        )  # fmt: skip
    if result.first:
        result.reproduced = compare_with_original(Path(path).parent, result.out)
    return result


@contextmanager
def _restored(guide: KernelGuidance) -> Iterator[None]:
    """Restore the guide's memories, targets and calibration, and whether it adds to memories, at the end."""
    remember, calibration, memories = guide.remember, guide.calibration, [term.memory for term in guide.terms]
    targets = [term.target for term in guide.terms]
    for term in guide.terms:
        term.target = None if term.target is None else term.target.copy()
    try:
        yield
    finally:
        guide.remember, guide.calibration = remember, calibration
        for term, memory, target in zip(guide.terms, memories, targets, strict=True):
            term.memory, term.target = memory, target


def _calibration(pipe: Any, call: dict[str, Any]) -> float:
    """The factor of variety for these calls; 1 if the pipeline was not calibrated for similar settings."""
    steps, guidance_scale = call_settings(pipe, call)
    found = None if steps is None else find_calibration(pipe, steps, guidance_scale, requested=True)
    return 1.0 if found is None else found.factor


def _warn_of_cut(generator: Generator, prompts: list[Prompt]) -> None:
    cut, tokens = generator.count_cut([prompt.text for prompt in prompts])
    if cut:
        warnings.warn(
            f"{cut} of {len(prompts)} prompts are longer than the {tokens} tokens that {type(generator.pipe).__name__} "
            "reads; the rest of each has no effect on its images",
            stacklevel=3,
        )


def _open(
    store: Store,
    processes: Processes,
    settings: dict[str, Any],
    force: bool,
    types: dict[str, type | None],
    drop: Collection[str],
) -> None:
    """Claim and prepare the folder in process 0; all processes raise if that fails."""
    failure: SynthesisError | None = None
    if processes.rank == 0:
        try:
            store.lock()
            rows = store.begin(settings, force, types, drop)
            store.clean({row["file_name"] for row in rows})
            if store.images == store.out:
                store.write_metadata(rows)
        except SynthesisError as error:
            store.unlock()
            failure = error
    if processes.world_size > 1:
        message = processes.broadcast_text("" if failure is None else str(failure))
        if message and failure is None:
            raise RunFailedError(f"process 0 could not begin: {message}")
        store.epoch = processes.gather_integers(store.epoch)[0][0]
    if failure is not None:
        raise failure


def _prompt_numbers(store: Store) -> dict[str, int]:
    """The numbers of prompts in earlier epochs."""
    numbers: dict[str, int] = {}
    for record in store.records([e for e in store.epochs() if e < store.epoch]):
        for row in record.rows:
            numbers.setdefault(row["prompt"], row["prompt_number"])
    return numbers


def _share_out(
    store: Store,
    processes: Processes,
    generator: Generator,
    jobs: list[Job],
    batch_size: int,
    by_group: bool,
    by_prompt: bool,
) -> tuple[list[int], list[Tensor] | None, dict[str, Tensor] | None]:
    """The process of each prompt, what is exchanged, and contexts; features are kept in a file for resumed runs.

    Args:
        store: of the run.
        processes: of the run.
        generator: of the prompt features.
        jobs: of all processes.
        batch_size: prompts at once.
        by_group: whether all prompts of a group are in one process, so that nothing is exchanged.
        by_prompt: whether arms are chosen by prompt.

    Returns:
        The process of each job; the prompt features of each process, None if nothing is exchanged; and the features of
        each prompt, None if arms are not chosen by them.

    Raises:
        SynthesisError: if arms are chosen by prompt, and the pipeline gives no features of prompts.
    """
    world_size, goals = processes.world_size, [job.goal for job in jobs]
    exchanged = world_size > 1 and not by_group
    owners = [0] * len(jobs)
    if world_size > 1 and by_group:
        owners = shard_groups([job.prompt.group for job in jobs], goals, world_size)
    if not (exchanged or by_prompt):
        return owners, None, None
    path = store.folder(store.epoch) / "prompts.safetensors"
    if not processes.gather_integers(int(path.exists()))[0][0]:
        part = generator.prompt_features([job.prompt.text for job in jobs[processes.rank :: world_size]], batch_size)
        parts = processes.gather(torch.zeros(0, 1) if part is None else part)
        known = sum(map(len, parts)) == len(jobs)
        features = torch.zeros(len(jobs), parts[0].shape[1] if known else 1)
        if known:
            for rank, rows in enumerate(parts):
                features[rank::world_size] = rows
        owners = shard(features, goals, world_size) if exchanged else owners
        if processes.rank == 0:
            tensors = {"features": features, "owners": torch.tensor(owners)}
            with disk_errors(store.out):
                write_tensors(path, "prompts", tensors, {"known": known}, durable=True)
        processes.wait_for_all()
    tensors, about = read_tensors(path, "prompts")
    owner, features = tensors["owners"], tensors["features"]
    contexts = None
    if by_prompt:
        if not about["known"]:
            raise SynthesisError(
                f"{type(generator.pipe).__name__} gives no embeddings of prompts, by which this selector chooses; use "
                f"{', '.join(select for select in SELECTORS if select not in BY_PROMPT)} or a mixture method"
            )
        contexts = {job.prompt.text: row for job, row in zip(jobs, features, strict=True)}
    if not about["known"]:
        features = features[:, :0]
    return owner.tolist(), [features[owner == rank] for rank in range(world_size)] if exchanged else None, contexts


def _conclude(
    store: Store,
    processes: Processes,
    worker: Worker,
    result: Synthesis,
    report: bool,
    embedder: ImageEmbedder | None,
) -> None:
    """Count the whole set; process 0 writes its metadata, summary and report."""
    rows = store.rows()
    result.images = len(rows)
    result.rejected = dict(Counter(row["reason"] for record in store.records() for row in record.rejected))
    result.attributes = dict(Counter(row["attribute"] for row in rows if "attribute" in row))
    reasons = Counter(job.stop_reason or "all images made" for job in worker.jobs)
    counts = processes.gather_integers(*(reasons.get(reason, 0) for reason in STOP_REASONS))
    totals = [sum(column) for column in zip(*counts, strict=True)]
    result.stopped = {reason: total for reason, total in zip(STOP_REASONS, totals, strict=True) if total}
    target = worker.guide.terms[0].target
    outcomes = Counter() if target is None else Counter(prompt.status for prompt in target.prompts)
    counts = processes.gather_integers(*(outcomes.get(status, 0) for status in STATUSES))
    totals = [sum(column) for column in zip(*counts, strict=True)]
    result.targets = {status: total for status, total in zip(STATUSES, totals, strict=True) if total}
    if worker.arms is not None:
        records = list(store.records(tensors=True))
        epochs = {epoch for epoch in store.epochs() if worker.comparable(epoch, FEATURE_KEYS)}
        result.arms = arm_summary(records, list(worker.arms.number), epochs)
        result.arm_differences = arm_differences(records, result.arms, epochs)
    if processes.rank == 0:
        if store.images == store.out:
            store.write_metadata(rows)
        summary = {k: getattr(result, k) for k in ("images", "rejected", "stopped", "attributes")}
        summary |= {"targets": result.targets} if result.targets else {}
        if result.arms:
            summary |= {"arms": result.arms, "arm_differences": result.arm_differences}
        if worker.packer is not None:
            worker.packer.finish_earlier()
        store.write_summary(summary)
        store.write_times()
        if report and len(rows) > 1:
            from kspec_guidance.synthesis.report import write_report

            result.report = write_report(store.out, rows, summary, embedder)
    processes.wait_for_all()


def _prepare(memory_file: Path) -> None:
    """Check that a memory can be saved here, before the run."""
    if memory_file.is_dir():
        raise SynthesisError(f"memory_file {memory_file} is a folder; give the name of a file")
    with disk_errors(memory_file):
        memory_file.parent.mkdir(parents=True, exist_ok=True)


def _save_memory(store: Store, guide_memory: Any, entries: int, path: Path) -> None:
    """Save the first ``entries`` entries of the guide's memory, and all images of the set, as one exact memory."""
    bank = MemoryBank(getattr(guide_memory, "space", None), getattr(guide_memory, "prompt_encoder", None))
    if isinstance(guide_memory, MemoryBank) and entries:
        prompts = guide_memory.prompts
        bank.add(
            guide_memory.x[:entries].reshape(entries, *(guide_memory.shape or ())),
            None if prompts is None else prompts[:entries],
        )
    for record in store.records(tensors=True):
        x, prompt_features, _ = unpack_tensors(record.tensors)
        if len(x):
            bank.add(x, prompt_features)
    with disk_errors(path):
        bank.save(path)
