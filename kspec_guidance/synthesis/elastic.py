"""Runs whose workers come and go: each takes one unit after another by a lease, until all are finished."""

import json
import re
import time
from collections.abc import Callable, Collection
from pathlib import Path
from time import perf_counter

from kspec_guidance.synthesis.assignment import Units, units_of
from kspec_guidance.synthesis.conclusion import Ending, conclude, recount
from kspec_guidance.synthesis.distributed import OneProcess
from kspec_guidance.synthesis.engines import Task, start_workers
from kspec_guidance.synthesis.errors import RunFailedError, SettingsChangedError, SynthesisError
from kspec_guidance.synthesis.folder import collect, open_folder, prompt_numbers, stored_settings
from kspec_guidance.synthesis.history import History
from kspec_guidance.synthesis.leases import LeaseLostError, Leases
from kspec_guidance.synthesis.result import Synthesis
from kspec_guidance.synthesis.run import Run, restored
from kspec_guidance.synthesis.schedule import Job
from kspec_guidance.synthesis.settings import differences
from kspec_guidance.synthesis.storage import Storage
from kspec_guidance.synthesis.store import Store
from kspec_guidance.synthesis.units import Unit, UnitLog, UnitStore, WaitingError
from kspec_guidance.synthesis.worker import Progress
from kspec_guidance.utils.messages import warn_user

__all__ = ["join_run", "run_with_workers", "work"]

POLL_SECONDS = 5.0  # between two looks for a unit to take, at most
EPOCH = re.compile(r"epoch-(\d{3,})")
Show = Callable[[Progress], None]


