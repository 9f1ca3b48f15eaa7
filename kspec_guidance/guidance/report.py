"""What a guided run did, in numbers."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, median_bandwidth
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import PROMPT_BANDWIDTH, natural_rows

__all__ = ["GuidanceReport", "StepRecord"]

ROWS = 512  # newest memory rows that take part in the scores


@dataclass(frozen=True)
class StepRecord:
    """One guided step: its place in the run, mean move relative to the norm of what was moved, and noise-to-signal."""

    step: int
    relative_move: float
    noise_to_signal: float


@dataclass
class GuidanceReport:
    """The last run of a guide.

    ``before`` and ``after`` hold ``vendi`` and ``conditional_rke`` of the batch with the memory it met (the newest 512
    rows), on the clean predictions of the last guided step without and with its move; ``final`` those of the finished
    samples. All three use one Gaussian kernel, at the median distance of the unmoved predictions, on rows of norm 1.
    """

    steps: list[StepRecord] = field(default_factory=list)
    total_steps: int = 0
    seconds: float = 0.0
    scheduler: str = ""
    layout: str = ""
    _latest: tuple[Tensor, Tensor] | None = None
    _final: Tensor | None = None
    _prompts: Tensor | None = None
    _old: Tensor | None = None
    _old_prompts: Tensor | None = None

    def note(self, target: Tensor, move: Tensor, prompts: Tensor | None, memory: object) -> None:
        self._latest, self._prompts = (target, move), prompts
        if self._old is None and isinstance(memory, MemoryBank) and len(memory):
            self._old, self._old_prompts = memory.newest(ROWS)

    def finish(self, final: Tensor) -> None:
        self._final = final

    @property
    def steps_guided(self) -> int:
        return len(self.steps)

    @property
    def mean_relative_move(self) -> float:
        """Mean over guided steps and samples; 0 if none was guided."""
        return sum(s.relative_move for s in self.steps) / len(self.steps) if self.steps else 0.0

    def _scores(self, x: Tensor | None) -> dict[str, float]:
        if x is None or self._latest is None:
            return {}
        rows, t = natural_rows(x, unit=True), self._prompts
        first = natural_rows(self._latest[0], unit=True)
        if self._old is not None and self._old.shape[1] == rows.shape[1]:
            old = natural_rows(self._old, unit=True).to(rows)
            rows, first = torch.cat([rows, old]), torch.cat([first, old])
            t = None if t is None or self._old_prompts is None else torch.cat([t, self._old_prompts.to(t)])
        kernel = GaussianKernel(median_bandwidth(first))
        t = torch.ones(len(rows), 1, device=rows.device) if t is None else t
        return {
            "vendi": float(F.vendi_score(rows, kernel)),
            "conditional_rke": float(F.conditional_rke_score(rows, t, kernel, GaussianKernel(PROMPT_BANDWIDTH))),
        }

    @property
    def before(self) -> dict[str, float]:
        return self._scores(None if self._latest is None else self._latest[0])

    @property
    def after(self) -> dict[str, float]:
        return self._scores(None if self._latest is None else self._latest[0] + self._latest[1])

    @property
    def final(self) -> dict[str, float]:
        return self._scores(self._final)

    def as_dict(self) -> dict:
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

    def __str__(self) -> str:
        if not self.steps:
            return f"no step of {self.total_steps} was guided (scale 0, or outside the interval); {self.seconds:.3f} s"
        before, after = self.before, self.after
        return (
            f"guided {self.steps_guided} of {self.total_steps} steps, mean move {self.mean_relative_move:.2%} of the norm; "
            f"predictions at the last guided step: Vendi {before['vendi']:.2f} -> {after['vendi']:.2f}, "
            f"conditional RKE {before['conditional_rke']:.2f} -> {after['conditional_rke']:.2f}; {self.seconds:.3f} s"
        )
