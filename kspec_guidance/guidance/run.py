"""Run: applies a guide to the steps of a pipeline; :meth:`Run.step` is one guided step."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.guidance.term import Term
from kspec_guidance.guidance.transforms import TRANSFORMS, TransformState, row_dots
from kspec_guidance.loop.context import StepContext
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.memory import Memory, MemoryBank
from kspec_guidance.objectives import Gradient, Objective

if TYPE_CHECKING:
    from kspec_guidance.guidance.guide import KernelGuidance

__all__ = ["Finished", "Run", "ascent_direction"]


class Finished(NamedTuple):
    """Finished samples: their memory, features ``[n, ...]`` and prompt features ``[n, p]``."""

    memory: Memory
    features: Tensor
    prompts: Tensor | None


@dataclass(eq=False)
class TermState:
    """State of a term in one pass through the timesteps: its guided steps, and the pairs that are computed once."""

    term: Term
    steps: frozenset[int]
    pairs: Any = None
    prepared: bool = False
    kept: list[Tensor] = field(default_factory=list)  # features of each guided step, if steps are not comparable
    compared: Tensor | None = None  # samples of the latest step before their move, if the memory stores those


def jitter(n: int, d: int, seed: int) -> Tensor:
    """Random rows ``[n, d]`` of norm 0.01 that separate exact duplicates; determined by the seed."""
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed % 2**63))
    return noise / noise.norm(dim=1, keepdim=True) * 1e-2


def ascent_direction(
    objective: Objective, rows: Tensor, prompts: Tensor | None, memory: Memory | None, seed: int, pairs: Any = None
) -> tuple[Tensor, Gradient]:
    """Ascent direction ``[n, d]`` at feature rows ``[n, d]``, before any scaling, and the gradient of the objective.

    Args:
        objective: the objective to ascend.
        rows: features in float32 or float64, not normalised.
        prompts: unit-norm prompt features ``[n, p]``.
        memory: memory of earlier samples.
        seed: seed of the noise that separates coincident rows.
        pairs: see :meth:`Objective.pairs`.
    """
    size = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    size = torch.where(size > 0, size, 1.0)
    u = rows / size if objective.normalize else rows
    found = objective.gradient(u, prompts, memory, pairs=pairs)
    if found.coincident is not None and bool(found.coincident.any()):
        noise = jitter(len(u), u.shape[1], seed).to(u)
        found = objective.gradient(u, prompts, memory, pairs=pairs, jitter=noise if objective.normalize else noise * size)
    g = found.rows
    if objective.normalize:  # through x / |x|
        g = torch.addcmul(g, u, row_dots(g, u), value=-1).div_(size)
    return g, found


class Run:
    """Applies a guide to the calls of one pipeline; a :class:`~kspec_guidance.loop.context.StepHandler`.

    Args:
        guide: the guide, with its terms, seed and memory.
    """

    def __init__(self, guide: "KernelGuidance"):
        self.guide = guide
        self.report = GuidanceReport()
        self.finished: list[Finished] = []  # of the last pass
        self.attachment: Any = None
        self._states: list[TermState] = []
        self.needs_denoiser_call = any(term.space.needs_denoiser_call for term in guide.terms)

    def begin(self, context: StepContext, sample: Any) -> None:
        """Begin a pass through the timesteps: bind memories to the samples' shape, and create a new report."""
        packed, encoder = context.layout.pack(sample), context.call.encoder
        self.report = GuidanceReport.of(context, self.guide.memory)
        self.finished = []
        self._states = [TermState(term, term.guided_steps(context.total)) for term in self.guide.terms]
        for term in self.guide.terms:
            shape = term.space.shape(packed)
            if shape is not None:
                term.memory.bind(shape, term.space.name, encoder)

    def step(self, prediction: Prediction, context: StepContext) -> Any | None:
        """The move of x0: the sum over terms of transform(gradient), in the layout of the loop."""
        layout = context.layout
        x0 = prediction.x0 if layout.trivial else layout.pack(prediction.x0)
        if not bool(torch.isfinite(torch.linalg.vector_norm(x0.flatten(1), dim=1)).all()):
            raise ValueError(
                f"NaN or infinite values in the prediction at step {context.step + 1} of {context.total}; the memory was "
                "not changed. Lower guidance_scale or scale, or use float32 if the model overflows in half precision"
            )
        move = self._move([s for s in self._states if not s.term.space.noisy], x0, prediction, context)
        return move if move is None or layout.trivial else layout.unpack(move)

    def before_step(self, sample: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The noisy sample, moved by the terms that move it before the step; None if there are none."""
        return self._moved(sample, prediction, context, before=True)

    def after_step(self, latents: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The latents after the step, moved by the terms that move noisy samples then; None if there are none."""
        return self._moved(latents, prediction, context, before=False)

    def _moved(self, sample: Any, prediction: Prediction, context: StepContext, before: bool) -> Any | None:
        """A noisy sample, moved by the terms that move it before or after the step; None if there are none."""
        states = [s for s in self._states if s.term.space.noisy and s.term.space.before is before]
        if not states:
            return None
        x = context.layout.pack(sample).float()
        for state in states:
            if state.term.space.as_compared:
                state.compared = x.clone()
        move = self._move(states, x, prediction, context)
        return None if move is None else sample + context.layout.unpack(move).to(sample.dtype)

    def _move(self, states: Sequence[TermState], x: Tensor, prediction: Prediction, context: StepContext) -> Tensor | None:
        """The move of packed samples ``[n, ...]`` by the terms that are active at this step; None if there are none."""
        target, score, total, noise_to_signal = x.flatten(1), None, None, prediction.noise_to_signal
        for state in states:
            term = state.term
            if context.step not in state.steps:
                continue
            if term.sigma_interval is not None and not term.sigma_interval[0] <= noise_to_signal <= term.sigma_interval[1]:
                continue
            if score is None and "off_score" in term.transforms:
                score = prediction.score
                score = (score if context.layout.trivial else context.layout.pack(score)).flatten(1)
            move, found = self._gradient(state, x, context)
            values = TransformState(
                target,
                score,
                context.step / context.total,
                (term.start, term.stop),
                float(term.scale),
                found.effective_count,
            )
            for name in term.transforms:
                move = TRANSFORMS[name](move, values)
            total = move if total is None else total + move
        if total is None:
            return None
        relative = torch.linalg.vector_norm(total, dim=1) / torch.linalg.vector_norm(target, dim=1).clamp_min(1e-12)
        self.report.moves.append((context.step, relative, noise_to_signal))
        self.report.latest = target, total
        return total.view(x.shape)

    def _gradient(self, state: TermState, x: Tensor, context: StepContext) -> tuple[Tensor, Gradient]:
        """Ascent direction of one term at the samples ``[n, d]``, pulled back through its space."""
        term, memory, space = state.term, state.term.memory, state.term.space
        rows, pullback = (x.flatten(1), None) if space.direct else space.features(x, context.call, context.denoiser_call)
        if space.step_by_step:
            memory = _memory_of_step(term, len(state.kept), (len(state.steps), rows.shape[1]), context.call.encoder)
            state.kept.append(rows)
        elif not state.prepared:
            if space.shape(x) is None:
                memory.bind((rows.shape[1],), space.name, context.call.encoder)
            state.pairs, state.prepared = term.objective.pairs(rows, context.prompts, memory), True
        seed = self.guide.seed * 1_000_003 + context.step
        g, found = ascent_direction(term.objective, rows, context.prompts, memory, seed, state.pairs)
        return (g if pullback is None else pullback(g).flatten(1).to(x.dtype)), found

    def finish(self, context: StepContext) -> None:
        """List the finished samples, and add them once to each memory."""
        final = context.layout.pack(context.final)
        self.report.finished = final
        for state in self._states:
            term = state.term
            if any(done.memory is term.memory for done in self.finished):
                continue
            if term.space.step_by_step:  # one row of features per guided step, for complete runs only
                features = torch.stack(state.kept, dim=1) if state.kept and len(state.kept) == len(state.steps) else None
            else:
                features = term.space.final(final if state.compared is None else state.compared, context.call)
            if features is not None:
                self.finished.append(Finished(term.memory, features, context.prompts))
        if self.guide.remember:
            for memory, features, prompts in self.finished:
                memory.add(features, prompts)


def _memory_of_step(term: Term, k: int, shape: tuple[int, int], encoder: str | None) -> Memory:
    """The part of a memory of features ``[n, steps, d]`` that belongs to the ``k``-th guided step."""
    memory, part = term.memory, MemoryBank(term.space.name, encoder)
    memory.bind(shape, term.space.name, encoder)
    if isinstance(memory, MemoryBank) and len(memory) and k < shape[0]:
        part.add(memory.x.view(len(memory), *shape)[:, k], memory.prompts)
    return part
