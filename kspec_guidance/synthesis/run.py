"""Run: the arguments of ``synthesize``, checked, described by settings, and made into workers."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.demo.pipeline import is_demo
from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.calibration import call_settings, find_calibration
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Balance
from kspec_guidance.selection import Selector
from kspec_guidance.synthesis.arm_models import ArmModels
from kspec_guidance.synthesis.arms import Arm, ArmChoice, check_arms, describe_arms, make_selector
from kspec_guidance.synthesis.columns import column_types
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.export import FORMATS, Packer
from kspec_guidance.synthesis.filters import Filter, Screen, Stage, describe_filters, filter_stages, score_types
from kspec_guidance.synthesis.generator import Generator
from kspec_guidance.synthesis.marks import Marks
from kspec_guidance.synthesis.prompt_arms import PromptArms
from kspec_guidance.synthesis.prompts import Prompt, read_prompts
from kspec_guidance.synthesis.provenance import Provenance, check_licence, package_versions
from kspec_guidance.synthesis.quotas import Attribute, split_quotas
from kspec_guidance.synthesis.reproduction import Recipe, recipe_of
from kspec_guidance.synthesis.rewards import Reward, Rewards, as_reward, reward_name
from kspec_guidance.synthesis.schedule import Job, Target, make_jobs
from kspec_guidance.synthesis.settings import (
    DIGITS,
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
from kspec_guidance.synthesis.signing import Signer
from kspec_guidance.synthesis.stages import ScoreFilter
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.worker import Progress, Worker
from kspec_guidance.utils.hashing import fingerprint, hash_json, hash_tensors
from kspec_guidance.utils.messages import warn_user

__all__ = ["Run", "check_plain", "prepared", "restored"]


@dataclass
class Run:
    """A run, as its arguments and its pipeline say.

    Attributes:
        generator: of the batches.
        guide: of the run, with its calibration.
        run_guide: the same, with a term for attributes, if there are any.
        memory: of the guide at the beginning.
        entries: of it then.
        prompts, counts, attributes: of which images, in which numbers and shares.
        target: when a prompt is finished before its goal.
        stages, rewards, embedder, marks, balance, models: what works on the images.
        types: of the users' own columns.
        settings: what makes two runs the same.
        recipe: what makes the set again.
        arguments: of ``synthesize``, by name.
    """

    generator: Generator
    guide: KernelGuidance
    run_guide: KernelGuidance
    memory: Memory
    entries: int
    prompts: list[Prompt]
    counts: dict[str, int]
    attributes: dict[str, Attribute]
    target: Target | None
    stages: list[Stage]
    rewards: Rewards | None
    embedder: ImageEmbedder | None
    marks: Marks
    balance: Balance | None
    models: ArmModels | None
    types: dict[str, type | None]
    settings: dict[str, Any]
    recipe: Recipe
    arguments: dict[str, Any]

    @property
    def by_prompt(self) -> bool:
        """Whether arms are chosen by prompt."""
        return self.models is not None and "context" in self._selector(0).needs

    @property
    def screened(self) -> bool:
        """Whether any prompt may end with a part of a batch."""
        drops = Screen(self.arguments["duplicates"], self.stages).drops
        return drops or self.target is not None or self.arguments["candidates"] > 1 or self.by_prompt

    def _selector(self, rank: int) -> Selector:
        a = self.arguments
        told = _told(self.rewards, Screen(a["duplicates"], self.stages))
        return make_selector(a["select"], a["arms"], a["seed"], rank, told)

    def jobs(self, numbers: Mapping[str, int] | None = None) -> list[Job]:
        """A job for each prompt; see :func:`~kspec_guidance.synthesis.schedule.make_jobs`."""
        a = self.arguments
        return make_jobs(self.prompts, a["images_per_prompt"], self.counts, numbers, a["candidates"])

    def store(self, out: Path) -> Store:
        """The folder of the run; images that are packed into shards lie beside the records."""
        return Store(out, None if self.arguments["format"] == "imagefolder" else out / ".kspec" / "images")

    def packer(self, store: Store) -> Packer | None:
        """What writes shards; None for a folder of images."""
        a = self.arguments
        return None if a["format"] == "imagefolder" else Packer(store, a["format"], a["shard_size"], self.types)

    def worker(
        self,
        jobs: list[Job],
        expected_images: int,
        store: Store,
        processes: Processes,
        packer: Packer | None = None,
        prompt_features: list[Tensor] | None = None,
        contexts: Mapping[str, Tensor] | None = None,
        progress_callback: Callable[[Progress], None] | None = None,
    ) -> Worker:
        """A worker with a state of its own.

        Args:
            jobs: of the worker.
            expected_images: of the whole run.
            store: which it commits to.
            processes: of the run; the rank decides the choices of arms.
            packer: of its images.
            prompt_features: of the prompts of each process, by rank; None if nothing is exchanged.
            contexts: features of each prompt, if arms are chosen by them.
            progress_callback: called after each batch.
        """
        a, choice = self.arguments, None
        if self.models is not None:
            about = (a["arms"], self._selector(processes.rank), self.run_guide, self.generator, self.models)
            choice = ArmChoice(*about) if contexts is None else PromptArms(*about, contexts=contexts)
        settings = Settings(
            batch_size=a["batch_size"],
            seed=a["seed"],
            memory=a["memory"],
            memory_by=a["memory_by"],
            exchange=a["exchange"],
            target=self.target,
            digest=hash_json(self.settings, DIGITS),
            expected_images=expected_images,
            grouped=any(prompt.group is not None for prompt in self.prompts),
            candidates=a["candidates"],
        )
        provenance = Provenance(
            self.settings.get("licence"),
            hash_json(self.settings["guide"], DIGITS),
            self.marks.names,
            ", ".join(f"{name} {number}" for name, number in package_versions().items()),
        )
        return Worker(
            self.generator,
            self.run_guide,
            jobs,
            settings,
            store,
            processes,
            Screen(a["duplicates"], self.stages),
            provenance,
            self.marks,
            embedder=self.embedder,
            packer=packer,
            balance=self.balance,
            shares={name: attribute.share for name, attribute in self.attributes.items()},
            prompt_features=prompt_features,
            progress_callback=progress_callback,
            arms=choice,
            reward=self.rewards,
        )


def check_plain(
    *,
    images_per_prompt: int,
    batch_size: int,
    seed: int,
    target: str | Target | None,
    duplicates: float | None,
    candidates: int,
    start_candidates: int,
    memory: str,
    memory_by: str,
    exchange: int,
    format: str,
    shard_size: int,
    licence: str | None,
    marks: bool,
    sign: str | Path | None,
) -> tuple[str | None, Target | None, Marks]:
    """Check the arguments of ``synthesize`` that need no pipeline, so that a command can before it loads one.

    Returns:
        The licence in its canonical spelling, the target and the marks.

    Raises:
        SynthesisError: for one that cannot be used.
    """
    check_counts(0, images_per_prompt=images_per_prompt)
    check_counts(batch_size=batch_size, exchange=exchange, shard_size=shard_size, start_candidates=start_candidates)
    check_candidates(candidates, batch_size)
    check_counts(None, seed=seed)
    if format not in FORMATS:
        raise SynthesisError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    check_memory(memory, memory_by)
    licence = check_licence(licence)
    if sign is not None and not marks:
        raise SynthesisError("sign adds marks to images, and marks=False leaves them out; give one of them")
    Screen(duplicates)
    return licence, Target.parse(target), Marks(marks, None if sign is None else Signer(sign))


@contextmanager
def prepared(  # noqa: D417, the others are those of synthesize
    prompts: Any,
    pipe: Any,
    guide: KernelGuidance | None,
    processes: Processes,
    *,
    call: Mapping[str, Any] | None,
    images_per_prompt: int,
    batch_size: int,
    seed: int,
    quotas: Mapping[str, int | Attribute] | None,
    target: str | Target | None,
    filter: Filter | ScoreFilter | str | Sequence[Filter | ScoreFilter | str] | None,
    duplicates: float | None,
    candidates: int,
    start_candidates: int,
    arms: Sequence[Arm] | None,
    select: str | Selector,
    reward: Reward | None,
    memory: str,
    memory_by: str,
    exchange: int,
    format: str,
    shard_size: int,
    embedder: ImageEmbedder | str | None,
    licence: str | None,
    marks: bool,
    sign: str | Path | None,
    lease_seconds: float | None,
) -> Iterator[Run]:
    """Check the arguments of ``synthesize``; the guide is as before at the end.

    Args:
        prompts: of the run; this and what is not listed here are as there.
        processes: of the run.
        lease_seconds: after which a worker counts as dead, in runs with leases; None for others.

    Raises:
        SynthesisError: for arguments that do not fit each other or the pipeline.
    """
    call = dict(call or {})
    licence, prompt_target, image_marks = check_plain(
        images_per_prompt=images_per_prompt, batch_size=batch_size, seed=seed, target=target, duplicates=duplicates,
        candidates=candidates, start_candidates=start_candidates, memory=memory, memory_by=memory_by, exchange=exchange,
        format=format, shard_size=shard_size, licence=licence, marks=marks, sign=sign,
    )  # fmt: skip
    prompt_list = read_prompts(prompts)
    counts, attributes = split_quotas(quotas)
    if pipe is None:
        from kspec_guidance.demo import load_demo_pipeline

        pipe, call = load_demo_pipeline(), {"num_inference_steps": 20, "guidance_scale": 5.0} | call
        pipe.set_progress_bar_config(disable=True)
    stages = filter_stages(filter, "demo" if is_demo(pipe) else "auto", str(getattr(pipe, "device", "cpu")))
    screen = Screen(duplicates, stages)
    guide, embedder_name = SPARKE() if guide is None else guide, embedder
    models = None
    rewards = None if reward is None else as_reward(reward)
    if arms is not None:
        arms = list(arms)
        if any(term.target is not None for term in guide.terms):
            raise SynthesisError("arms set the strength of the guide, and so does its target; give one of them")
        check_arms(arms, pipe, call)
        make_selector(select, arms, seed, processes.rank, _told(rewards, screen))  # refuses what does not fit
        models = ArmModels(arms, pipe)
    elif rewards is not None:
        raise SynthesisError("reward is told to the selector of arms; give arms=, or leave it out")
    if len(guide.memories) > 1:
        raise SynthesisError(
            f"this guide keeps {len(guide.memories)} memories in different spaces, but a run keeps one; give all terms the "
            "same space"
        )
    make_jobs(prompt_list, images_per_prompt, counts)  # refuses quotas of unknown groups before anything is written
    with restored(guide):
        if guide.calibration is None:  # one factor for the whole run, whatever other machines have
            guide.calibration = processes.gather(torch.tensor([[_calibration(pipe, call)]], dtype=torch.float64))[0].item()
        entries = len(guide.memory)
        balance, run_guide = None, guide
        if attributes:
            balance = Balance([a.reference for a in attributes.values()])
            run_guide = guide + KernelGuidance(balance, 0.7, stop=0.6, transforms=("off_score", "rescale"))
        generator = Generator(pipe, run_guide, call, start_candidates)
        if processes.rank == 0:
            _warn_of_cut(generator, prompt_list)
        if isinstance(embedder, str):
            from kspec_guidance.evaluation.embedders import image_embedder

            embedder = image_embedder(embedder)
        types = column_types([prompt.extra for prompt in prompt_list])
        types |= score_types(stages, types)
        settings = {
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
            "exchange": exchange if processes.world_size > 1 or lease_seconds is not None else None,
        }
        if candidates > 1:  # absent in runs of earlier versions
            settings["candidates"] = candidates
        if start_candidates > 1:
            settings["start_candidates"] = start_candidates
        if licence is not None:
            settings["licence"] = licence
        if not marks or image_marks.signer is not None:
            settings["marks"] = image_marks.describe()
        if arms is not None and models is not None:
            settings |= describe_arms(arms, select, models)
        if reward is not None:
            settings["reward"] = reward_name(reward)
        if lease_seconds is not None:
            settings |= _describe_leases(pipe, lease_seconds)
        settings = as_json(settings)
        arguments = {
            "images_per_prompt": images_per_prompt, "batch_size": batch_size, "call": call, "seed": seed, "quotas": counts,
            "target": settings["target"], "filter": stages, "duplicates": duplicates, "candidates": candidates,
            "arms": None if arms is None else [asdict(arm) for arm in arms], "select": select, "memory": memory,
            "reward": reward, "memory_by": memory_by, "exchange": exchange, "format": format, "shard_size": shard_size,
            "embedder": embedder_name, "licence": licence, "marks": marks,
        }  # fmt: skip
        if start_candidates > 1:
            arguments["start_candidates"] = start_candidates
        if lease_seconds is not None:
            arguments |= {"workers": 1, "lease_seconds": lease_seconds}
        recipe = recipe_of(pipe, guide, arguments, settings)
        recipe.obstacles += [f"the {entries} entries of the guide's memory"] if entries else []
        recipe.obstacles += ["the references of attributes"] if attributes else []
        yield Run(
            generator, guide, run_guide, guide.memory, entries, prompt_list, counts, attributes, prompt_target, stages,
            rewards, embedder, image_marks, balance, models, types, settings, recipe, arguments | {"arms": arms},
        )  # fmt: skip


def _told(rewards: Rewards | None, screen: Screen) -> str:
    return "given" if rewards is not None else "kept or dropped" if screen.drops else ""


def _describe_leases(pipe: Any, seconds: float) -> dict[str, Any]:
    """What workers of one run must have in common besides: all networks, and the packages that decide on images.

    The public part of a version: builds of one version for other hardware may work together.
    """
    parts = {name: part for name, part in getattr(pipe, "components", {}).items() if isinstance(part, nn.Module)}
    versions = {name: number.partition("+")[0] for name, number in package_versions().items() if name != "python"}
    return {
        "processes": "leases",
        "lease_seconds": seconds,
        "versions": versions,
        "networks": {name: fingerprint(part) for name, part in parts.items()},
    }


@contextmanager
def restored(guide: KernelGuidance, copy_memory: bool = False) -> Iterator[None]:
    """Restore the guide's memories, targets and calibration, and whether it adds to memories, at the end.

    Args:
        guide: whose targets are copied meanwhile.
        copy_memory: work with empty copies of its memories meanwhile.
    """
    remember, calibration, memories = guide.remember, guide.calibration, [term.memory for term in guide.terms]
    targets = [term.target for term in guide.terms]
    copies = {id(memory): memory.empty_copy() for memory in memories} if copy_memory else {}
    for term in guide.terms:
        term.target = None if term.target is None else term.target.copy()
        term.memory = copies.get(id(term.memory), term.memory)
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
        warn_user(
            f"{cut} of {len(prompts)} prompts are longer than the {tokens} tokens that {type(generator.pipe).__name__} "
            "reads; the rest of each has no effect on its images"
        )
