"""Run methods on beds: tuning, fronts, and their record on disk, from which an interrupted run continues."""

import dataclasses
import functools
import hashlib
import json
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.bench.fronts import LOSS as FIDELITY_LOSS
from kspec_guidance.bench.methods import METHODS, Method, Real, Whole
from kspec_guidance.utils.atomic_io import replacing

from .beds.base import Bed, Case

__all__ = ["FIDELITY_LOSS", "Record", "front", "measure", "slug", "take_tuned", "tune"]

Goal = Callable[[dict[str, list[float]], dict[str, Any]], float]  # of the figures of cases, and of cases together
PENALTY = 10.0  # relative modes subtracted for each unit of fidelity lost beyond that


def slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name.lower()).strip("-")


def settings(method: Method) -> dict[str, Any]:
    return {
        f.name: getattr(method, f.name) for f in dataclasses.fields(method) if f.name not in ("generator", "radius_unit")
    }


def measure(bed: Bed, make: Callable[[], Method], cases: Sequence[Case]) -> dict[str, list[float]]:
    """All figures of the judge for each case, and the seconds of sampling."""
    return measure_all(bed, make, cases)[0]


def measure_all(
    bed: Bed, make: Callable[[], Method], cases: Sequence[Case]
) -> tuple[dict[str, list[float]], Callable[[], dict[str, Any]]]:
    """The same, and a function that computes the figures of several cases together: ``pooled`` and ``distances``."""
    found: dict[str, list[float]] = {}
    rows = []
    each = (
        (measure_one(bed, make, case) for case in cases)
        if bed.workers is None
        else bed.workers.measure(measure_one, make, cases)
    )
    for own, figures in each:
        rows.append(own)
        for k, v in figures.items():
            found.setdefault(k, []).append(v)
    together = list(cases)
    return found, lambda: {"pooled": bed.pooled(rows, together), "distances": bed.distances(rows, together)}


def measure_one(bed: Bed, make: Callable[[], Method], case: Case) -> tuple[Tensor, dict[str, float]]:
    """Feature rows of the samples of one case, and its figures."""
    began = time.perf_counter()
    samples = bed.sample(make(), case)
    seconds = time.perf_counter() - began
    rows = bed.rows(torch.nan_to_num(samples, 0.0, 1e3, -1e3))  # a run that diverged is judged as it is
    return rows, {**bed.figures(rows, case), "seconds": seconds}


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


class Record:
    """Results of one bed: a JSON file, written after each measurement."""

    def __init__(self, folder: Path, bed: Bed):
        self.path = folder / f"{slug(bed.name)}.json"
        self.data: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}
        self.data.setdefault("bed", bed.name)
        self.data.setdefault("methods", {})
        self._lock = threading.Lock()

    def of(self, method: str) -> dict[str, Any]:
        return self.data["methods"].setdefault(method, {})

    def save(self) -> None:
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            rounded = json.loads(json.dumps(self.data), parse_float=lambda s: float(f"{float(s):.5g}"))
            with replacing(self.path) as fresh:
                fresh.write_text(json.dumps(rounded, separators=(",", ":")) + "\n")


def plain(bed: Bed, record: Record, half: str, seeds: int) -> dict[str, list[float]]:
    mine = record.of("plain")
    if f"{half} {seeds}" not in mine:
        mine[f"{half} {seeds}"], together = measure_all(bed, METHODS["plain"], bed.cases(half, seeds))
        if half == "report":
            mine |= together()
        record.save()
    return mine[f"{half} {seeds}"]


def aim(bed: Bed, found: dict[str, list[float]], base: dict[str, list[float]]) -> float:
    """Modes relative to plain sampling, less a penalty for fidelity lost beyond ``FIDELITY_LOSS``."""
    lost = mean(base[bed.fidelity]) - FIDELITY_LOSS - mean(found[bed.fidelity])
    return mean(found[bed.diversity]) / mean(base[bed.diversity]) - PENALTY * max(0.0, lost)


def search(
    bed: Bed,
    make: Callable[..., Method],
    ranges: dict[str, Real | Whole],
    first: dict[str, Any],
    cases: Sequence[Case],
    base: dict[str, list[float]],
    trials: int,
    seed: int,
    goal: Goal | None = None,
) -> Any:
    """An optuna study of ``make(**chosen)`` on the cases, begun at ``first``; of :func:`aim` unless a goal is given."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=6))
    study.enqueue_trial({k: v for k, v in first.items() if k in ranges})

    def objective(trial: Any) -> float:
        chosen = {
            k: trial.suggest_int(k, r.low, r.high)
            if isinstance(r, Whole)
            else trial.suggest_float(k, r.low, r.high, log=r.log)
            for k, r in ranges.items()
        }
        found, together = measure_all(bed, functools.partial(make, **chosen), cases)
        trial.set_user_attr("figures", {k: mean(found[k]) for k in (bed.diversity, bed.fidelity)})
        return aim(bed, found, base) if goal is None else goal(found, together())

    study.optimize(objective, n_trials=trials)
    return study


def tune(
    bed: Bed, name: str, record: Record, trials: int, seeds: int, goal: Callable[[Sequence[Case]], Goal] | None = None
) -> dict[str, Any]:
    """The best setting of ``trials`` by optuna's TPE sampler, on the tuning half; its default is the first trial.

    It is the best by :func:`aim`, or by the goal that is made for the tuning cases.
    """
    cls, mine = METHODS[name], record.of(name)
    if "tuned" in mine or not cls.tuned:
        return mine.get("tuned", {})
    cases, base = bed.cases("tune", seeds), plain(bed, record, "tune", seeds)
    seed = int(hashlib.sha256(f"{bed.name} {name}".encode()).hexdigest()[:8], 16)
    first, chosen_goal = settings(cls()) | cls.first(bed.steps), None if goal is None else goal(cases)
    study = search(bed, cls, cls.tuned, first, cases, base, trials, seed, chosen_goal)
    mine["tuned"] = dict(study.best_params)
    mine["trials"] = [{**t.params, "aim": t.value, **t.user_attrs.get("figures", {})} for t in study.trials]
    record.save()
    return mine["tuned"]


def take_tuned(record: Record, source: Record) -> None:
    """Take the tuned settings of another record of the bed, also for methods that are tuned as one of it is.

    Raises:
        ValueError: if they were tuned on the other half of the prompts.
    """
    halves = [bool(r.data.get("settings", {}).get("swap", False)) for r in (record, source)]
    if halves[0] != halves[1]:
        raise ValueError(f"{source.path} was tuned {'with' if halves[1] else 'without'} --swap, so on other prompts")
    for name, cls in METHODS.items():
        found = source.data["methods"].get(name, {}).get("tuned")
        found = found or source.data["methods"].get(cls.tuned_as, {}).get("tuned")
        if found is not None:
            record.of(name).setdefault("tuned", found)


def front(bed: Bed, name: str, record: Record, number: int, seeds: int) -> None:
    """Figures of the report half for several strengths around the tuned setting."""
    cls, mine = METHODS[name], record.of(name)
    if not cls.tuned:
        return
    tuned = mine["tuned"]
    done = mine.setdefault("front", [])
    for value in cls.sweep(float(tuned[cls.strength]), number):
        v = int(value) if isinstance(cls.tuned[cls.strength], Whole) else value
        if any(abs(p["strength"] - v) <= 1e-3 * max(1e-3, abs(v)) for p in done):  # records are rounded
            continue
        chosen = {**tuned, cls.strength: v}
        found, together = measure_all(bed, functools.partial(cls, **chosen), bed.cases("report", seeds))
        done.append({"strength": v, "cases": found, **together()})
        record.save()
