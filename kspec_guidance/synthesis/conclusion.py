"""The end of a run: counts, metadata, report, and the files that go with the set."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

from kspec_guidance.guidance.targets import STATUSES
from kspec_guidance.memory import Memory, MemoryBank
from kspec_guidance.synthesis.arms import arm_differences, arm_summary
from kspec_guidance.synthesis.card import Contents
from kspec_guidance.synthesis.deduplication import write_semantic_duplicates
from kspec_guidance.synthesis.distributed import Processes
from kspec_guidance.synthesis.errors import SynthesisError, disk_errors
from kspec_guidance.synthesis.hub import HubUpload
from kspec_guidance.synthesis.publication import write_publication
from kspec_guidance.synthesis.records import unpack_target, unpack_tensors
from kspec_guidance.synthesis.result import Synthesis
from kspec_guidance.synthesis.run import Run
from kspec_guidance.synthesis.schedule import NO_TRY_PAYS
from kspec_guidance.synthesis.settings import FEATURE_KEYS
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.worker import Worker

__all__ = ["Ending", "conclude", "recount"]

STOP_REASONS = (
    "all images made",
    "more images add little",
    "most images made",
    "target reached",
    "too many rejected",
    NO_TRY_PAYS,
)


class Ending:
    """What is asked for at the end of a run; checked before it begins.

    Args:
        report: whether ``report.html`` is written.
        semantic_duplicates: cosine from which images are listed; None for none.
        memory_file: where an exact memory is saved; None for nowhere.
        push_to_hub: dataset repository; None for none.
    """

    def __init__(
        self, report: bool, semantic_duplicates: float | None, memory_file: str | Path | None, push_to_hub: str | None
    ):
        self.report, self.semantic_duplicates = report, semantic_duplicates
        self.memory_file = None if memory_file is None else Path(memory_file)
        self.hub = None if push_to_hub is None else HubUpload(push_to_hub)

    def prepare(self, images: int, format: str) -> None:
        """Find out what would fail at the end of the run.

        Args:
            images: that the run makes.
            format: of the set.
        """
        if self.hub is not None:
            self.hub.prepare(images, format)
        if self.memory_file is not None:
            if self.memory_file.is_dir():
                raise SynthesisError(f"memory_file {self.memory_file} is a folder; give the name of a file")
            with disk_errors(self.memory_file):
                self.memory_file.parent.mkdir(parents=True, exist_ok=True)


def conclude(run: Run, store: Store, processes: Processes, worker: Worker, result: Synthesis, ending: Ending) -> Synthesis:
    """Complete the result of a run, and write what goes with the set.

    Args:
        run: that has ended.
        store: its folder.
        processes: of the run.
        worker: of this process, which has counted all of its images.
        result: of this process so far.
        ending: what is asked for.
    """
    _complete(store, processes, worker, result, ending.report)
    if not result.first:
        return result
    recipe = run.recipe
    if result.images:
        if ending.semantic_duplicates is not None:
            comparable = [e for e in store.epochs() if worker.comparable(e, FEATURE_KEYS)]
            result.semantic_duplicates = write_semantic_duplicates(store, comparable, ending.semantic_duplicates)
        if next(store.earlier_records(), None) is not None:
            recipe.obstacles.append("what came before: settings were changed, or images left out, while the set was made")
        write_publication(
            store,
            Contents(store.rows(), result.rejected, run.arguments["format"]),
            result.report,
            recipe,
            run.prompts,
            None if ending.hub is None else ending.hub.url,
        )
    if ending.memory_file is not None:
        _save_memory(store, run.memory, run.entries, ending.memory_file)
    if ending.hub is not None and result.images:
        result.url = ending.hub.push(store.out)
    return result


def recount(worker: Worker, store: Store) -> None:
    """Count the images of all units in a worker that has all jobs, and pack them, when their workers have ended."""
    target = worker.guide.terms[0].target
    for record in store.records(tensors=True):
        worker.count(replace(record, rank=worker.processes.rank), earlier=record.epoch != store.epoch)
        if target is not None:
            target.load(unpack_target(record))
    for job in worker.jobs:
        if not job.finished:  # which its worker has found out before a batch
            job.stop_reason = NO_TRY_PAYS


def _complete(store: Store, processes: Processes, worker: Worker, result: Synthesis, report: bool) -> None:
    """Count the whole set, and write metadata, summary and report."""
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

            result.report = write_report(store.out, rows, summary, worker.embedder)
    processes.wait_for_all()


def _save_memory(store: Store, guide_memory: Memory, entries: int, path: Path) -> None:
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
