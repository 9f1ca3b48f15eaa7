"""Run: applies a guide to the steps of a pipeline; :meth:`Run.step` is one guided step."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial, reduce
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from kspec_guidance.guidance.apart import missing_distance
from kspec_guidance.guidance.calibration import find_calibration, guidance_scale_of
from kspec_guidance.guidance.recall import Recall
from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.guidance.spaces.base import Pullback
from kspec_guidance.guidance.spaces.blocks import Block
from kspec_guidance.guidance.term import FEW_NUMBERS, VARIETY_AT_SCALE_1, Term
from kspec_guidance.guidance.transforms import TransformState, fading, norms, transformed, without_unit
from kspec_guidance.loop.blocks import Tokens, TransformerBlock
from kspec_guidance.loop.classifier_free import ClassifierFree, UnknownGuidanceError, classifier_free
from kspec_guidance.loop.context import ComingStep, StepContext
from kspec_guidance.loop.prediction import Prediction, apply_move
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Gradient, Objective
from kspec_guidance.utils.devices import transfer
from kspec_guidance.utils.precision import full_precision
from kspec_guidance.utils.timing import Stopwatch
from kspec_guidance.utils.transfer import read

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
    interval: tuple[float, float]
    pairs: Any = None
    prepared: bool = False
    recall: Recall | None = None  # if memory rows repel by what noisy samples are nearest to
    memories: dict[int, Memory] | None = None  # the part of the memory for each guided step, likewise
    kept: list[Tensor] = field(default_factory=list)  # features of each guided step, if steps are not comparable
    varieties: Tensor | None = None  # [n, 1], relative to that of the term, if a target chooses them
    compared: Tensor | None = None  # samples of the latest step before their move, if the memory stores those
    as_they_are: bool = False  # whether predictions of few numbers are compared as they are, not at norm 1

    @cached_property
    def transforms(self) -> tuple[str, ...]:
        """The term's transforms, less one that has nothing to remove: gradients in rows of norm 1 are tangent."""
        names = self.term.transforms
        tangent = self.term.space.direct and self.term.objective.normalize
        return names[1:] if tangent and names[:1] == ("tangent",) else names

    def memory_of_step(self, step: int, width: int, encoder: str | None) -> Memory:
        """The part of a memory of features ``[n, steps, width]`` that belongs to a guided step."""
        if self.memories is None:
            memory, count = self.term.memory, len(self.steps)
            steps = memory.shape[0] if len(memory) and memory.shape is not None and memory.shape[1:] == (width,) else count
            if steps != count and str(memory.space).startswith(self.term.space.name):
                raise ValueError(
                    f"memory holds features of {steps} guided steps, and this call has {count}: space="
                    f"{self.term.space.name!r} compares features of the same step; make calls of as many steps, or use a "
                    "separate memory for each"
                )
            memory.bind((count, width), self.term.space.label, encoder)
            self.memories = dict(zip(sorted(self.steps), memory.parts(count), strict=True))
        return self.memories[step]


def jitter(n: int, d: int, seed: int) -> Tensor:
    """Random rows ``[n, d]`` of norm 0.01 that separate exact duplicates; determined by the seed, on any device."""
    noise = torch.randn(n, d, generator=torch.Generator().manual_seed(seed % 2**63), device="cpu")
    return noise / noise.norm(dim=1, keepdim=True) * 1e-2


