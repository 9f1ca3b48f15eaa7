"""Worker: one process of a run. It makes batches, commits them, and exchanges samples with the other processes."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.evaluation.neighbours import largest_cosine
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.objectives import Balance
from kspec_guidance.synthesis.arms import ArmChoice
from kspec_guidance.synthesis.candidates import choose_candidates
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.export import Packer
from kspec_guidance.synthesis.filters import Screen
from kspec_guidance.synthesis.generator import GeneratedBatch, Generator
from kspec_guidance.synthesis.marks import Marks
from kspec_guidance.synthesis.memories import RunMemories
from kspec_guidance.synthesis.provenance import Provenance
from kspec_guidance.synthesis.quotas import allot
from kspec_guidance.synthesis.records import Record, pack_target, pack_tensors, unpack_target, unpack_tensors
from kspec_guidance.synthesis.rewards import Rewards
from kspec_guidance.synthesis.schedule import Job, Sample, next_batch, prompt_score
from kspec_guidance.synthesis.settings import FEATURE_KEYS, SAMPLE_KEYS, Settings
from kspec_guidance.synthesis.store import Store

__all__ = ["Progress", "Worker"]


@dataclass(frozen=True)
class Progress:
    """Progress of a run.

    Attributes:
        done: images of all processes so far.
        total: images wanted.
        rejected: images that this process dropped.
        rate: images per second, of all processes.
        remaining: seconds left; infinite before the first image.
        diversity: mean over finished prompts of the Vendi score divided by the number of images; None before the first.
    """

    done: int
    total: int
    rejected: int
    rate: float
    remaining: float
    diversity: float | None


class Worker:
    """Makes the images of this process's jobs.

    Args:
        generator: makes the batches.
        guide: attached to the pipeline during :meth:`run`.
        jobs: of this process.
        settings: of the run.
        store: the folder of the run.
        processes: of the run.
        screen: decides which images are dropped.
        provenance: what rows say of their origin.
        marks: of the images.
        embedder: features for scores and duplicates; the samples themselves by default.
        packer: writes shards.
        balance: the objective that moves images towards attributes.
        shares: of each attribute, by name; with ``balance``.
        prompt_features: of the prompts of each process ``[n, p]``, by rank; None if nothing is exchanged.
        progress_callback: called with a :class:`Progress` after each batch and each exchange.
        arms: of which each batch has one; None for none.
        reward: numbers for images and their rows, see :func:`~kspec_guidance.synthesis.rewards.as_reward`.

    Attributes:
        batch_index: of the next batch of this process.
        exchanges: that have taken place.
        made: images of this process in this epoch.
        earlier_images: of this process's prompts in earlier epochs.
        total_images: of all processes, as of the last exchange.
        attributes: images of each attribute.
        rejected: dropped images of each reason.
        scores: Vendi score and number of images of each finished prompt, by number.
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
        provenance: Provenance,
        marks: Marks,
        embedder: ImageEmbedder | None = None,
        packer: Packer | None = None,
        balance: Balance | None = None,
        shares: dict[str, float] | None = None,
        prompt_features: list[Tensor] | None = None,
        progress_callback: Callable[[Progress], None] | None = None,
        arms: ArmChoice | None = None,
        reward: Rewards | None = None,
    ):
        self.generator, self.guide, self.jobs, self.settings = generator, guide, jobs, settings
        self.store, self.processes, self.screen = store, processes, screen
        self.embedder, self.packer, self.balance, self.shares = embedder, packer, balance, shares or {}
        self.progress_callback, self.arms, self.reward = progress_callback, arms, reward
        self.provenance, self.marks = provenance, marks
        self.memories = RunMemories(guide, settings, processes.rank, prompt_features)
        self.job_of = {job.prompt.text: job for job in jobs}
        self.batch_index = self.exchanges = 0
        self.made = self.earlier_images = self.total_images = 0
        self.rejected: Counter[str] = Counter()
        self.attributes = dict.fromkeys(self.shares, 0)
        self.scores: dict[int, tuple[float, int]] = {}

    # -- one batch -----------------------------------------------------------------------------------------------------

    def next_batch(self) -> list[Sample]:
        """Samples of the next batch, which share one memory; empty if all jobs are finished."""
        settings, find = self.settings, next_batch if self.arms is None else self.arms.next_batch
        return find(self.jobs, settings.batch_size, settings.seed, self._memory_key, settings.candidates)

    def _memory_key(self, job: Job) -> str | None:
        return self.memories.key(job.prompt.group)

    def step(self, batch: list[Sample]) -> None:
        """Make, screen, commit and add one batch."""
        self.memories.use(self._memory_key(batch[0].job))
        if self.balance is not None:
            self.balance.wanted = allot(list(self.attributes.values()), list(self.shares.values()), len(batch))
        made, rows, arm = self._make(batch)
        features = made.x.flatten(1).float().cpu() if self.embedder is None else self.embedder(made.images).cpu()
        reasons = self.screen.reasons(made.images, rows, features)
        self._add_rewards(made.images, rows, reasons)
        if self.settings.candidates > 1:
            self._choose(batch, features, made.prompt_features, reasons)
        keep = [k for k, reason in enumerate(reasons) if reason is None]
        self._add_scores(batch, keep, rows, features, made)
        rejected = [
            {"prompt": sample.job.prompt.text, "attempt": sample.attempt, "reason": reason}
            | ({} if "reward" not in row else {"reward": row["reward"]})
            for sample, reason, row in zip(batch, reasons, rows, strict=True)
            if reason is not None
        ]
        tensors = pack_tensors(
            made.x[keep],
            None if made.prompt_features is None else made.prompt_features[keep],
            None if self.embedder is None else features[keep],
        )
        target = self.guide.terms[0].target
        state: list[dict[str, Any]] = []
        if target is not None:
            state, about_target = pack_target(target.state(made.prompt_features, len(batch)))
            tensors |= about_target
        kept = [rows[k] for k in keep]
        files = {rows[k]["file_name"]: self.marks.encode(made.images[k], rows[k]) for k in keep}
        for row in kept:
            row["sha256"] = hashlib.sha256(files[row["file_name"]]).hexdigest()
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        record = Record(self.store.epoch, self.processes.rank, self.batch_index, kept, rejected, tensors, state, arm, now)
        self.store.commit(record, files)
        if self.packer is None:
            self.store.append_metadata(record.rows)
        self.apply(record)

    def _make(self, batch: list[Sample]) -> tuple[GeneratedBatch, list[dict[str, Any]], dict[str, Any] | None]:
        """Make a batch, with the arm that is chosen for it; its rows, and what its record says of the arm."""
        if self.arms is None:
            made, origin = self.generator.make(batch), self.provenance.columns(self.generator.pipe, self.generator.call)
            return made, [self._row(sample, k) | origin for k, sample in enumerate(batch)], None
        arm = self.arms.choose()
        with self.arms.applied(arm) as event:
            made = self.generator.make(batch)
            origin = self.provenance.columns(self.generator.pipe, self.generator.call, arm.model) | {"arm": arm.name}
            rows = [self._row(sample, k) | origin for k, sample in enumerate(batch)]
        return made, rows, event(len(batch))

    def _add_rewards(self, images: list[Image.Image], rows: list[dict[str, Any]], reasons: list[str | None]) -> None:
        """Add to the rows of images that passed the filters the reward that selectors are told."""
        keep = [] if self.reward is None else [k for k, reason in enumerate(reasons) if reason is None]
        if self.reward is not None and keep:
            found = self.reward([images[k] for k in keep], [rows[k] for k in keep])
            for k, value in zip(keep, found, strict=True):
                rows[k]["reward"] = value

    def _choose(self, batch: list[Sample], features: Tensor, prompts: Tensor | None, reasons: list[str | None]) -> None:
        """Keep one candidate of each image, and give the others a reason to be dropped."""
        jobs = list(dict.fromkeys(sample.job for sample in batch))
        first = {job: next(k for k, sample in enumerate(batch) if sample.job is job) for job in jobs}
        t = torch.eye(len(jobs)) if prompts is None else prompts.flatten(1).float().cpu()[[first[job] for job in jobs]]
        earlier = [torch.cat(job.features) if job.features else features[:0] for job in jobs]
        of_earlier = t.repeat_interleave(torch.tensor([len(x) for x in earlier]), 0)
        mine = t[[jobs.index(sample.job) for sample in batch]]
        usable = [reason is None for reason in reasons]
        chosen = choose_candidates(
            features, mine, usable, self.settings.candidates, torch.cat(earlier), of_earlier
        )  # fmt: skip
        for k in set(range(len(batch))) - set(chosen):
            reasons[k] = reasons[k] or "another candidate was kept"

    def _row(self, sample: Sample, k: int) -> dict[str, Any]:
        """The metadata of image ``k`` of a batch, without its scores."""
        job, term = sample.job, self.guide.terms[0]
        group = {"group": job.prompt.group} if self.settings.grouped else {}
        row: dict[str, Any] = {
            **job.prompt.extra,
            "file_name": sample.file_name,
            "prompt": job.prompt.text,
            **group,
            "seed": sample.seed,
            "attempt": sample.attempt,
            "prompt_number": job.number,
            "guide": type(term.objective).__name__ if term.scale else "none",
            "variety": term.variety if term.target is None else term.target.used[k],
            "scale": term.scale if term.unit == "norm" else None,
            "settings": self.settings.digest,
        }
        return row

    def _add_scores(
        self, batch: list[Sample], keep: list[int], rows: list[dict[str, Any]], features: Tensor, made: GeneratedBatch
    ) -> None:
        """Add to the rows of kept images the largest cosine to an earlier image of the prompt, and the prompt's score."""
        assigned = None
        if self.balance is not None:
            assigned = [list(self.shares)[a] for a in self.balance.assign(made.x.cpu())]
        for job in dict.fromkeys(sample.job for sample in (batch[k] for k in keep)):
            kept = [k for k in keep if batch[k].job is job]
            earlier = torch.cat(job.features) if job.features else features[:0]
            all_features = torch.cat([earlier, features[kept]])
            score = round(prompt_score(all_features), 4)
            for position, k in enumerate(kept):
                cosine = float(largest_cosine(features[k : k + 1], all_features[: len(earlier) + position])[0])
                rows[k]["nearest"] = round(cosine, 4) if math.isfinite(cosine) else None
                rows[k]["vendi"] = score if math.isfinite(score) else None
                if assigned is not None:
                    rows[k]["attribute"] = assigned[k]

    # -- what follows from a record ------------------------------------------------------------------------------------

    def apply(self, record: Record) -> None:
        """Update all state by a committed batch of this process."""
        self.count(record)
        self.learn(record)
        if self.arms is not None:
            self.arms.learn(record)

    def count(self, record: Record, earlier: bool = False) -> None:
        """Update jobs, scores and filters; a record of an ``earlier`` epoch may hold prompts of other processes."""
        features = unpack_tensors(record.tensors).features
        if earlier and not self.comparable(record.epoch, FEATURE_KEYS):
            features = features[:, :0]
        if not earlier:
            self.batch_index = record.batch_index + 1
        kept: dict[str, list[int]] = {}  # indices of the rows of each prompt
        dropped: Counter[str] = Counter()
        for k, row in enumerate(record.rows):
            if row["prompt"] in self.job_of:
                kept.setdefault(row["prompt"], []).append(k)
                if row.get("attribute") in self.attributes:
                    self.attributes[row["attribute"]] += 1
        for row in record.rejected:
            if row["prompt"] in self.job_of:
                kept.setdefault(row["prompt"], [])
                dropped[row["prompt"]] += 1
                self.rejected[row["reason"]] += 1
        for row in (*record.rows, *record.rejected):
            if row["prompt"] in kept:
                job = self.job_of[row["prompt"]]
                job.attempts = max(job.attempts, row["attempt"] + 1)
        images = sum(map(len, kept.values()))
        if earlier:
            self.earlier_images += images
        else:
            self.made += images
        for text, indices in kept.items():
            job = self.job_of[text]
            score = job.update(len(indices), dropped[text], features[indices], self.settings.target)
            if score is not None:
                self.scores[job.number] = score
        if features.shape[1]:
            self.screen.add(features)
        if self.packer is not None and not earlier:
            self.packer.add(record)

    def learn(self, record: Record, earlier: bool = False) -> None:
        """Add the samples to the memory; those of an ``earlier`` epoch if they can be compared with the samples now."""
        if earlier and not self.comparable(record.epoch, SAMPLE_KEYS):
            return
        target = self.guide.terms[0].target
        if target is not None:
            target.load(unpack_target(record))
        x, prompt_features, _ = unpack_tensors(record.tensors)
        self.memories.add(x, prompt_features, [row.get("group") for row in record.rows], self.generator.device, earlier)

    def _same_arms(self, epoch: int) -> set[str]:
        """Names of the arms that had the same settings in an earlier epoch."""
        old, now = (self.store.settings(e).get("arms", []) for e in (epoch, self.store.epoch))
        return {arm["name"] for arm in now if arm in old}

    def comparable(self, epoch: int, keys: Iterable[str]) -> bool:
        """Whether the settings of an earlier epoch and of this one agree in ``keys``."""
        old, now = (self.store.settings(e).get("samples", {}) for e in (epoch, self.store.epoch))
        return all(old.get(key) == now.get(key) for key in keys)

    # -- exchanges -----------------------------------------------------------------------------------------------------

    def _exchange_due(self) -> bool:
        return self.batch_index >= (self.exchanges + 1) * self.settings.exchange

    def exchange(self, finished: bool) -> bool:
        """Exchange samples with the other processes.

        Args:
            finished: whether this process has finished its jobs.

        Returns:
            Whether all processes have.
        """
        message = self.memories.message(self.processes.rank, self.memories.unsent)
        self.memories.unsent.clear()
        states = self.processes.gather_integers(int(finished), self.earlier_images + self.made)
        if self.memories.prompt_features is not None:
            empty = torch.zeros(0, 0, dtype=self.memories.message_dtype)
            self.memories.receive(self.processes.gather(empty if message is None else message))
        self._hear_of_arms()
        self.exchanges += 1
        self.total_images = sum(state[1] for state in states)
        return all(state[0] for state in states)

    def _hear_of_arms(self) -> None:
        """Tell the selector the batches that the other processes made since the last exchange, in order."""
        if self.arms is None:
            return
        first = self.exchanges * self.settings.exchange
        for rank in range(self.processes.world_size):
            if rank != self.processes.rank:
                for record in self.store.process_records(rank, first, first + self.settings.exchange):
                    self.arms.learn(record)

    def learn_earlier(self) -> None:
        """Restore what follows from the records of earlier epochs."""
        for record in self.store.earlier_records(tensors=True):
            self.count(record, earlier=True)
            self.learn(record, earlier=True)
            if self.arms is not None and self.comparable(record.epoch, FEATURE_KEYS):
                self.arms.learn(record, same=self._same_arms(record.epoch))

    def resume(self) -> None:
        """Restore the state from the records of all epochs, with the exchanges that have taken place."""
        self.learn_earlier()
        store, rank = self.store, self.processes.rank
        exchanging = self.processes.world_size > 1
        for record in store.process_records(rank):
            while exchanging and self._exchange_due():
                exchanging = self._replay_exchange()
            if self.arms is not None:  # as when the batch was made
                self.next_batch()
                self.arms.choose()
            self.apply(record)
        while exchanging:
            if not self._exchange_due():  # without a batch left, as then
                self.next_batch()
            exchanging = self._replay_exchange()

    def _replay_exchange(self) -> bool:
        """Repeat the next exchange from the records of the other processes, if it took place.

        Returns:
            Whether there may be another one.
        """
        finished = all(job.finished for job in self.jobs)
        states = self.processes.gather_integers(int(finished), int(finished or self._exchange_due()))
        if not all(ready for _, ready in states):
            return False
        first, messages = self.exchanges * self.settings.exchange, []
        for rank in range(self.processes.world_size):
            message = None
            if rank != self.processes.rank and self.memories.prompt_features is not None:
                records = self.store.process_records(rank, first, first + self.settings.exchange)
                samples = [unpack_tensors(record.tensors)[:2] for record in records]
                message = self.memories.message(rank, [sample for sample in samples if len(sample[0])])
            messages.append(torch.zeros(0, 0) if message is None else message)
        self.memories.receive(messages)
        self.memories.unsent.clear()
        self._hear_of_arms()
        self.exchanges += 1
        return not all(done for done, _ in states)

    # -- the run -------------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Make all remaining batches."""
        start, made_before = time.monotonic(), self.made
        with self.guide.attach(self.generator.pipe) if self.arms is None else self.arms.models.loaded():
            while True:
                exchange_due = self.processes.world_size > 1 and self._exchange_due()
                batch = [] if exchange_due else self.next_batch()
                if batch:
                    self.step(batch)
                elif self.processes.world_size == 1 or self.exchange(all(job.finished for job in self.jobs)):
                    break
                self._report_progress(time.monotonic() - start, self.made - made_before)

    def _report_progress(self, seconds: float, made: int) -> None:
        if self.progress_callback is None:
            return
        world_size, total = self.processes.world_size, self.settings.expected_images
        own = self.earlier_images + self.made
        done = own if world_size == 1 else max(self.total_images, own)
        rate = made * world_size / max(seconds, 1e-9)
        remaining = max(0, total - done) / rate if rate else float("inf")
        self.progress_callback(Progress(done, total, sum(self.rejected.values()), rate, remaining, self.diversity))

    @property
    def diversity(self) -> float | None:
        """Mean over finished prompts of the Vendi score divided by the number of images; None before the first."""
        shares = [score / n for score, n in self.scores.values() if n > 1]
        return sum(shares) / len(shares) if shares else None
