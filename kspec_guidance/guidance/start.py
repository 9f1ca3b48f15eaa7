"""Start noises that are chosen against the memory and each other by their first predictions, before a call begins."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kspec_guidance.guidance.comparison import PlainRun, RepeatedCall
from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.loop.context import StepContext
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.loop.starts import patch_starts
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Objective, natural_rows
from kspec_guidance.utils.precision import full_precision

if TYPE_CHECKING:
    from kspec_guidance.guidance.guide import KernelGuidance

__all__ = ["StartChoice", "choose_start", "greedy_choice"]


class _Enough(BaseException):
    """Stops a call once its first prediction is known; no error, which modular pipelines would log with its traceback."""


class _FirstPrediction(PlainRun):
    """Keeps the first prediction of a call, and stops it there."""

    x0: Tensor
    context: StepContext

    def step(self, prediction: Prediction, context: StepContext) -> None:
        """Keep the prediction."""
        self.x0, self.context = context.layout.pack(prediction.x0).clone(), context
        raise _Enough


class StartChoice:
    """The result of :meth:`KernelGuidance.choose_start`.

    Attributes:
        result: what the pipeline returned for the chosen noises.
        chosen: index of the chosen candidate of each image ``[n]``; 0 is the noise that a plain call would begin with.
        candidates: number of candidates of each image.
        extra_calls: number of denoiser steps of the whole batch beyond those of a plain call.
        report: the report of the call.
    """

    def __init__(self, result: Any, chosen: Tensor, candidates: int, extra_calls: int, report: GuidanceReport):
        self.result, self.chosen, self.candidates = result, chosen, candidates
        self.extra_calls, self.report = extra_calls, report

    def __repr__(self) -> str:
        changed = int((self.chosen > 0).sum())
        return (
            f"StartChoice({changed} of {len(self.chosen)} noises replaced, {self.candidates} candidates an image, "
            f"{self.extra_calls} extra denoiser calls)"
        )


def greedy_choice(
    objective: Objective, rows: Tensor, prompts: Tensor | None = None, memory: Memory | None = None
) -> Tensor:
    """For each sample in turn the candidate with which the objective is largest, given memory and earlier choices ``[n]``.

    Args:
        objective: the objective; an open bandwidth is fitted to all candidates once.
        rows: features ``[candidates, n, d]``.
        prompts: unit-norm prompt features ``[n, p]``.
        memory: memory of earlier samples.
    """
    candidates, n = rows.shape[:2]
    with full_precision(rows.device):
        x = natural_rows(rows.flatten(0, 1), objective.normalize)
        every = None if prompts is None else prompts.repeat(candidates, 1)
        objective = objective.fit(x, every, memory)
        x = x.view(candidates, n, -1)
        kept, chosen = x[0, :0], []
        for i in range(n):
            given = None if prompts is None else prompts[: i + 1]
            values = torch.stack([objective.value(torch.cat([kept, c[i : i + 1]]), given, memory) for c in x])
            best = int(values.argmax())  # the first of equal ones
            kept = torch.cat([kept, x[best, i : i + 1]])
            chosen.append(best)
    return torch.tensor(chosen)


def choose_start(guide: "KernelGuidance", attachment: Any, repeated: RepeatedCall, candidates: int) -> StartChoice:
    """:meth:`KernelGuidance.choose_start` for a guide that is attached to the pipeline."""
    term, pipe = guide.terms[0], repeated.pipe
    if candidates == 1:
        result = repeated(advance=True)
        return StartChoice(result, torch.zeros(guide.report().images, dtype=torch.int64), 1, 0, guide.report())
    starts: list[Any] = []  # what the call begins from, for each candidate
    predictions: list[_FirstPrediction] = []

    def keep(start: Any) -> Any:
        starts.append(start)
        return start

    for k in range(candidates):
        first = _FirstPrediction(attachment.handler.needs_denoiser_call)
        with _starts(pipe, keep, guide), suppress(_Enough), attachment.handled_by(first):
            repeated(k)
        predictions.append(first)
    call, prompts = predictions[0].context.call, predictions[0].context.prompts
    with torch.no_grad():
        parts = [p.x0 if term.space.direct else term.space.features(p.x0, p.context.call)[0] for p in predictions]
        if len(term.memory):
            term.memory.bind(parts[0].shape[1:], term.space.label, call.encoder)
        chosen = greedy_choice(term.objective, torch.stack([p.flatten(1) for p in parts]), prompts, term.memory)
    with _starts(pipe, lambda start: _rows_of(starts, chosen), guide):
        result = repeated(advance=True)
    return StartChoice(result, chosen, candidates, candidates, guide.report())


@contextmanager
def _starts(pipe: Any, change: Callable[[Any], Any], guide: "KernelGuidance") -> Iterator[None]:
    """Replace what the call in this block begins from."""
    patches = patch_starts(pipe, change, guide)
    try:
        yield
    finally:
        for patch in patches:
            patch.remove()


def _rows_of(starts: list[Any], chosen: Tensor) -> Any:
    """What the call is to begin from: of each sample the rows of the chosen candidate."""
    if isinstance(starts[0], dict):
        return {name: _rows_of([start[name] for start in starts], chosen) for name in starts[0]}
    if not isinstance(starts[0], Tensor):
        several = [
            _rows_of(list(part), chosen) if isinstance(part[0], Tensor) else part[0] for part in zip(*starts, strict=True)
        ]
        return type(starts[0])(several)
    n = len(chosen)
    if starts[0].ndim < 2 or len(starts[0]) % n:  # no rows of samples, such as positions
        return starts[0]
    if all(torch.equal(start, starts[0]) for start in starts[1:]):  # nothing of it is drawn
        return starts[0]
    parts = torch.stack([start.unflatten(0, (n, -1)) for start in starts])
    return parts[chosen.to(parts.device), torch.arange(n, device=parts.device)].flatten(0, 1)
