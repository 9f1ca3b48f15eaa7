"""Arms of a run: several settings of one pipeline, of which each batch has the one that a selector chooses.

The records of the batches are the events: which arm, what it cost, what was kept and what was dropped. The state of the
selector follows from them, in order, so that a run that is resumed chooses as one that never stopped.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.evaluation.differences import split_prompts
from kspec_guidance.evaluation.embedders.base import TextEmbedder
from kspec_guidance.evaluation.verdicts import SURE
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.selection import (
    DAKUCB,
    PAKUCB,
    RFFUCB,
    Greedy,
    MixtureGreedy,
    MixtureUCB,
    PromptWise,
    Selector,
    Uniform,
)
from kspec_guidance.statistics import jackknife
from kspec_guidance.synthesis.arm_models import ArmModels
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.generator import Generator, check_call
from kspec_guidance.synthesis.records import LISTED, LOST, Record, unpack_tensors
from kspec_guidance.synthesis.schedule import BANDWIDTH, MIN_TARGET_IMAGES, Job, Sample, next_batch
from kspec_guidance.utils.arguments import choices

__all__ = ["SELECTORS", "Arm", "ArmChoice", "arm_differences", "arm_summary", "check_arms", "read_arms"]

BY_PROMPT = ("pak-ucb", "rff-ucb", "dak-ucb", "promptwise")
SELECTORS = ("mixture-greedy", "mixture-ucb", "greedy", "uniform", *BY_PROMPT)
FIXED = ("height", "width")  # of all arms, since samples of other sizes cannot be compared
BLOCK = 8  # batches whose arms are chosen together if a change of the model is to be rare
MODES = 3  # of either arm, of the differences of two
HISTORY = 20  # parts of a run, at most, in the plot of the shares
PARTS = 4  # of a run, whose shares the summary lists


@dataclass(frozen=True)
class Arm:
    """One way to make images.

    Args:
        name: in metadata and reports.
        call: arguments of the pipeline call that differ from those of the run, such as ``guidance_scale``.
        guide: factor of the guide's scale: 0 is plain sampling.
        scheduler: name of a scheduler class of diffusers, configured as that of the model; None for the model's own.
        cost: of one image, in any unit that all arms share; by default the measured seconds, with those of changing the
            model.
        model: folder or id of a pipeline whose denoiser and scheduler the arm has; None for those of the run.
        lora: file, folder or id of a LoRA that is added to the model.

    Raises:
        SynthesisError: for a value out of range.
    """

    name: str
    call: Mapping[str, Any] = field(default_factory=dict)
    guide: float = 1.0
    scheduler: str | None = None
    cost: float | None = None
    model: str | None = None
    lora: str | None = None

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise SynthesisError(f"an arm needs a name, got {self.name!r}")
        if not isinstance(self.guide, int | float) or not 0 <= self.guide < float("inf"):
            raise SynthesisError(
                f"arm {self.name!r}: guide is a factor of at least 0, or true or false, got {self.guide!r}"
            )
        if self.cost is not None and not (isinstance(self.cost, int | float) and 0 < self.cost < float("inf")):
            raise SynthesisError(f"arm {self.name!r}: cost must be a positive number, got {self.cost!r}")
        fixed = [key for key in FIXED if key in self.call]
        if fixed:
            raise SynthesisError(f"arm {self.name!r} sets {', '.join(fixed)}; all arms make images of one size")


def read_arms(path: str | Path) -> list[Arm]:
    """Arms of a TOML file: a table for each, with its name.

    ``guide``, ``scheduler``, ``cost``, ``model`` and ``lora`` are those of :class:`Arm`, all other keys are arguments of
    the pipeline call.

    Raises:
        SynthesisError: if the file cannot be read, or has no tables.
    """
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    try:
        found = tomllib.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise SynthesisError(f"cannot read the arms of {path}: {error}") from error
    loose = [name for name, value in found.items() if not isinstance(value, dict)]
    if loose or not found:
        raise SynthesisError(f"{path} must have a table for each arm, such as [low]; found {', '.join(loose) or 'nothing'}")
    arms = []
    for name, table in found.items():
        own = {f.name: table.pop(f.name) for f in fields(Arm) if f.name in table and f.name not in ("name", "call")}
        arms.append(Arm(name, table, **own))
    return arms


def check_arms(arms: Sequence[Arm], pipe: Any, call: Mapping[str, Any]) -> None:
    """Refuse arms that the pipeline cannot have.

    Raises:
        SynthesisError: for fewer than two arms, equal names, arguments or schedulers that do not exist.
    """
    names = [arm.name for arm in arms]
    if len(names) < 2 or len(set(names)) < len(names):
        raise SynthesisError(f"arms are two or more with different names, got {', '.join(names) or 'none'}")
    for arm in arms:
        try:
            check_call(pipe, {**call, **arm.call})
            if arm.scheduler is not None:
                _scheduler(pipe.scheduler, arm.scheduler)
        except SynthesisError as error:
            raise SynthesisError(f"arm {arm.name!r}: {error}") from error


def _scheduler(scheduler: Any, name: str) -> Any:
    """A scheduler of diffusers with the configuration of another one."""
    import diffusers

    kind = getattr(diffusers, name, None)
    if kind is None or not hasattr(kind, "from_config"):
        known = [c.__name__ for c in getattr(scheduler, "compatibles", [])]
        raise SynthesisError(f"diffusers has no scheduler {name!r}; {choices(name, sorted(known))}")
    return kind.from_config(scheduler.config)


def make_selector(
    select: "str | Selector", arms: Sequence[Arm], seed: int, rank: int, rewards: str = "kept or dropped"
) -> Selector:
    """The selector of one process.

    Args:
        select: one of ``SELECTORS``, or a selector of which a copy with other seeds is used.
        arms: of the run.
        seed: of the run.
        rank: of the process.
        rewards: of the images: ``kept or dropped`` by a filter, ``given`` by a function, or empty if all are 1.

    Raises:
        SynthesisError: for an unknown name, or a selector that has other arms, was used, cannot be copied, or needs what
            the run has not, such as rewards.
    """
    found = _new_selector(select, arms, seed, rank)
    if "reward" in found.needs and not rewards:
        raise SynthesisError(
            f"{_title(select)} compares rewards, and without a filter all images of this run have the reward 1; give "
            "filter= or duplicates=, which drop images, or reward=, a function of an image and its row (--filter, "
            "--duplicates, --reward)"
        )
    if isinstance(found, PromptWise) and rewards == "given":
        raise SynthesisError("the reward of PromptWise is whether an image is kept; leave out reward, or use pak-ucb")
    return found


def _title(select: "str | Selector") -> str:
    return select if isinstance(select, str) else type(select).__name__


def _new_selector(select: "str | Selector", arms: Sequence[Arm], seed: int, rank: int) -> Selector:
    digest = int.from_bytes(hashlib.sha256(f"{seed}/{rank}".encode()).digest()[:6], "big")
    costs = [arm.cost for arm in arms]
    known: Any = None if None in costs else costs
    if isinstance(select, Selector):
        if select.arms != len(arms):
            raise SynthesisError(f"the selector has {select.arms} arms, and the run has {len(arms)}")
        if isinstance(select, DAKUCB) and select.objective == "jkd":
            raise SynthesisError("objective 'jkd' compares with a reference output of each prompt, which a run has not")
        if float((select.told + select.pending).sum()):
            raise SynthesisError(
                "the selector was used already; a run needs a new one, whose state follows from its records"
            )
        try:
            found = type(select).load(select.state())
        except TypeError as error:
            raise SynthesisError(f"a run copies its selector, and {error}") from error
        found.seed = digest
        return found
    kernel = GaussianKernel(BANDWIDTH)
    if select == "mixture-greedy":
        return MixtureGreedy(len(arms), "rke", digest, kernel=kernel, costs=known)
    if select == "mixture-ucb":
        return MixtureUCB(len(arms), "rke", digest, kernel=kernel, costs=known)
    if select == "greedy":
        return Greedy(len(arms), digest, costs=known)
    if select == "uniform":
        return Uniform(len(arms), digest, costs=known)
    if select == "pak-ucb":
        return PAKUCB(len(arms), digest, costs=known)
    if select == "rff-ucb":
        return RFFUCB(len(arms), digest, costs=known)
    if select == "dak-ucb":
        return DAKUCB(len(arms), digest, sample_kernel=kernel, costs=known)
    if select == "promptwise":
        return PromptWise(len(arms), known, digest)
    raise SynthesisError(f"unknown select {select!r}; {choices(str(select), SELECTORS)}, or give a Selector")


class ArmChoice:
    """The arms of one process and the selector that chooses among them.

    With several models the arms of ``BLOCK`` batches are chosen together and sorted, so that models change seldom.

    Args:
        arms: of the run.
        selector: of this process.
        guide: attached to the pipeline for each batch.
        generator: whose call, and whose pipeline's scheduler, arms change.
        models: of the arms, in the generator's pipeline; those of the pipeline by default.
    """

    def __init__(
        self,
        arms: Sequence[Arm],
        selector: Selector,
        guide: KernelGuidance,
        generator: Generator,
        models: ArmModels | None = None,
    ):
        self.arms, self.selector, self.guide, self.generator = list(arms), selector, guide, generator
        self.models = ArmModels(arms, generator.pipe) if models is None else models
        self.number = {arm.name: k for k, arm in enumerate(self.arms)}
        self.schedulers: dict[str, Any] = {}
        for arm in self.arms:
            own = self.models.scheduler(arm)
            if arm.scheduler is not None or arm.model is not None:
                self.schedulers[arm.name] = own if arm.scheduler is None else _scheduler(own, arm.scheduler)
        self.order = list(dict.fromkeys(arm.model for arm in self.arms))  # of the models in a block, from the last one on
        self.block = BLOCK if len(self.order) > 1 else 1
        self.queue: list[int] = []  # arms that were chosen for the next batches
        self.contexts: dict[str, Tensor] = {}  # of prompts, for selectors that choose by prompt

    def next_batch(
        self, jobs: Iterable[Job], batch_size: int, seed: int, key: Callable[[Job], object], candidates: int = 1
    ) -> list[Sample]:
        """The samples of the next batch; see :func:`~kspec_guidance.synthesis.schedule.next_batch`."""
        return next_batch(jobs, batch_size, seed, key, candidates)

    def choose(self) -> Arm:
        """The arm of the next batch."""
        if not self.queue:
            self.queue = sorted(self.selector.choose(self.block), key=lambda k: self.order.index(self.arms[k].model))
        return self._turn(self.queue.pop(0))

    def _turn(self, number: int) -> Arm:
        """An arm by its number, whose model is then the last one used."""
        arm = self.arms[number]
        self.order.remove(arm.model)
        self.order.insert(0, arm.model)
        return arm

    @contextmanager
    def applied(self, arm: Arm) -> Iterator[Callable[[int], dict[str, Any]]]:
        """The pipeline, its call and the guide with the settings of an arm, and the guide attached.

        Returns:
            A function of the number of images, which returns what the record of the batch says of its arm: name, and cost
            of an image, with the change of the model.
        """
        pipe, call, scales = self.generator.pipe, self.generator.call, [term.scale for term in self.guide.terms]
        scheduler, start = getattr(pipe, "scheduler", None), perf_counter()
        self.models.use(arm)
        try:
            self.generator.call = {**call, **arm.call}
            for term, scale in zip(self.guide.terms, scales, strict=True):
                term.scale = scale * float(arm.guide)
            if arm.name in self.schedulers:
                pipe.scheduler = self.schedulers[arm.name]
            with self.guide.attach(pipe):
                yield lambda images: {
                    "arm": arm.name,
                    "cost": (perf_counter() - start) / images if arm.cost is None else arm.cost,
                }
        finally:
            self.generator.call = call
            for term, scale in zip(self.guide.terms, scales, strict=True):
                term.scale = scale
            if arm.name in self.schedulers:
                pipe.scheduler = scheduler

    def learn(self, record: Record, same: Container[str] | None = None) -> None:
        """Tell the selector the images of a record that were kept, then those that were dropped.

        Args:
            record: of this process or another one.
            same: arms whose settings were the same when it was made; by default all.
        """
        if record.arm is None or record.arm["arm"] not in (self.number if same is None else same):
            return
        arm, cost = self.number[record.arm["arm"]], record.arm["cost"]
        rows = [(row, x) for row, x in zip(record.rows, unit_features(record), strict=True)]
        rows += [(row, None) for row in record.rejected if row["reason"] not in (LOST, LISTED)]
        for row, x in rows:
            context = self.contexts.get(row["prompt"])
            if "context" in self.selector.needs and context is None:  # a prompt that the run had before
                continue
            reward = row.get("reward", 0.0 if x is None else 1.0)
            self.selector.tell(arm, features=x, reward=reward, context=context, cost=cost, kept=x is not None)
        self._settle(record)

    def _settle(self, record: Record) -> None:
        """Tell the selector what is still pending: batches, each of which yields several images."""
        self.selector.set_pending(self.queue)


def unit_features(record: Record) -> Tensor:
    """The features of a record's images ``[k, d]``, at norm 1."""
    return l2_normalize(unpack_tensors(record.tensors).features.double())


