"""GuidanceReport: the steps, moves and scores of a guided run."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, median_bandwidth
from kspec_guidance.loop.context import StepContext
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import natural_rows

__all__ = ["GuidanceReport", "StepRecord"]

MEMORY_ROWS = 512  # newest memory rows that are included in the scores


@dataclass(frozen=True)
class StepRecord:
    """One guided step.

    Attributes:
        step: index in the run.
        relative_move: norm of the move over the norm of the moved sample, mean over the samples; in half precision that of
            the move that rounding has left.
        noise_to_signal: ``sigma / alpha``.
    """

    step: int
    relative_move: float
    noise_to_signal: float


class GuidanceReport:
    """Report of the last run of a guide.

    ``before`` and ``after`` contain ``vendi`` and ``conditional_rke`` of the batch and the memory at the start of the run
    (its newest 512 rows), for the predictions of the last guided step without and with their move; ``final`` those of the
    finished samples. All use one Gaussian kernel on rows of norm 1, at the median distance of unmoved predictions and
    memory rows.

    Attributes:
        total_steps: number of steps of the run.
        scheduler: class name of the scheduler.
        layout: layout of the samples, see :mod:`kspec_guidance.loop.layouts`.
    """

    def __init__(self, total_steps: int = 0, scheduler: str = "", layout: str = ""):
        self.total_steps, self.scheduler, self.layout = total_steps, scheduler, layout
        # recorded by the run; the scores are computed on access
        self.context: StepContext | None = None
        self.moves: list[tuple[int, Tensor, float | Tensor]] = []  # step, relative moves [n], noise-to-signal
        self.latest: tuple[Tensor, Tensor] | None = None  # moved samples of the last guided step, and the move
        self.finished: Tensor | None = None
        self.memory_rows: tuple[Tensor, Tensor | None] | None = None  # at the start of the run, and their prompts

    @classmethod
    def of(cls, context: StepContext, memory: Any) -> "GuidanceReport":
        """Create the report of a pass that begins with this memory."""
        report = cls(context.total, type(context.scheduler).__name__, context.layout.kind)
        report.context = context
        if isinstance(memory, MemoryBank) and len(memory):
            report.memory_rows = memory.newest(MEMORY_ROWS)
        return report

    @property
    def steps(self) -> list[StepRecord]:
        """The guided steps, in order."""
        return [StepRecord(step, float(relative.mean()), float(noise)) for step, relative, noise in self.moves]

    @property
    def steps_guided(self) -> int:
        """Number of guided steps."""
        return len(self.moves)

    @property
    def seconds(self) -> float:
        """Time spent in guidance, without the denoiser and the scheduler."""
        return 0.0 if self.context is None else self.context.time.seconds

    @property
    def mean_relative_move(self) -> float:
        """Mean relative move over guided steps and samples; 0 if no step was guided."""
        steps = self.steps
        return sum(s.relative_move for s in steps) / len(steps) if steps else 0.0

    def _scores(self, x: Tensor | None) -> dict[str, float]:
        if x is None or self.latest is None:
            return {}
        # on the CPU, since scores need float64, which some accelerators lack
        rows, first = natural_rows(x.cpu(), normalize=True), natural_rows(self.latest[0].cpu(), normalize=True)
        t = None if self.context is None or self.context.prompts is None else self.context.prompts.cpu()
        if self.memory_rows is not None and self.memory_rows[0].shape[1] == rows.shape[1]:
            old, old_prompts = natural_rows(self.memory_rows[0], normalize=True).to(rows), self.memory_rows[1]
            rows, first = torch.cat([rows, old]), torch.cat([first, old])
            t = None if t is None or old_prompts is None else torch.cat([t, old_prompts.to(t)])
        kernel = GaussianKernel(median_bandwidth(first))
        t = torch.ones(len(rows), 1, device=rows.device) if t is None else t
        return {
            "vendi": float(F.vendi_score(rows, kernel)),
            "conditional_rke": float(F.conditional_rke_score(rows, t, kernel, GaussianKernel(PROMPT_BANDWIDTH))),
        }

    @property
    def before(self) -> dict[str, float]:
        """Scores of the last guided step's predictions, unmoved."""
        return self._scores(None if self.latest is None else self.latest[0])

    @property
    def after(self) -> dict[str, float]:
        """Scores of the last guided step's predictions, moved."""
        return self._scores(None if self.latest is None else self.latest[0] + self.latest[1])

    @property
    def final(self) -> dict[str, float]:
        """Scores of the finished samples."""
        return self._scores(self.finished)

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON."""
        return {
            "steps_guided": self.steps_guided,
            "total_steps": self.total_steps,
            "mean_relative_move": self.mean_relative_move,
            "before": self.before,
            "after": self.after,
            "final": self.final,
            "seconds": self.seconds,
            "scheduler": self.scheduler,
            "layout": self.layout,
        }

    def __repr__(self) -> str:
        return (
            f"GuidanceReport(steps_guided={self.steps_guided}, total_steps={self.total_steps}, "
            f"mean_relative_move={self.mean_relative_move:.3g}, seconds={self.seconds:.3g}, scheduler={self.scheduler!r})"
        )

    def __str__(self) -> str:
        if not self.moves:
            return f"no step of {self.total_steps} was guided (scale 0, or outside the interval); {self.seconds:.3f} s"
        before, after = self.before, self.after
        return (
            f"guided {self.steps_guided} of {self.total_steps} steps, mean move {self.mean_relative_move:.2%} of the norm; "
            f"predictions at the last guided step: Vendi {before['vendi']:.2f} -> {after['vendi']:.2f}, "
            f"conditional RKE {before['conditional_rke']:.2f} -> {after['conditional_rke']:.2f}; {self.seconds:.3f} s"
        )