def ascent_direction(
    objective: Objective,
    rows: Tensor,
    prompts: Tensor | None,
    memory: Memory | None,
    pairs: Any = None,
    *,
    sizes: Tensor | None = None,
    recalled: Callable[[Tensor, Tensor | None, Tensor | None], Gradient] | None = None,
    seed: int | None = None,
) -> tuple[Tensor, Gradient]:
    """Ascent direction ``[n, d]`` at feature rows ``[n, d]``, before any scaling, and the gradient of the objective.

    Args:
        objective: the objective to ascend.
        rows: features in float32 or float64, not normalised.
        prompts: unit-norm prompt features ``[n, p]``.
        memory: memory of earlier samples.
        pairs: see :meth:`Objective.pairs`.
        sizes: norms of the rows ``[n, 1]``, if they are known.
        recalled: a gradient to take in place of the objective's, see
            :meth:`~kspec_guidance.guidance.recall.Recall.gradient`.
        seed: seed of noise that separates coincident rows first; by default they are not separated.
    """
    with full_precision(rows.device):
        size = norms(rows) if sizes is None else sizes
        size = size + (size == 0)  # rows of zeros stay zeros
        u = rows / size if objective.normalize else rows
        noise = None
        if seed is not None:
            noise = transfer(jitter(len(u), u.shape[1], seed), u)
            noise = noise if objective.normalize else noise * size
        if recalled is None:
            found = objective.gradient(u, prompts, memory, pairs=pairs, jitter=noise)
        else:
            found = recalled(u, prompts, noise)
        g = found.rows
        if objective.normalize:  # through x / |x|
            g = without_unit(g, u).div_(size)
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
        self._latest: tuple[Tensor, Tensor]  # norms [n, 1] of the latest moved samples, and of their moves
        self._states: list[TermState] = []
        self._of_predictions: list[TermState] = []  # by what they move, and when
        self._before_step: list[TermState] = []
        self._after_step: list[TermState] = []
        self._inside: list[TermState] = []  # moved in the denoiser's calls
        self._ahead: list[TermState] = []  # those of a pass that begins with a call of the denoiser, before its first step
        self._first: ComingStep | None = None  # the first step of that pass
        self._coming: ComingStep | None = None  # the latest step
        self._moves_inside: list[tuple[TermState, Tensor]] = []  # of this step, relative to the moved states [n]
        self._spans_inside: list[tuple[Any, Any]] = []  # time that they took
        self._blocks: dict[int, str] = {}  # names of the blocks, by term
        self._need_score = False  # whether a transform uses the direction of the score
        self._unchecked: list[tuple[str, int, Tensor]] = []  # what, step, and what must be finite or true
        self._rounded: list[Tensor] = []  # sizes of the moves of a step in half precision, realised and intended
        self.calibration = 1.0  # factor of scales in the unit "spread"
        self._cfg: ClassifierFree | None = None  # classifier-free guidance of this step, if a term needs it
        self._needs_cfg = any(_needs_cfg(term) for term in guide.terms)
        self.needs_denoiser_call = self._needs_cfg or any(term.space.needs_denoiser_call for term in guide.terms)

    def blocks(self, denoiser: nn.Module) -> list[TransformerBlock]:
        """The blocks whose hidden states terms move."""
        found = {id(term): term.space.block_of(denoiser) for term in self.guide.terms if isinstance(term.space, Block)}
        self._blocks |= {term: block.name for term, block in found.items()}
        return list({block.name: block for block in found.values()}.values())

    def inside(self, block: TransformerBlock, tokens: Tokens, coming: ComingStep) -> tuple[Tensor, Tensor | None] | None:
        """Tokens of a block with the moves of the terms that are active at this step; None if there are none."""
        if coming.context is None and coming is not self._first:
            self._first, self._ahead = coming, self._states_of(coming, inside=True)
            self.calibration = self._calibration(coming)
        if coming is not self._coming:  # what an aborted call has left goes
            self._coming, self._moves_inside, self._spans_inside = coming, [], []
        states = self._ahead if coming.context is None else self._inside
        changed = None
        for state in states:
            if coming.step in state.steps and self._blocks[id(state.term)] == block.name:
                changed = self._moved_tokens(state, tokens, coming)
                tokens = replace(tokens, image=changed[0], text=changed[1])
        return changed

    def _moved_tokens(self, state: TermState, tokens: Tokens, coming: ComingStep) -> tuple[Tensor, Tensor | None]:
        """Image and text tokens of a block, moved by one term."""
        space = state.term.space
        assert isinstance(space, Block)
        with torch.no_grad():
            now = Stopwatch(tokens.image.device).now
            began = now()
            rows = space.means(tokens, coming.rows)
            sizes = norms(rows)
            ascend, _ = self._ascent(state, rows, sizes, coming)
            direction, gradient = ascend(seed=self._seed(coming.step))  # coincident rows part without asking for them
            move, size = self._transformed(state, direction, gradient, coming, rows, sizes)
            self._moves_inside.append((state, (size / sizes.clamp_min(1e-12))[:, 0]))
            moved = space.moved(tokens, coming.rows, move)
            self._spans_inside.append((began, now()))
        return moved

    def _report_inside(self, prediction: Prediction, context: StepContext) -> None:
        """Report the moves inside the denoiser's call of this step.

        Raises:
            ValueError: if that call, or the block in it, was not reached.
        """
        moves, self._moves_inside = self._moves_inside, []
        spans, self._spans_inside = self._spans_inside, []
        context.time.spans += spans
        for state in self._inside:
            found = [move for other, move in moves if other is state]
            if context.step in state.steps and not found:
                raise ValueError(
                    f"space={state.term.space.name!r} moves hidden states in the denoiser's call, and at step "
                    f"{context.step + 1} of {context.total} no such call was seen; use `with guide.attach(pipe)` on a "
                    "pipeline, or another space"
                )
            for relative in found:
                self.report.moves.append((context.step, relative, prediction.noise_to_signal))
                self._expect_finite("move", relative, context.step)

    def _states_of(self, step: StepContext | ComingStep, inside: bool, numbers: int | None = None) -> list[TermState]:
        """States of the terms that move hidden states, or of the others, for a pass that begins.

        Args:
            step: the first step of the pass.
            inside: which of them.
            numbers: of each sample, if they are moved.
        """
        states = []
        for given in self.guide.terms:
            if given.space.inside is not inside:
                continue
            term = given if numbers is None else given.for_numbers(numbers)
            state = TermState(term, term.guided_steps(step.total), term.interval(step.total))
            state.as_they_are = term.objective is not given.objective
            states.append(state)
        return states

    def _seed(self, step: int) -> int:
        return self.guide.seed * 1_000_003 + step

    def begin(self, context: StepContext, sample: Any) -> None:
        """Begin a pass through the timesteps: bind memories to the samples' shape, and create a new report."""
        packed, call = context.layout.pack(sample), context.call
        conditional = any(term.objective.conditional for term in self.guide.terms)
        if conditional and context.prompts is None and call.prompted and not call.warned:
            call.warn(
                f"the prompts of this call of {type(call.pipe).__name__} cannot be read, so all its samples count as "
                "samples of one prompt. Callbacks see the prompts of some pipelines only; use `with guide.attach(pipe)`"
            )
        prompts = call.different_prompts
        for term in self.guide.terms:
            term.check_order(tuple(packed.shape[1:]))
            advice = None if prompts is None or not term.scale else term.objective.advice(prompts, term.memory)
            if advice is not None:
                call.warn(advice)
        self.report = GuidanceReport.of(context, self.guide.terms)
        self.finished, self._unchecked, self._rounded = [], [], []
        self.calibration = self._calibration(context)
        if self._ahead and self._first is not None and self._first.total != context.total:
            raise ValueError(
                f"{type(call.pipe).__name__} planned {self._first.total} steps and takes {context.total}, so the guided "
                f"steps of space={self._ahead[0].term.space.name!r} cannot be told; choose space='x0'"
            )
        self._inside, self._ahead = self._ahead or self._states_of(context, inside=True), []
        numbers = packed[0].numel()
        moving = self._states_of(context, inside=False, numbers=numbers)
        if numbers <= FEW_NUMBERS and any(_fixes_two_directions(state.term) for state in moving):
            call.warn(
                f"samples of {numbers} numbers: by the given transforms moves leave out their parts along the prediction "
                "and along the score, so hardly any direction is left. For toy data of so few dimensions leave transforms= "
                "out, or give ('bound', 'fade')"
            )
        self._states = [*moving, *self._inside]
        for state in self._states:
            if state.term.target is not None and state.term.scale:
                state.varieties = self._varieties(state.term, context, packed)
        self._need_score = any("off_score" in state.term.transforms for state in moving)
        noisy = [state for state in moving if state.term.space.noisy]
        self._of_predictions = [state for state in moving if not state.term.space.noisy]
        self._before_step = [state for state in noisy if state.term.space.before]
        self._after_step = [state for state in noisy if not state.term.space.before]
        for term in self.guide.terms:
            shape = term.space.shape(packed)
            if shape is not None:
                term.memory.bind(shape, term.space.label, call.encoder)

    def _varieties(self, term: Term, context: StepContext, packed: Tensor) -> Tensor:
        """The variety that the target of a term has chosen for each sample ``[n, 1]``, relative to that of the term."""
        assert term.target is not None
        found = term.target.varieties(context, len(packed))
        self.report.strengths = [("variety", value) for value in dict.fromkeys(found)]
        return torch.tensor(found, device=packed.device)[:, None] / (VARIETY_AT_SCALE_1 * term.scale)

    def _calibration(self, context: StepContext | ComingStep) -> float:
        """The factor of scales in the unit "spread" for this pipeline and call."""
        if self.guide.calibration is not None:
            return self.guide.calibration
        pipe = context.call.pipe
        if pipe is None or not any(term.unit == "spread" and term.scale for term in self.guide.terms):
            return 1.0
        found = find_calibration(pipe, context.total, guidance_scale_of(pipe))
        return 1.0 if found is None else found.factor

    def output(self, model_output: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The model output with less classifier-free guidance, if a term lowers or eases it at this step; else None."""
        self._cfg = None
        if not self._needs_cfg:
            return None
        fraction, share = context.step / context.total, self.report.cfg_share
        within = [
            state
            for state in self._states
            if state.steps and state.interval[0] <= fraction < state.interval[1] - 1e-9 and _needs_cfg(state.term)
        ]
        within = [state for state in within if _at_level(state.term, prediction)]
        if not within and share is None:
            return None
        cannot = _cannot_change("cfg_share=" if share is not None else _cfg_setting(within[0].term), context)
        try:
            cfg = self._cfg = classifier_free(model_output, prediction, context)
        except UnknownGuidanceError as error:
            raise ValueError(f"{cannot}: {error}") from None
        if cfg is None:
            return None
        self._unchecked.append((cannot, context.step, cfg.fits))
        usual = cfg.weight if share is None else 1 + share * (cfg.weight - 1)
        easing = [(state.term.ease_cfg, fading(fraction, state.interval)) for state in within]
        weights = [usual - (usual - low).clamp_min(0) * f for low, f in easing if low is not None]
        if not weights and share is None:
            return None
        weight = reduce(torch.minimum, weights, usual)
        self.report.eased.append((context.step, cfg.weight, weight))
        return cfg.at_weight(model_output, weight)

    def step(self, prediction: Prediction, context: StepContext) -> Any | None:
        """The move of x0: the sum over terms of transform(gradient), in the layout of the loop."""
        layout = context.layout
        if self._inside:
            self._report_inside(prediction, context)
        x0 = prediction.x0 if layout.trivial else layout.pack(prediction.x0)
        active = self._active(self._of_predictions, prediction, context)
        if not active:
            self._expect_finite("prediction", torch.linalg.vector_norm(x0.flatten(1), dim=1), context.step)
            if not self._active(self._before_step + self._after_step, prediction, context):
                self._read(context)
            return None
        move = self._move(x0, active, prediction, context, prediction.share)
        return move if layout.trivial else layout.unpack(move)

    def realised(self, move: Any, context: StepContext) -> None:
        """Put the move that samples have received in place of the intended one, which was reported last."""
        target, intended = self._latest
        size, (step, _, noise) = norms(context.layout.pack(move).flatten(1)), self.report.moves[-1]
        self.report.moves[-1] = step, (size / target.clamp_min(1e-12))[:, 0], noise
        self._rounded.append(torch.stack([size.sum(), intended.sum()]))

    def before_step(self, sample: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The noisy sample, moved by the terms that move it before the step; None if there are none."""
        return self._moved(self._before_step, sample, prediction, context) if self._before_step else None

    def after_step(self, latents: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """The latents after the step, moved by the terms that move noisy samples then; None if there are none."""
        return self._moved(self._after_step, latents, prediction, context) if self._after_step else None

    def _moved(self, states: list[TermState], sample: Any, prediction: Prediction, context: StepContext) -> Any | None:
        """A noisy sample, moved by those of these terms that are active at this step; None if there are none."""
        x = context.layout.pack(sample).float()
        for state in states:
            if state.term.space.as_compared:
                state.compared = x.clone()
        active = self._active(states, prediction, context)
        if not active:
            return None
        move = context.layout.unpack(self._move(x, active, prediction, context))
        if isinstance(sample, Tensor):
            moved = sample + move.to(sample.dtype)
        else:
            moved = type(sample)(part + m.to(part.dtype) for part, m in zip(sample, move, strict=True))
        return apply_move(sample, moved, move, self, context)

    @staticmethod
    def _active(states: list[TermState], prediction: Prediction, context: StepContext) -> list[TermState]:
        """Those of the terms that are active at this step."""
        active = []
        for state in states:
            if context.step in state.steps and _at_level(state.term, prediction):
                active.append(state)
        return active

    def _move(
        self, x: Tensor, active: list[TermState], prediction: Prediction, context: StepContext, share: float = 1.0
    ) -> Tensor:
        """A share of the move of packed samples ``[n, ...]`` by all terms that are active at this step."""
        target, score, prompt = x.flatten(1), None, None
        if self._need_score:
            score = prediction.noise_direction
            score = (score if context.layout.trivial else context.layout.pack(score)).flatten(1)
        if self._cfg is not None:
            prompt = prediction.slope * self._cfg.direction
            prompt = (prompt if context.layout.trivial else context.layout.pack(prompt)).flatten(1)
        sizes = norms(target)
        self._expect_finite("prediction", sizes, context.step)
        ascents = [self._ascent(state, x, sizes, context, prediction) for state in active]
        found = [ascend() for ascend, _ in ascents]

        def total() -> tuple[Tensor, Tensor]:
            """The move ``[n, d]`` and its norms ``[n, 1]``."""
            parts = []
            for state, (_, pullback), (g, gradient) in zip(active, ascents, found, strict=True):
                move = g if pullback is None else pullback(g).flatten(1).to(x.dtype)
                parts.append(self._transformed(state, move, gradient, context, target, sizes, score, prompt))
            move, size = parts[0]
            if len(parts) > 1 or context.mask is not None:
                move = reduce(torch.add, [part for part, _ in parts])
                if context.mask is not None:
                    move = (move.view(x.shape) * context.mask).flatten(1)
                size = norms(move)
            if share != 1:
                move, size = move * share, size * share
            self._expect_finite("move", size, context.step)
            return move, size

        move, size = total()
        coincident = self._read(context, [gradient for _, gradient in found])
        if any(coincident):  # rare: from their start on, samples of different seeds differ
            found = [
                ascend(seed=self._seed(context.step)) if again else result
                for (ascend, _), result, again in zip(ascents, found, coincident, strict=True)
            ]
            move, size = total()
        self.report.moves.append((context.step, (size / sizes.clamp_min(1e-12))[:, 0], prediction.noise_to_signal))
        self._latest = sizes, size
        return move.view(x.shape)

    def _transformed(
        self,
        state: TermState,
        move: Tensor,
        gradient: Gradient,
        step: StepContext | ComingStep,
        target: Tensor,
        sizes: Tensor,
        score: Tensor | None = None,
        prompt: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A gradient ``[n, d]`` at rows ``target`` of norms ``sizes`` after the transforms of a term, and its norms."""
        strength, count = self._strength(state, gradient, sizes), gradient.effective_count
        fraction = step.step / step.total
        values = TransformState(target, score, fraction, state.interval, strength, count, sizes, prompt)
        moved = transformed(move, state.transforms, values)
        if state.term.apart is None:
            return moved
        missing = missing_distance(target, sizes, state.pairs, state.term.apart, state.term.objective.normalize)
        return moved[0] * missing, moved[1] * missing

    def _strength(self, state: TermState, gradient: Gradient, sizes: Tensor) -> float | Tensor:
        """The scale of a term, relative to the norms ``[n, 1]`` of the moved samples."""
        term = state.term
        if term.unit == "norm":
            return float(term.scale)
        assert gradient.spread is not None
        strength = float(term.scale) * self.calibration * gradient.spread.square()
        if state.as_they_are:  # the distance is then relative to their norms
            strength = strength / sizes.square().mean().clamp_min(torch.finfo(sizes.dtype).tiny)
        return strength if state.varieties is None else strength * state.varieties

    def _ascent(
        self,
        state: TermState,
        x: Tensor,
        sizes: Tensor,
        context: StepContext | ComingStep,
        prediction: Prediction | None = None,
    ) -> tuple[Callable[..., tuple[Tensor, Gradient]], Pullback | None]:
        """:func:`ascent_direction` for one term at samples of these norms, and the pullback of its space."""
        term, memory, space = state.term, state.term.memory, state.term.space
        if space.direct:
            rows, pullback, known = x.flatten(1), None, sizes
        else:
            assert isinstance(context, StepContext)
            (rows, pullback), known = space.features(x, context.call, context.denoiser_call), None
        if space.step_by_step:
            memory = state.memory_of_step(context.step, rows.shape[1], context.call.encoder)
            state.kept.append(rows)
        elif not state.prepared:
            if space.shape(x) is None:
                memory.bind((rows.shape[1],), space.label, context.call.encoder)
            with full_precision(rows.device):
                state.pairs, state.prepared = term.objective.pairs(rows, context.prompts, memory), True
            if term.recall == "nearest":
                state.recall = Recall.of(term.objective, state.pairs)
        recalled = None
        if state.recall is not None:
            assert isinstance(context, StepContext)
            assert prediction is not None
            sample = prediction.sample if context.layout.trivial else context.layout.pack(prediction.sample)
            recalled = partial(state.recall.gradient, noisy=sample.flatten(1).to(rows), ratio=prediction.noise_to_signal)
        ascend = partial(
            ascent_direction, term.objective, rows, context.prompts, memory, state.pairs, sizes=known, recalled=recalled
        )
        return ascend, pullback

    # -- reading values of the device --------------------------------------------------------------------------------

    def _expect_finite(self, what: str, norms: Tensor, step: int) -> None:
        """Note that these norms must be finite; checked when values of the device are read next."""
        self._unchecked.append((what, step, norms))

    def _read(self, context: StepContext, gradients: Sequence[Gradient] = ()) -> list[bool]:
        """For each gradient, whether rows coincide: the one time at which a guided step waits for the device.

        The noted checks are read with it; if an objective has waited already, they are left for the next step.

        Raises:
            ValueError: if a prediction or a move is not finite.
        """
        coincident, flags, waited = [False] * len(gradients), {}, False
        for k, g in enumerate(gradients):
            if not g.finite:
                raise _not_finite("prediction", context.step, context.total)
            if g.coincident is not None:
                if g.coincident.device == g.rows.device:
                    flags[k] = g.coincident
                else:  # on the host already
                    coincident[k], waited = bool(g.coincident.any()), True
        if waited and not flags:
            return coincident
        checks, self._unchecked = self._unchecked, []
        asked = [check[2] for check in checks] + list(flags.values())
        values = [value.flatten().tolist() for value in read(*asked)]
        for (what, step, given), found in zip(checks, values, strict=False):
            valid = all(found if given.dtype == torch.bool else map(math.isfinite, found))
            if not valid and what in ("prediction", "move", "result"):
                raise _not_finite(what, step, context.total)
            if not valid:
                raise ValueError(
                    f"{what}: it does not combine its predictions as uncond + weight (cond - uncond), as seen at step "
                    f"{step + 1} of {context.total}"
                )
        for k, value in zip(flags, values[len(checks) :], strict=True):
            coincident[k] = any(value)
        return coincident

    def finish(self, context: StepContext) -> None:
        """List the finished samples, and add them once to each memory."""
        final = context.layout.pack(context.final)
        size = torch.linalg.vector_norm(final.flatten(1), dim=1, dtype=torch.promote_types(final.dtype, torch.float32))
        self._expect_finite("result", size, context.step - 1)
        self._read(context)
        *overflows, rounded = read(*context.overflows, torch.stack(self._rounded) if self._rounded else torch.zeros(1, 2))
        size, intended = rounded.sum(0).tolist()
        if any(bool(overflow) for overflow in overflows):
            warnings.warn(
                "moves that would have overflowed float16 were left out, at noise levels near 0; use bfloat16 or float32, "
                "or a lower stop=",
                stacklevel=2,
            )
        elif size < 0.5 * intended:
            context.call.warn(
                f"{'nothing moved' if size == 0 else f'samples moved by {size / intended:.0%} of what was intended'}: "
                "moves are below the rounding of half precision, or the noise level is 0; use a stronger guide, or float32"
            )
        self.report.finish(final, [state.term for state in self._states])
        for state in self._states:
            target = state.term.target
            if target is not None and state.varieties is not None:
                results = target.observe(final, [relative for _, relative, _ in self.report.moves], context)
                self.report.targets = [(target, result) for result in results]
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
            with full_precision(final.device):
                for memory, features, prompts in self.finished:
                    memory.add(features, prompts)


def _needs_cfg(term: Term) -> bool:
    return term.ease_cfg is not None or term.cfg_share not in (None, 1.0) or "keep_prompt" in term.transforms


def _fixes_two_directions(term: Term) -> bool:
    """Whether moves of a term change neither a prediction's norm nor, to first order, its likelihood."""
    return (
        bool(term.scale) and "off_score" in term.transforms and ("tangent" in term.transforms or term.objective.normalize)
    )


def _at_level(term: Term, prediction: Prediction) -> bool:
    """Whether the noise level is in the term's ``sigma_interval``, if it has one."""
    interval = term.sigma_interval
    return interval is None or interval[0] <= float(prediction.noise_to_signal) <= interval[1]


def _cfg_setting(term: Term) -> str:
    """The setting that needs classifier-free guidance in the guided interval."""
    return "the transform keep_prompt" if term.ease_cfg is None else "ease_cfg="


def _cannot_change(name: str, context: StepContext) -> str:
    """The beginning of an error about classifier-free guidance, and the advice."""
    pipe = context.call.pipe
    where = "a bare scheduler" if pipe is None else f"this call of {type(pipe).__name__}"
    return f"{name} cannot be used with {where}; leave it out"


def _not_finite(what: str, step: int, total: int) -> ValueError:
    return ValueError(
        f"NaN or infinite values in the {what} at step {step + 1} of {total}; the memory was not changed. Lower "
        "guidance_scale or scale, or use float32 if the model overflows in half precision"
    )