def describe_arms(arms: Sequence[Arm], select: "str | Selector", models: ArmModels) -> dict[str, Any]:
    """Arms and selector, for the settings of a run."""
    how = select if isinstance(select, str) else [type(select).__name__, select.settings()]
    return {"arms": [{**asdict(arm), "call": dict(arm.call), **models.describe(arm)} for arm in arms], "select": how}


def arm_summary(records: Sequence[Record], names: Sequence[str], epochs: Container[int]) -> dict[str, dict[str, Any]]:
    """What each arm has made, by its name.

    Args:
        records: of a run, with tensors.
        names: of the arms.
        epochs: whose features can be compared.

    Returns:
        For each arm its ``images``, the number ``dropped``, its ``share`` of all images, the ``shares`` in four equal parts
        of the run, and their ``history`` in up to twenty, the cost of a kept image, and the RKE of its images (Gaussian
        kernel of bandwidth 0.5, features at norm 1) with its 95% interval.
    """
    order = sorted(records, key=lambda r: (r.epoch, r.batch_index, r.rank))
    order = [r for r in order if r.arm is not None and r.arm["arm"] in names]
    by_arm: dict[str, list[Record]] = {name: [] for name in names}
    for record in order:
        by_arm[_arm_of(record)].append(record)
    shares, history = (_shares(order, names, parts) for parts in (PARTS, min(HISTORY, max(1, len(order)))))
    total = sum(len(r.rows) for r in order)
    found: dict[str, dict[str, Any]] = {}
    kernel = GaussianKernel(BANDWIDTH)
    for name, own in by_arm.items():
        images, dropped = sum(len(r.rows) for r in own), sum(len(r.rejected) for r in own)
        cost = sum(r.arm["cost"] * (len(r.rows) + len(r.rejected)) for r in own if r.arm is not None)
        about: dict[str, Any] = {"images": images, "dropped": dropped, "share": round(images / max(total, 1), 4)}
        about |= {"shares": shares[name], "history": history[name]}
        about["cost_per_image"] = round(cost / images, 6) if images else None
        rows = [unit_features(r) for r in own if r.rows and r.epoch in epochs]
        if sum(map(len, rows)) >= MIN_TARGET_IMAGES and rows[0].shape[1]:
            x = torch.cat(rows)
            interval = jackknife(lambda z: F.rke_score(z, kernel), x, groups=min(20, len(x)))
            about["rke"] = [round(v, 4) for v in (interval.value, interval.low, interval.high)]
        found[name] = about
    return found


