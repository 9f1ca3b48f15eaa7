"""Run: one pass through a scheduler's timesteps, and what guidance does in it."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.guidance.report import GuidanceReport, StepRecord
from kspec_guidance.guidance.spaces import Activations, Scene
from kspec_guidance.guidance.term import Term
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.prediction import Prediction
from kspec_guidance.loop.scheduler_hook import ThreadOwner
from kspec_guidance.memory import Memory, MemoryBank

__all__ = ["Run", "jitter"]


def jitter(x: Tensor, step: int, seed: int) -> Tensor:
    """Rows ``[n, d]`` of norm 0.01 that part exact duplicates, the same at every call."""
    generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
    noise = torch.randn(len(x), x[0].numel(), generator=generator)
    return (noise / noise.norm(dim=1, keepdim=True) * 1e-2).to(x.device)


class Run:
    """One pass through a scheduler's timesteps.

    Args:
        scheduler, timestep, sample: of the first step.
        place: step and number of steps, where they are known.
        layout: of the samples.
        total: number of steps, where the pipeline says it.
        terms, seed, encoder: the guide's, and the name of what made the prompt features.
    """

    def __init__(
        self,
        scheduler: Any,
        timestep: Any,
        sample: Any,
        place: tuple[int, int] | None,
        layout: Layout,
        total: int | None,
        terms: list[Term],
        seed: int,
        encoder: str | None,
    ):
        self.shapes = _shapes(sample)
        self.terms, self.seed, self.encoder = terms, seed, encoder
        self.scheduler, self.timesteps = scheduler, scheduler.timesteps
        self.owner = ThreadOwner()
        if place is None:  # image-to-image starts inside the list, and a base model may leave its end to a refiner
            first = getattr(scheduler, "begin_index", None)
            if first is None:
                at = torch.as_tensor(timestep).flatten()[:1]
                where = (self.timesteps == at.to(self.timesteps)).nonzero()
                first = int(where[0]) if len(where) else 0
            left = len(self.timesteps) - int(first)
            place = 0, min(left, total) if total else left
        self.step, self.total = place
        self.layout = layout
        self.seconds = 0.0
        self.final: Any = None
        self.prompts: Tensor | None = None
        self.kept: dict[int, list[Tensor]] = {}  # activations of the guided steps, by term
        self.finished: list[tuple[Memory, Tensor, Tensor | None]] = []
        self.done = False
        packed = layout.pack(sample)
        for term in terms:
            shape = term.feature_space.shape(packed)
            if shape is not None and term.memory is not None:
                term.memory.bind(shape, term.feature_space.name, encoder)
        self.report = GuidanceReport(total_steps=self.total, scheduler=type(scheduler).__name__, layout=layout.kind)

    def continues(self, scheduler: Any, sample: Any) -> bool:
        same = scheduler is self.scheduler and scheduler.timesteps is self.timesteps and _shapes(sample) == self.shapes
        return same and not self.done and self.step < self.total

    def _gradient(self, term: Term, target: Tensor, t: Tensor | None, scene: Scene) -> Tensor:
        """The ascent direction in the samples: through the term's space."""
        rows, pull = term.feature_space.features(target, scene)
        memory = term.memory
        assert memory is not None
        if isinstance(term.space, Activations):
            kept = self.kept.setdefault(id(term), [])
            memory = _of_step(memory, len(kept), (term.due_in(self.total), rows.shape[1]), self.encoder)
            kept.append(rows)
        elif term.feature_space.shape(target) is None:
            memory.bind((rows.shape[1],), term.feature_space.name, self.encoder)
        g = term.gradient(rows, t, jitter(rows, self.step, self.seed), memory)
        return pull(g).view(target.shape).to(target.dtype)

    def move(self, terms: list[Term], target: Tensor, seen: Prediction, t: Tensor | None, scene: Scene) -> Tensor | None:
        if not terms:
            return None
        score, fraction = self.layout.pack(seen.score), self.step / self.total
        moves = [term.move(target, self._gradient(term, target, t, scene), score, fraction, t) for term in terms]
        move = torch.stack(moves).sum(0)
        relative = move.flatten(1).norm(dim=1) / target.flatten(1).norm(dim=1).clamp_min(1e-12)
        self.report.steps.append(StepRecord(self.step, float(relative.mean()), seen.noise_to_signal))
        self.report.note(target, move, t, terms[0].memory)
        return move

    def move_latents(self, terms: list[Term], result: Any, seen: Prediction, t: Tensor | None, scene: Scene) -> Any:
        if not terms:
            return result
        latents = result[0]
        move = self.move(terms, self.layout.pack(latents).float(), seen, t, scene)
        assert move is not None
        moved = latents + self.layout.unpack(move).to(latents.dtype)
        if isinstance(result, tuple):
            return (moved, *result[1:])
        result.prev_sample = moved
        return result

    def finish(self, scene: Scene, remember: bool = True) -> None:
        self.done = True
        with torch.no_grad():
            final, t = self.layout.pack(self.final), self.prompts
            self.report.finish(final)
            added: set[int] = set()
            for term in self.terms:
                if term.memory is None or id(term.memory) in added:
                    continue
                kept = self.kept.get(id(term), [])
                if isinstance(term.space, Activations):
                    whole = len(kept) and len(kept) == term.due_in(self.total)
                    features = torch.stack(kept, dim=1) if whole else None
                else:
                    features = term.feature_space.final(final, scene)
                if features is not None:
                    self.finished.append((term.memory, features, t))
                    added.add(id(term.memory))
            if remember:
                for memory, features, t in self.finished:
                    memory.add(features, t)


def _shapes(sample: Any) -> Any:
    return sample.shape if isinstance(sample, Tensor) else [s.shape for s in sample]


def _of_step(memory: Memory, k: int, shape: tuple[int, int], encoder: str | None) -> Memory:
    """The part of an activations memory ``[n, steps, c]`` that belongs to the ``k``-th guided step."""
    memory.bind(shape, Activations.name, encoder)
    if not isinstance(memory, MemoryBank) or not len(memory) or k >= shape[0]:
        return MemoryBank()
    part = MemoryBank(Activations.name, encoder)
    part.add(memory.x.view(len(memory), *shape)[:, k], memory.prompts)
    return part