def work(
    run: Run,
    store: Store,
    log: UnitLog,
    units: Units,
    leases: Leases,
    jobs: Callable[[], list[Job]],
    show: Show | None = None,
    history: History | None = None,
    in_order: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Take units and finish them, until all are finished.

    Args:
        run: of the units.
        store: the folder of the run, for records of earlier epochs.
        log: of the units.
        units: of the run.
        leases: as this worker sees them.
        jobs: makes new jobs of all prompts.
        show: called after each batch.
        history: to follow.
        in_order: take units by number; otherwise each worker begins at another one.
        sleep: waits before the next look.

    Returns:
        Images made here.
    """
    made, start, expected = 0, time.monotonic(), sum(job.goal for job in jobs())
    first = 0 if in_order else sum(leases.worker.encode()) % max(1, units.number)
    order = [*range(first, units.number), *range(first)]
    awaited: dict[int, tuple[int, int]] = {}  # unit and number of the summary that a unit waits for
    poll = min(POLL_SECONDS, leases.seconds / 8)
    checked = False
    while len(leases.done()) < units.number:
        # a unit that waits is taken again, and its records read, when there is what it waits for
        lease = leases.take([unit for unit in order if unit not in awaited or log.has_summary(*awaited[unit])])
        if lease is None:
            sleep(poll)
            continue
        awaited.pop(lease.unit, None)
        with restored(run.run_guide, copy_memory=True), lease.beating(leases.seconds):
            before = made

            def report(now: Progress, before: int = before) -> None:
                if show is not None:
                    rate = (before + now.done) / max(time.monotonic() - start, 1e-9)
                    show(Progress(before + now.done, expected, now.rejected, rate, float("inf"), now.diversity))

            unit_store = UnitStore(store.out, log, lease, run.settings)
            mine = [job for job, owner in zip(jobs(), units.owners, strict=True) if owner == lease.unit]
            worker = run.worker(
                mine, expected, unit_store, OneProcess(lease.unit), None, units.prompt_features, units.contexts, report
            )
            end = None
            try:
                unit = Unit(worker, unit_store, None if history is None else history.units[lease.unit])
                unit.resume()
                if not checked:
                    run.generator.check_mixed(worker.jobs, run.arguments["batch_size"], run.screened)
                    checked = True
                unit.run()
                end = unit_store.digest
            except WaitingError as error:
                awaited[lease.unit] = error.unit, error.number
            except LeaseLostError:  # its records tell what was committed; the unit is left to its owner
                pass
            finally:
                made = before + worker.made - unit_store.replayed
                lease.release(end)
        order.remove(lease.unit)  # so that others are tried first, if it waits for them
        order.append(lease.unit)
    return made


def join_run(
    run: Run, place: str, out: Path | None, ending: Ending, history: History | None = None, show: Show | None = None
) -> Synthesis:
    """Work in a run on shared storage until it is finished, and make the set in ``out``, if that is given.

    Args:
        run: to work in; it is begun here, if it is the first.
        place: folder or URL of the storage.
        out: folder of the set; None to leave it to others.
        ending: what is asked for at the end.
        history: to follow.
        show: called after each batch.

    Raises:
        SettingsChangedError: if the storage holds a run with other settings, such as another model, other prompts or
            another version of a package.
    """
    _check(run)
    storage = Storage(place)
    storage.check()
    folder = storage.folder
    if folder is None or folder.parent.name != ".kspec" or not EPOCH.fullmatch(folder.name):
        store = Store(Path(storage.place))
    else:  # of a run that was begun in its folder
        store = Store(folder.parent.parent)
        store.epoch = int(folder.name.removeprefix("epoch-"))
    settings = json.dumps(run.settings, indent=1).encode() + b"\n"
    begun = storage.create("settings.json", settings)
    changed = [] if begun else differences(stored_settings(storage), run.settings)
    if changed:
        raise SettingsChangedError(Path(place), changed, None)
    start = perf_counter()
    numbers = prompt_numbers(store)
    jobs = run.jobs(numbers)
    units = units_of(run, jobs, storage, history)
    leases = Leases(storage, units.number, run.arguments["lease_seconds"])
    made = work(run, store, UnitLog(storage, store.epoch), units, leases, lambda: run.jobs(numbers), show, history)
    seconds = perf_counter() - start
    if out is None:
        images = leases.images()
        return Synthesis(
            Path(place), images, made=made, total_made=images, seconds=seconds,
            guidance_seconds=run.generator.guidance_seconds,
        )  # fmt: skip
    own = run.store(out)
    try:
        open_folder(own, OneProcess(), run.settings, False, run.types, ())
        ending.prepare(sum(job.goal for job in jobs), run.arguments["format"])
        return _conclude(run, own, storage, units, ending, made, seconds)
    finally:
        own.unlock()


def run_with_workers(
    run: Run,
    out: Path,
    workers: int,
    engine: str,
    ending: Ending,
    force: bool,
    drop: Collection[str],
    sign: str | Path | None,
    task: Task,
    history: History | None = None,
    show: Show | None = None,
) -> Synthesis:
    """Make a set with workers of this machine, or of a Ray cluster.

    Args:
        run: to make.
        out: the folder of the set, which also is the storage.
        workers: their number; one works in this process.
        engine: that starts them.
        ending: what is asked for at the end.
        force: as in ``synthesize``.
        drop: likewise.
        sign: likewise.
        task: what a worker of Ray runs.
        history: to follow, with one worker.
        show: called with the progress.

    Raises:
        RunFailedError: if workers failed before the run was finished.
    """
    _check(run)
    store = run.store(out)
    try:
        open_folder(store, OneProcess(), run.settings, force, run.types, drop)
        numbers = prompt_numbers(store)
        jobs = run.jobs(numbers)
        total = sum(job.goal for job in jobs)
        ending.prepare(total, run.arguments["format"])
        storage = Storage(store.folder(store.epoch))
        storage.check()
        units = units_of(run, jobs, storage, history)
        leases = Leases(storage, units.number, run.arguments["lease_seconds"])
        if units.number < workers:
            warn_user(
                f"the prompts form {units.number} groups of similar ones, each of which one worker makes, so that "
                f"{workers - units.number} of {workers} workers have nothing to do"
            )
        start, before = perf_counter(), leases.images()
        earlier = sum(len(record.rows) for record in store.earlier_records())
        if workers == 1 and engine == "processes":
            log = UnitLog(storage, store.epoch)
            work(run, store, log, units, leases, lambda: run.jobs(numbers), show, history, in_order=True)
        elif len(leases.done()) < units.number:
            with start_workers(engine, workers, run, storage, task, sign) as pool:
                while pool.alive():
                    pool.wait(1.0)
                    if show is not None:
                        done, seconds = leases.images(), max(perf_counter() - start, 1e-9)
                        rate = (done - before) / seconds
                        left = max(0, total - earlier - done) / rate if rate else float("inf")
                        show(Progress(earlier + done, total, 0, rate, left, None))
                if len(leases.done()) < units.number:
                    raise RunFailedError(
                        f"all {workers} workers ended before the set was finished; finished images are safe, and the same "
                        f"command continues after them. {pool.failure()}"
                    )
        made = leases.images() - before
        return _conclude(run, store, storage, units, ending, made, perf_counter() - start)
    finally:
        store.unlock()


def _check(run: Run) -> None:
    """Refuse what workers that come and go cannot share."""
    if run.entries:
        raise SynthesisError(
            f"the guide's memory has {run.entries} entries, which workers that come and go do not share; start with an "
            "empty memory, or without workers"
        )


def _conclude(
    run: Run, store: Store, storage: Storage, units: Units, ending: Ending, made: int, seconds: float
) -> Synthesis:
    """Make the set from the records of all units."""
    own = Storage(store.folder(store.epoch))
    history = collect(store, UnitLog(storage, store.epoch), units.owners)
    jobs, processes = run.jobs(prompt_numbers(store)), OneProcess()
    packer = run.packer(store)
    with restored(run.run_guide, copy_memory=True):
        worker = run.worker(jobs, sum(job.goal for job in jobs), store, processes, packer, None, units.contexts)
        recount(worker, store)
        if packer is not None:
            packer.finish(store.epoch, processes.rank)
        run.recipe.history = history if history.any_read else None
        result = Synthesis(
            store.out, images=0, made=made, total_made=made, seconds=seconds,
            guidance_seconds=run.generator.guidance_seconds,
        )  # fmt: skip
        result = conclude(run, store, processes, worker, result, ending)
    own.delete("images")  # which are in the set now
    return result