def _arm_of(record: Record) -> str:
    return "" if record.arm is None else record.arm["arm"]


def _shares(order: Sequence[Record], names: Sequence[str], parts: int) -> dict[str, list[float]]:
    """Share of the images that each arm has in equal parts of the records."""
    found: dict[str, list[float]] = {name: [] for name in names}
    for first, last in pairwise(len(order) * k // parts for k in range(parts + 1)):
        counts = Counter(dict.fromkeys(names, 0))
        for record in order[first:last]:
            counts[_arm_of(record)] += len(record.rows)
        for name in names:
            found[name].append(round(counts[name] / max(1, counts.total()), 4))
    return found


def arm_differences(
    records: Sequence[Record], summary: Mapping[str, Mapping[str, Any]], epochs: Container[int]
) -> list[dict[str, Any]]:
    """Where the two arms with most images differ (PromptSplit), by equally many images of each prompt that both have made.

    Args:
        records: of a run, with tensors.
        summary: result of :func:`arm_summary`.
        epochs: whose features can be compared.

    Returns:
        For each mode, by the probability that it is chance: the ``arm`` that has more of it and the ``other``, how much
        larger its share of the arm's images is, the probability (None if it was not computed), and the ``prompts``. Empty
        if there are too few images of two common prompts or more, or no features of prompts.
    """
    pair = sorted(summary, key=lambda name: -summary[name]["images"])[:2]
    rows: dict[str, dict[str, list[Tensor]]] = {name: {} for name in pair}
    texts: dict[str, Tensor] = {}
    for record in records:
        data = unpack_tensors(record.tensors)
        if _arm_of(record) not in rows or record.epoch not in epochs or data.prompt_features is None:
            continue
        for row, x, t in zip(record.rows, unit_features(record), data.prompt_features, strict=True):
            rows[_arm_of(record)].setdefault(row["prompt"], []).append(x.float())
            texts[row["prompt"]] = t.float().flatten()
    a, b = (rows[name] for name in pair)
    common = [(prompt, min(len(a[prompt]), len(b[prompt]))) for prompt in a if prompt in b]
    if len(common) < 2 or sum(n for _, n in common) < MIN_TARGET_IMAGES:
        return []
    prompts = [prompt for prompt, n in common for _ in range(n)]
    x, y = (torch.stack([z for prompt, n in common for z in part[prompt][:n]]) for part in (a, b))
    embedder = TextEmbedder(lambda known: torch.stack([texts[prompt] for prompt in known]), "prompt features", "")
    found = split_prompts(x, prompts, y, prompts, embedder, GaussianKernel(BANDWIDTH))
    named = zip(found, pair, reversed(pair), strict=True)
    listed = [
        {"arm": arm, "other": other, "more": round(d.value, 4), "p_value": d.p_value, "prompts": d.prompts[:3]}
        for differences, arm, other in named
        for d in differences[:MODES]
    ]
    return sorted(listed, key=lambda d: (d["p_value"] is None, d["p_value"], -d["more"]))


def arm_lines(summary: Mapping[str, Mapping[str, Any]], differences: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each arm, and one for each difference of the best two, for the report."""
    lines = []
    for name, about in summary.items():
        shares = ", ".join(f"{100 * s:.0f}%" for s in about["shares"])
        line = f"arm {name}: {about['images']} images ({100 * about['share']:.0f}%; in quarters of the run {shares})"
        if about["dropped"]:
            line += f", {about['dropped']} dropped"
        if about["cost_per_image"] is not None:
            line += f", cost {about['cost_per_image']:.3g} for each kept image"
        if "rke" in about:
            line += ", RKE {:.2f} [{:.2f}, {:.2f}]".format(*about["rke"])
        lines.append(line)
    for d in differences:
        sure = (
            "" if d["p_value"] is None else f", p = {d['p_value']:.2g}" + ("" if d["p_value"] < SURE else ": may be chance")
        )
        lines.append(
            f"arm {d['arm']} makes something of {', '.join(d['prompts'])} that arm {d['other']} makes less often "
            f"({100 * d['more']:+.1f}% of its images{sure})"
        )
    return lines
