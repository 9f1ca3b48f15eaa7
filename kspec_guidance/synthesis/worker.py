"""Worker: one process of a run. Makes batches, commits them, remembers them, and tells the others."""

import io
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.memory import CentroidMemory, Memory, MemoryBank, PromptWeights, RandomFeatureMemory, choose_memory
from kspec_guidance.objectives import TOLERANCE, Balance
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.exchange import absorb, delta
from kspec_guidance.synthesis.export import Packer
from kspec_guidance.synthesis.filters import Screen
from kspec_guidance.synthesis.generator import Generator, Made
from kspec_guidance.synthesis.jobs import Job, Sample, next_batch
from kspec_guidance.synthesis.processes import Processes
from kspec_guidance.synthesis.quotas import allot
from kspec_guidance.synthesis.records import Record, Store
from kspec_guidance.synthesis.sharding import relevant
from kspec_guidance.synthesis.targets import Target, nearest, prompt_score

__all__ = ["Progress", "Worker"]

MEMORIES = ("auto", "exact", "centroids", "guide")
SAMPLES = ("pipeline", "space", "size")  # settings by which samples of two epochs can be compared
FEATURES = ("embedder", *SAMPLES)  # and the features that scores are taken of


@dataclass(frozen=True)
class Progress:
    """How far a run is: images of all processes, images per second, seconds left, and the mean Vendi score of finished
    prompts as a share of their images."""

    done: int
    total: int
    rejected: int
    rate: float
    remaining: float
    diversity: float | None


@dataclass
class Settings:
    """What a worker needs to know besides its jobs."""

    batch: int
    seed: int
    memory: str
    memory_by: str
    exchange: int
    target: Target | None
    digest: str
    images_expected: int


