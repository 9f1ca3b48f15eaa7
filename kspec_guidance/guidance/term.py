"""Term: one objective with its strength, its interval, its space and the parts that make a move of its gradient."""

import math
from dataclasses import dataclass, field

from torch import Tensor

from kspec_guidance.guidance.spaces import Activations, FeatureSpace, make_space
from kspec_guidance.guidance.transforms import PARTS, MoveState
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Objective, natural_rows, pull_back

__all__ = ["DEFAULT_CHAIN", "Term"]

# each part measured alone in docs/arena.md: what does most is to leave out the part along the score
DEFAULT_CHAIN = ("tangent", "off_score", "bound", "fade")


@dataclass(eq=False)
class Term:
    """One objective with its strength, its interval and the parts that turn its gradient into a move.

    Args:
        objective: what is to grow.
        scale: size of a move relative to the norm of what is moved, at least 0.
        space: where samples are compared: ``x0`` (the clean prediction), ``latents`` (the noisy sample, as the papers do),
            ``pooled``, ``pixels``, ``activations``, or a
            :class:`~kspec_guidance.guidance.spaces.FeatureSpace` with its settings.
            ``latents`` moves the noisy sample after the step, the others the clean prediction, through the model output.
        start, stop: the guided interval as fractions of the run, ``0 <= start <= stop <= 1``.
        every: guide every so many steps of the interval.
        sigma_interval: guide only while noise-to-signal lies in ``(low, high)``, as well.
        chain: names of :mod:`kspec_guidance.guidance.transforms` parts, in order.
        memory: what was generated before.
    """

    objective: Objective
    scale: float
    space: FeatureSpace | str = "x0"
    start: float = 0.0
    stop: float = 1.0
    every: int = 1
    sigma_interval: tuple[float, float] | None = None
    chain: tuple[str, ...] = DEFAULT_CHAIN
    memory: Memory | None = None
    feature_space: FeatureSpace = field(init=False)

    def __post_init__(self) -> None:
        if not (isinstance(self.scale, int | float) and math.isfinite(self.scale) and self.scale >= 0):
            raise ValueError(
                f"scale must be a finite number of at least 0, got {self.scale!r}; to draw images toward something use "
                "MMDGuidance, since a negative scale would have no limit"
            )
        self.space = self.feature_space = make_space(self.space)
        if not 0 <= self.start <= self.stop <= 1:
            raise ValueError(f"need 0 <= start <= stop <= 1 as fractions of the run, got {self.start} and {self.stop}")
        if not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every must be a whole number of steps, at least 1, got {self.every!r}")
        if self.sigma_interval is not None and not 0 <= self.sigma_interval[0] <= self.sigma_interval[1]:
            raise ValueError(f"sigma_interval must be (low, high) with 0 <= low <= high, got {self.sigma_interval}")
        unknown = [name for name in self.chain if name not in PARTS]
        if unknown:
            raise ValueError(f"unknown parts {unknown} in chain; known are {', '.join(PARTS)}")
        if isinstance(self.space, Activations) and self.sigma_interval is not None:
            raise ValueError(
                "space='activations' compares step with step, so the guided steps must be known beforehand; give start= "
                "and stop= instead of sigma_interval="
            )
        if self.memory is None:
            self.memory = self.objective.make_memory()

    def due(self, step: int, total: int, noise_to_signal: float) -> bool:
        """Whether this step of the run is guided."""
        if self.scale == 0 or not self.start <= step / total < self.stop:
            return False
        if self.sigma_interval is not None and not self.sigma_interval[0] <= noise_to_signal <= self.sigma_interval[1]:
            return False
        return (step - math.ceil(self.start * total - 1e-9)) % self.every == 0

    def due_in(self, total: int) -> int:
        """How many steps of a run are guided, where no noise level is asked for."""
        return sum(self.due(step, total, 0.0) for step in range(total))

    def gradient(
        self, rows: Tensor, t: Tensor | None, jitter: Tensor | None = None, memory: Memory | None = None
    ) -> Tensor:
        """Ascent direction in feature rows ``[n, ...]``, before any scaling."""
        natural = natural_rows(rows, self.objective.unit)
        if jitter is not None:
            jitter = jitter.to(natural) * natural.norm(dim=1, keepdim=True)
        g = self.objective.gradient(natural, t, self.memory if memory is None else memory, jitter)
        return pull_back(rows, g, self.objective.unit)

    def move(self, x: Tensor, g: Tensor, score: Tensor, fraction: float, t: Tensor | None = None) -> Tensor:
        """The move of samples ``x`` of prompts ``t`` that the chain makes of an ascent direction ``g`` in them."""
        mass = self.objective.mass(len(x), t, self.memory)
        state = MoveState(x, score, fraction, (self.start, self.stop), float(self.scale), mass)
        move = g
        for name in self.chain:
            move = PARTS[name](move, state)
        return move