class Worker:
    """See the module's first line.

    Args:
        jobs: of this process.
        shares: wanted of each attribute, by name; with ``balance``.
        texts: features of each process's prompts ``[n, p]``; with several processes only.
    """

    def __init__(
        self,
        generator: Generator,
        guide: KernelGuidance,
        jobs: list[Job],
        settings: Settings,
        store: Store,
        processes: Processes,
        screen: Screen,
        embedder: ImageEmbedder | None = None,
        packer: Packer | None = None,
        balance: Balance | None = None,
        shares: dict[str, float] | None = None,
        texts: list[Tensor] | None = None,
        tick: Callable[[Progress], None] | None = None,
    ):
        self.generator, self.guide, self.jobs, self.settings = generator, guide, jobs, settings
        self.store, self.processes, self.screen = store, processes, screen
        self.embedder, self.packer, self.balance, self.shares = embedder, packer, balance, shares or {}
        self.texts, self.tick = texts, tick
        self.by_text = {job.prompt.text: job for job in jobs}
        self.unit = self.exchanges = 0
        self.fresh: list[tuple[Tensor, Tensor | None]] = []  # kept since the last exchange
        self.rejected: Counter[str] = Counter()
        self.attributes = dict.fromkeys(self.shares, 0)
        self.scores: dict[int, tuple[float, int]] = {}
        self.made = 0
        self.base_total = self.everyone = 0
        self.own = guide.memory
        self.terms = [term for term in guide.terms if term.memory is self.own]
        self.banks: dict[str | None, Memory] = {}
        self.shape: tuple[int, ...] | None = None
        self.prompt_dim: int | None = None

    # -- memory ----------------------------------------------------------------------------------------------------

    def _group(self, job: Job) -> str | None:
        return job.prompt.group if self.settings.memory_by == "group" else None

    def _bank(self, group: str | None, shape: tuple[int, ...]) -> Memory:
        """The memory of a group, made when its first images come."""
        bank = self.banks.get(group)
        if bank is None:
            if group is None and (self.settings.memory == "guide" or len(self.own) or not self._default):
                bank = self.own
            else:
                bank = self._make(shape)
            self.banks[group] = bank
        return bank

    @property
    def _default(self) -> bool:
        """Whether the guide's memory is one that was made without a thought, so that another may take its place."""
        return isinstance(self.own, MemoryBank) and type(self.own) is MemoryBank and self.own.default_settings

    def _make(self, shape: tuple[int, ...]) -> Memory:
        kind = self.settings.memory
        if kind == "guide" or not self._default:
            return self.own.empty_copy()
        if kind == "auto":
            made: Memory = choose_memory(self.settings.images_expected, shape)
        else:
            made = CentroidMemory() if kind == "centroids" else MemoryBank()
        made.space, made.prompt_encoder = self.own.space, self.own.prompt_encoder
        return made

    def _remember(self, group: str | None, x: Tensor, t: Tensor | None) -> None:
        device = self.generator.device
        self._bank(group, tuple(x.shape[1:])).add(x.to(device), None if t is None else t.to(device))

    def _use(self, group: str | None) -> None:
        """Let the guide work with the memory of a group."""
        bank = self.banks.get(group)
        if bank is None and group is not None:
            bank = self._make(self.shape or ())  # nothing of this group yet
        for term in self.terms:
            if bank is not None:
                term.memory = bank

    # -- one batch -------------------------------------------------------------------------------------------------

    def next(self) -> list[Sample]:
        return next_batch(self.jobs, self.settings.batch, self.settings.seed, self._group)

    def step(self, batch: list[Sample]) -> None:
        """Make, screen, commit and remember one batch."""
        self._use(self._group(batch[0].job))
        if self.balance is not None:
            self.balance.wanted = allot(list(self.attributes.values()), list(self.shares.values()), len(batch))
        made = self.generator.make(batch)
        features = made.x.flatten(1).float().cpu() if self.embedder is None else self.embedder(made.images).cpu()
        rows = [self._row(sample) for sample in batch]
        reasons = self.screen.reasons(made.images, rows, features)
        keep = [k for k, reason in enumerate(reasons) if reason is None]
        self._describe(batch, keep, rows, features, made)
        record = Record(
            self.store.epoch,
            self.processes.rank,
            self.unit,
            [rows[k] for k in keep],
            [
                {"prompt": s.job.prompt.text, "attempt": s.attempt, "reason": reason}
                for s, reason in zip(batch, reasons, strict=True)
                if reason is not None
            ],
            _tensors(made.x[keep], None if made.t is None else made.t[keep], features[keep], self.embedder is not None),
        )
        self.store.commit(record, {rows[k]["file_name"]: png(made.images[k]) for k in keep})
        if self.packer is None:
            self.store.append(record.rows)
        self.take(record)

    def _row(self, sample: Sample) -> dict[str, Any]:
        job, first = sample.job, self.guide.terms[0]
        row: dict[str, Any] = {"file_name": sample.file_name, "prompt": job.prompt.text}
        if job.prompt.group is not None:
            row["group"] = job.prompt.group
        row |= {
            "seed": sample.seed,
            "attempt": sample.attempt,
            "prompt_number": job.number,
            "guide": type(first.objective).__name__ if first.scale else "none",
            "scale": first.scale,
            "settings": self.settings.digest,
        }
        return {**{k: v for k, v in job.prompt.extra.items() if k not in row}, **row}

    def _describe(
        self, batch: list[Sample], keep: list[int], rows: list[dict[str, Any]], features: Tensor, made: Made
    ) -> None:
        """Scores of the images that are kept: how near the nearest earlier one of the prompt is, and their Vendi score."""
        assigned = None
        if self.balance is not None:
            assigned = [list(self.shares)[a] for a in self.balance.assign(made.x.cpu())]
        for job in dict.fromkeys(sample.job for sample in (batch[k] for k in keep)):
            mine = [k for k in keep if batch[k].job is job]
            before = torch.cat(job.features) if job.features else features[:0]
            every = torch.cat([before, features[mine]])
            score = round(prompt_score(every), 4)
            for place, k in enumerate(mine):
                cosine = float(nearest(features[k : k + 1], every[: len(before) + place])[0])
                rows[k]["nearest"] = round(cosine, 4) if cosine == cosine else None
                rows[k]["vendi"] = score
                if assigned is not None:
                    rows[k]["attribute"] = assigned[k]

    def take(self, record: Record) -> None:
        """Everything that follows from a committed batch of this process."""
        self.count(record)
        self.learn(record)

    def count(self, record: Record, base: bool = False) -> None:
        """Jobs, scores and filters after a batch; ``base`` for one of an earlier epoch, which may hold others' prompts."""
        _, _, features = back(record.tensors)
        if base and not self._like_now(record.epoch, FEATURES):
            features = features[:, :0]
        if not base:
            self.unit = record.unit + 1
        places: dict[str, list[int]] = {}
        for k, row in enumerate(record.rows):
            if row["prompt"] in self.by_text:
                places.setdefault(row["prompt"], []).append(k)
                if row.get("attribute") in self.attributes:
                    self.attributes[row["attribute"]] += 1
        for row in record.rejected:
            if row["prompt"] in self.by_text:
                places.setdefault(row["prompt"], [])
                self.rejected[row["reason"]] += 1
        for row in (*record.rows, *record.rejected):
            if row["prompt"] in places:
                job = self.by_text[row["prompt"]]
                job.attempts = max(job.attempts, row["attempt"] + 1)
        kept = sum(map(len, places.values()))
        self.made, self.base_total = (self.made, self.base_total + kept) if base else (self.made + kept, self.base_total)
        for text, mine in places.items():
            self._progress_of(self.by_text[text], len(mine), features[mine])
        if features.shape[1]:
            self.screen.learn(features)
        if self.packer is not None and not base:
            self.packer.add(record)

    def learn(self, record: Record, base: bool = False) -> None:
        """The memory after a batch; of an earlier epoch what can be compared with the samples made now."""
        x, t, _ = back(record.tensors)
        groups = [row.get("group") if self.settings.memory_by == "group" else None for row in record.rows]
        if base:
            if not self._like_now(record.epoch, SAMPLES):
                return
            if t is not None and self.texts is not None and (weigh := self._weigh()) is not None:
                keep = relevant(t, self.texts[self.processes.rank], weigh, TOLERANCE)
                x, t, groups = x[keep], t[keep], [g for g, k in zip(groups, keep.tolist(), strict=True) if k]
        self.shape, self.prompt_dim = tuple(x.shape[1:]), None if t is None else t.shape[1]
        for group in dict.fromkeys(groups):
            mine = [k for k, g in enumerate(groups) if g == group]
            self._remember(group, x[mine], None if t is None else t[mine])
        if len(x) and not base and not self.alone:
            self.fresh.append((x, t))

    def _like_now(self, epoch: int, keys: tuple[str, ...]) -> bool:
        """Whether an earlier epoch's settings agree with this one's in what decides how its tensors are to be read."""
        old, now = (self.store.settings(e).get("samples", {}) for e in (epoch, self.store.epoch))
        return all(old.get(key) == now.get(key) for key in keys)

    def _progress_of(self, job: Job, kept: int, features: Tensor) -> None:
        job.kept += kept
        if kept and features.shape[1]:
            job.features.append(features)
            if self.settings.target is not None and not job.over:
                job.stopped = self.settings.target.reached(torch.cat(job.features), kept) or ""
        if not job.over and job.attempts >= job.patience:
            job.stopped = "too many rejected"
        if job.over and job.features:
            every = torch.cat(job.features)
            if not job.stopped:
                job.stopped = "all images made"
                if self.settings.target is not None:
                    job.stopped = self.settings.target.reached(every, 0) or "most images made"
            self.scores[job.number] = (prompt_score(every), len(every))
            job.features = []

    # -- with the other processes ----------------------------------------------------------------------------------

    @property
    def alone(self) -> bool:
        return self.processes.world == 1 or self.settings.memory_by == "group"

    def outgoing(self, rank: int, fresh: list[tuple[Tensor, Tensor | None]]) -> Tensor | None:
        """What process ``rank`` tells of its images since the last exchange: those of prompts that matter to others."""
        if self.alone or not fresh or self.texts is None:
            return None
        x = torch.cat([part for part, _ in fresh])
        t = None if fresh[0][1] is None else torch.cat([part for _, part in fresh if part is not None])
        weigh = self._weigh()
        if t is not None and weigh is not None:
            others = torch.cat([text for r, text in enumerate(self.texts) if r != rank])
            keep = relevant(t.float(), others, weigh, TOLERANCE)
            x, t = x[keep], t[keep]
        return delta(self._bank(None, tuple(x.shape[1:])), x, t)

    def _weigh(self) -> PromptWeights | None:
        kernel = getattr(self.guide.terms[0].objective, "prompt_kernel", None)
        return PromptWeights(kernel) if kernel is not None and self.guide.terms[0].objective.conditional else None

    def incoming(self, told: list[Tensor]) -> None:
        """Add what the others told, in the order of ranks; of exact rows only those that matter to this one's prompts."""
        if self.alone or self.shape is None:
            return
        weigh = self._weigh()
        bank = self._bank(None, self.shape)
        for rank, rows in enumerate(told):
            if rank == self.processes.rank or not len(rows):
                continue
            if isinstance(bank, MemoryBank) and self.prompt_dim and weigh is not None and self.texts is not None:
                rows = rows[relevant(rows[:, -self.prompt_dim :], self.texts[self.processes.rank], weigh, TOLERANCE)]
            absorb(bank, rows, self.shape, self.prompt_dim)

    def exchange(self, over: bool) -> bool:
        """Tell and be told; whether all processes are over."""
        told = self.outgoing(self.processes.rank, self.fresh)
        self.fresh.clear()
        heads = self.processes.numbers(int(over), self.base_total + self.made, 0 if told is None else told.shape[1])
        width = max(head[2] for head in heads)
        if width:
            dtype = torch.int64 if isinstance(self.own, RandomFeatureMemory) else torch.float32
            self.incoming(self.processes.gather(torch.zeros(0, width, dtype=dtype) if told is None else told))
        self.exchanges += 1
        self.everyone = sum(head[1] for head in heads)
        return all(head[0] for head in heads)

    # -- the run ---------------------------------------------------------------------------------------------------

    def resume(self) -> None:
        """Read back what is committed, with the exchanges that had taken place."""
        store, rank, every = self.store, self.processes.rank, self.settings.exchange
        for record in store.records([e for e in store.epochs() if e != store.epoch], tensors=True):
            self.count(record, base=True)
            self.learn(record, base=True)
        for record in store.of_process(rank):
            self.count(record)
        done = 0
        if self.processes.world > 1:
            heads = self.processes.numbers(int(all(job.over for job in self.jobs)), self.unit)
            going = [unit // every for over, unit in heads if not over]
            done = min(going) if going else -(-max(unit for _, unit in heads) // every)
        for k, record in enumerate(store.of_process(rank)):
            while self.exchanges < done and k >= (self.exchanges + 1) * every:
                self._replay()
            self.learn(record)
        while self.exchanges < done:
            self._replay()

    def _replay(self) -> None:
        """An exchange that took place before this process was started, from the records of the others."""
        every, k, told = self.settings.exchange, self.exchanges, []
        for rank in range(self.processes.world):
            found = None
            if rank != self.processes.rank and not self.alone:
                part = (back(r.tensors)[:2] for r in self.store.of_process(rank, k * every, (k + 1) * every))
                found = self.outgoing(rank, [p for p in part if len(p[0])])
            told.append(torch.zeros(0, 0) if found is None else found)
        self.incoming(told)
        self.fresh.clear()
        self.exchanges += 1

    def run(self) -> None:
        """All batches that are left."""
        began, before = time.monotonic(), self.made
        with self.guide.attach(self.generator.pipe):
            while True:
                batch = self.next()
                if self.processes.world > 1 and (not batch or self.unit >= (self.exchanges + 1) * self.settings.exchange):
                    if self.exchange(not batch):
                        break
                    self._tell(began, before)
                    continue
                if not batch:
                    break
                self.step(batch)
                self._tell(began, before)

    def _tell(self, began: float, before: int) -> None:
        if self.tick is None:
            return
        world, seconds = self.processes.world, time.monotonic() - began
        done = self.base_total + self.made if world == 1 else max(self.everyone, self.base_total + self.made)
        rate = (self.made - before) * world / max(seconds, 1e-9)
        left = max(0, self.settings.images_expected - done)
        shares = [score / n for score, n in self.scores.values() if n > 1]
        diversity = sum(shares) / len(shares) if shares else None
        remaining = left / rate if rate else float("inf")
        self.tick(Progress(done, self.settings.images_expected, sum(self.rejected.values()), rate, remaining, diversity))


def png(image: Image.Image) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG")
    return out.getvalue()


def _tensors(x: Tensor, t: Tensor | None, features: Tensor, separate: bool) -> dict[str, Tensor]:
    """What a record keeps; prompt features once if they are all the same."""
    found = {"x": x.float().cpu()}
    if t is not None:
        t = t.float().cpu()
        found["prompts"] = t[:1] if len(t) and bool((t == t[:1]).all()) else t
    if separate:
        found["features"] = features.float()
    return found


def back(tensors: dict[str, Tensor]) -> tuple[Tensor, Tensor | None, Tensor]:
    """Samples, their prompt features, and the features that scores are taken of."""
    x, t = tensors["x"], tensors.get("prompts")
    if t is not None and len(t) != len(x):
        t = t.expand(len(x), -1)
    return x, t, tensors.get("features", x.flatten(1))


def check_memory(kind: Any, by: str) -> None:
    """
    Raises:
        SynthesisError: for unknown names.
    """
    if kind not in MEMORIES:
        raise SynthesisError(f"memory must be one of {', '.join(MEMORIES)}, got {kind!r}")
    if by not in ("all", "group"):
        raise SynthesisError(f"memory_by must be 'all' or 'group', got {by!r}")
