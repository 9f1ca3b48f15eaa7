"""GuidanceReport: how different the images of a guided run are, the size of its moves, and what to change."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import gram
from kspec_guidance.guidance.targets import SAME_PROMPT, PromptTarget, VarietyTarget
from kspec_guidance.guidance.term import Term, least_cfg_share
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel
from kspec_guidance.loop.context import StepContext
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import natural_rows
from kspec_guidance.statistics import jackknife_interval

__all__ = ["GuidanceReport", "StepRecord"]

INTERVAL_IMAGES = 4  # smallest number of a prompt's images that have an interval
# Mean sizes of a move relative to the prediction, from python benchmarks/moves.py: up to 0.03 hardly anything changes, from
# 0.4 on some digits are no longer valid, between 0.8 and 1.8 most digits and emoji break.
WORDS = ((0.03, "too weak to see"), (0.1, "weak"), (0.4, "moderate"), (0.8, "strong"), (math.inf, "off the scale"))
EARLIER_IMAGES, EARLIER_NUMBERS = 64, 1 << 24  # remembered samples that a single one is compared with, and their numbers
LISTED_TARGETS = 8  # prompts whose target is told in words
SATURATED = 0.95  # share of the images that look different, from which on the number can hardly rise


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


class PromptScore(NamedTuple):
    """RKE of one prompt's samples, and without each of them in turn ``[m]``."""

    value: float
    left_out: Tensor


class GuidanceReport:
    """Report of the last run of a guide; figures are computed when they are read.

    ``guided`` is the effective number of different images among the finished samples of one prompt:
    :func:`~kspec_guidance.functional.rke_score` of the samples scaled to norm 1, with a Gaussian kernel of fixed bandwidth
    0.5. Copies count as one image, and n unrelated images as n. If a batch has several prompts, it is the mean over those
    with at least two images, and images of different prompts are not compared. (Conditional RKE with a prompt kernel that
    is 1 for equal prompts and 0 for others is the harmonic mean of the same numbers, for equally many images per prompt.)

    A call of a single image has none to compare with; :attr:`with_earlier` counts it among the newest of its prompt in the
    guide's memory, where that holds samples as they are.

    Samples are compared as the denoising loop holds them, in most pipelines as latents: the figures tell how different the
    images are, and not how good.

    Attributes:
        total_steps: number of steps of the run.
        scheduler: class name of the scheduler.
        layout: layout of the samples, see :mod:`kspec_guidance.loop.layouts`.
    """

    def __init__(self, total_steps: int = 0, scheduler: str = "", layout: str = ""):
        self.total_steps, self.scheduler, self.layout = total_steps, scheduler, layout
        # recorded by the run; everything else is computed on access
        self.context: StepContext | None = None
        self.moves: list[tuple[int, Tensor, float | Tensor]] = []  # step, relative moves [n], noise-to-signal
        self.finished: Tensor | None = None
        self.earlier: Tensor | None = None  # [k, d], remembered samples of the prompt of a single finished one
        self.finished_plain: Tensor | None = None  # those of the same call without guidance, see KernelGuidance.compare
        self.strengths: list[tuple[str, float]] = []  # name and value of each term's strength, see Term
        self.targets: list[tuple[VarietyTarget, PromptTarget]] = []  # of each prompt, if there is a target
        self.eased: list[tuple[int, Tensor, Tensor]] = []  # step, weight of CFG, and the one in its place
        self.eases = False  # whether a term has ease_cfg=
        self.cfg_share: float | None = None  # what cfg_share= leaves of classifier-free guidance, if less than all
        self.moves_predictions = True  # whether all terms move the clean prediction
        self.moves_inside = False  # whether a term moves hidden states
        self.remembered = 0  # number of memory entries at the start of the run

    @classmethod
    def of(cls, context: StepContext, terms: Sequence[Term] = ()) -> "GuidanceReport":
        """Create the report of a pass that begins with these terms, whose memories are those at its start."""
        report = cls(context.total, type(context.scheduler).__name__, context.layout.kind)
        report.context, report.strengths = context, [term.strength for term in terms]
        report.eases = any(term.ease_cfg is not None for term in terms)
        report.cfg_share = least_cfg_share(terms)
        report.moves_predictions = not any(term.space.noisy or term.space.inside for term in terms)
        report.moves_inside = any(term.space.inside for term in terms)
        report.remembered = max((len(term.memory) for term in terms), default=0)
        return report

    def finish(self, samples: Tensor, terms: Sequence[Term]) -> None:
        """Keep the finished samples ``[n, ...]``, and of a single one the newest of its prompt in the terms' memories."""
        self.finished, self.earlier = samples, None
        if len(samples) != 1:
            return
        prompt = None if self.context is None or self.context.prompts is None else self.context.prompts[0]
        most = max(1, min(EARLIER_IMAGES, EARLIER_NUMBERS // samples.numel()))
        for term in terms:
            memory, space = term.memory, term.space
            as_they_are = space.direct and not space.inside and not space.as_compared
            if not (isinstance(memory, MemoryBank) and as_they_are and memory.shape == tuple(samples.shape[1:])):
                continue
            if len(memory) and (prompt is None) == (memory.prompt_dim is None):
                rows, _ = memory.newest(most, prompt, SAME_PROMPT)
                self.earlier = rows if len(rows) else None
                return

    # -- moves -------------------------------------------------------------------------------------------------------

    @property
    def steps(self) -> list[StepRecord]:
        """The guided steps, in order."""
        return [StepRecord(step, float(relative.mean()), float(noise)) for step, relative, noise in self.moves]

    @property
    def steps_guided(self) -> int:
        """Number of guided steps."""
        return len({step for step, *_ in self.moves})

    @property
    def seconds(self) -> float:
        """Time spent in guidance, without the denoiser and the scheduler."""
        return 0.0 if self.context is None else self.context.time.seconds

    @property
    def mean_relative_move(self) -> float:
        """Mean relative move over guided steps and samples; 0 if no step was guided."""
        steps = self.steps
        return sum(s.relative_move for s in steps) / len(steps) if steps else 0.0

    @property
    def eased_cfg(self) -> tuple[float, float] | None:
        """Weight of classifier-free guidance, and the least that ``cfg_share=`` and ``ease_cfg=`` made of it, or None."""
        pairs = [(float(own), float(eased)) for _, own, eased in self.eased]
        return min(pairs, key=lambda pair: pair[1] - pair[0], default=None)

    def table(self) -> str:
        """The guided steps as a table: index from 1, noise-to-signal ratio, and move relative to the moved sample."""
        rows = [f"{s.step + 1:>4}  {s.noise_to_signal:>15.4g}  {s.relative_move:>8.2%}" for s in self.steps]
        return "\n".join(["step  noise-to-signal      move", *rows])

    # -- images ------------------------------------------------------------------------------------------------------

    @property
    def images(self) -> int:
        """Number of finished samples; 0 while the run is in progress."""
        return 0 if self.finished is None else len(self.finished)

    @property
    def prompts_known(self) -> bool:
        """Whether the prompts could be read, or the pipeline takes none; otherwise all images count as one prompt's."""
        return self.context is None or self.context.prompts is not None or not self.context.call.prompted

    def _groups(self) -> list[Tensor]:
        """Indices of the samples of each prompt."""
        t = None if self.context is None or self.context.prompts is None else self.context.prompts.cpu().double()
        if t is None or len(t) != self.images:
            return [torch.arange(self.images)]
        first = (torch.cdist(t, t) <= SAME_PROMPT).int().argmax(1)  # the first sample of the same prompt
        return [(first == k).nonzero()[:, 0] for k in first.unique()]

    @property
    def prompts(self) -> int:
        """Number of different prompts; 1 if there are none or if they are unknown."""
        return len(self._groups())

    def _scores(self, x: Tensor | None) -> list[PromptScore]:
        """The scores of all prompts with at least two of these samples."""
        if x is None or len(x) != self.images:
            return []
        found = []
        for index in self._groups():
            if len(index) > 1:
                found.append(_score(x[index.to(x.device)].cpu()))  # a prompt at a time, so few rows are copied at once
        return found

    @property
    def guided(self) -> float | None:
        """Effective number of different images of a prompt; None if no prompt has two images, or the run has not ended."""
        return _mean(self._scores(self.finished))

    @property
    def earlier_images(self) -> int:
        """Number of earlier images of its prompt that a single finished image was compared with."""
        return 0 if self.earlier is None else len(self.earlier)

    @property
    def with_earlier(self) -> float | None:
        """Effective number of different images among a single finished one and the earlier ones of its prompt, or None."""
        if self.earlier is None or self.finished is None:
            return None
        return _score(torch.cat([self.earlier.cpu(), self.finished.flatten(1).cpu().to(self.earlier.dtype)])).value

    @property
    def earlier_alone(self) -> float | None:
        """The same number among the earlier images alone; the larger one where the new image repeats one of them."""
        return None if self.earlier is None else _score(self.earlier.cpu()).value

    @property
    def plain(self) -> float | None:
        """The same without guidance, from the same noise; None unless :meth:`KernelGuidance.compare` made the run."""
        return _mean(self._scores(self.finished_plain))

    @property
    def guided_interval(self) -> tuple[float, float] | None:
        """95% interval of :attr:`guided` by the jackknife over images; None if a prompt has fewer than four."""
        return _interval(self._scores(self.finished))

    @property
    def plain_interval(self) -> tuple[float, float] | None:
        """95% interval of :attr:`plain`, as :attr:`guided_interval`."""
        return _interval(self._scores(self.finished_plain))

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, ready for JSON; figures that are not known are None."""
        guided, plain = self._scores(self.finished), self._scores(self.finished_plain)
        return {
            "images": self.images,
            "prompts": self.prompts,
            "prompts_known": self.prompts_known,
            "guided": _mean(guided),
            "guided_interval": _interval(guided),
            "earlier_images": self.earlier_images,
            "with_earlier": self.with_earlier,
            "earlier_alone": self.earlier_alone,
            "plain": _mean(plain),
            "plain_interval": _interval(plain),
            "targets": [{"target": str(target), **asdict(found)} for target, found in self.targets],
            "steps_guided": self.steps_guided,
            "total_steps": self.total_steps,
            "mean_relative_move": self.mean_relative_move,
            "eased_cfg": self.eased_cfg,
            "seconds": self.seconds,
            "scheduler": self.scheduler,
            "layout": self.layout,
        }

    as_dict = to_dict

    # -- text --------------------------------------------------------------------------------------------------------

    def __repr__(self) -> str:
        numbers = {"guided": self.guided, "plain": self.plain, "mean_relative_move": self.mean_relative_move}
        shown = [f"{name}={'None' if value is None else f'{value:.3g}'}" for name, value in numbers.items()]
        return (
            f"GuidanceReport(images={self.images}, prompts={self.prompts}, {', '.join(shown)}, "
            f"steps_guided={self.steps_guided}, total_steps={self.total_steps}, scheduler={self.scheduler!r})"
        )

    def __str__(self) -> str:
        if self.context is None:
            return "No run yet: generate images with the guide attached, or with guide.compare(pipe, ...)."
        if self.finished is None:
            return f"The run has not ended: guided {self.steps_guided} of {self.total_steps} steps so far."
        guided, plain = self._scores(self.finished), self._scores(self.finished_plain)
        lines = [self._images_line(guided, plain), self._moves_line(), self._eased_line(), *self._target_lines()]
        lines += self._advice(guided, plain)
        return "\n".join(line for line in lines if line)

    def _images_line(self, guided: list[PromptScore], plain: list[PromptScore]) -> str:
        n = self.images
        if not guided:
            if self.earlier is not None:
                k = self.earlier_images
                before = "with 1 earlier image" if k == 1 else f"with {k} earlier images"
                alone = "" if k == 1 else f", and those alone like {self.earlier_alone:.1f}"
                of = "" if self.context is None or self.context.prompts is None else " of its prompt"
                return f"1 image: {before}{of} it looks like {self.with_earlier:.1f} different ones{alone}."
            what = "1 image" if n == 1 else f"{n} images, each of a prompt of its own"
            return f"{what}: differences are counted among images of one prompt, from two images on."
        sizes = [len(score.left_out) for score in guided]
        if self.prompts == 1:
            subject = f"These {n} images look like"
        else:
            each = f"{sizes[0]}" if min(sizes) == max(sizes) else f"{min(sizes)} to {max(sizes)}"
            subject = f"{len(guided)} prompts with {each} images each: on average, the images of a prompt look like"
        beside = f"; without guidance, from the same noise, {_number(plain)}" if plain else ""
        return f"{subject} {_number(guided)} different ones{beside}.{_verdict(plain, guided) if plain else ''}"

    @property
    def _word(self) -> str:
        """What the size of the mean move is; empty for moves of noisy samples, which are of another scale."""
        move = self.mean_relative_move
        return next(word for bound, word in WORDS if move <= bound) if self.moves_predictions and move else ""

    def _moves_line(self) -> str:
        if not self.moves:
            return ""
        word = f": {self._word}" if self._word else ""
        of = "prediction" if self.moves_predictions else "hidden states" if self.moves_inside else "noisy sample"
        return (
            f"Guided {self.steps_guided} of {self.total_steps} steps, in {self.seconds:.2g} s; mean move "
            f"{_percent(self.mean_relative_move)} of the {of}{word}."
        )

    def _eased_line(self) -> str:
        """What ``cfg_share=`` and ``ease_cfg=`` did."""
        found, share = self.eased_cfg, self.cfg_share
        names = [name for name, given in (("cfg_share=", share is not None), ("ease_cfg=", self.eases)) if given]
        if not names or not (self.moves or found):  # a share acts also where no step is guided
            return ""
        if found is None:
            return f"This call has no classifier-free guidance, so {' and '.join(names)} changed nothing."
        own, least = found
        if not self.eases or (share is not None and least > 0.999 * (1 + share * (own - 1))):  # lower than ease_cfg=
            return f"Classifier-free guidance of {own:.3g} was lowered to {least:.3g} for the whole call."
        lowered = "" if share is None else f"to {1 + share * (own - 1):.3g} "
        return f"Classifier-free guidance of {own:.3g} was eased to {least:.3g} and returned {lowered}as the moves faded."

    def _target_lines(self) -> list[str]:
        """What the target has done for each prompt."""
        lines = [target.describe(found) for target, found in self.targets[:LISTED_TARGETS]]
        rest = [found for _, found in self.targets[LISTED_TARGETS:]]
        if rest:
            reached = sum(found.status == "reached" for found in rest)
            lines.append(f"Of {len(rest)} more prompts {reached} have reached it; see to_dict().")
        return lines

    def _advice(self, guided: list[PromptScore], plain: list[PromptScore]) -> list[str]:
        """What is noteworthy, and what to change."""
        lines, move = [], self.mean_relative_move
        name = " and ".join(dict.fromkeys(name for name, _ in self.strengths))
        dial = f"{name}, now {' and '.join(f'{value:g}' for _, value in self.strengths)}"
        if not self.moves:
            why = (
                f"{name} is 0"
                if not any(value for _, value in self.strengths)
                else "no step lies between start= and stop= (or in sigma_interval=)"
            )
            lines.append(f"Nothing was guided: no step of {self.total_steps}, since {why}.")
        elif move == 0:
            lines.append(f"Nothing moved: {self._reason()}")
        elif self.targets:  # which chooses the strength
            pass
        elif self._word == "off the scale":
            lines.append(
                f"Moves {'larger than the images' if move > 1 else 'nearly as large as the images'} usually break them, "
                f"however different they then are: lower {dial}{self._suggestion()}."
            )
        elif self._word in ("too weak to see", "weak"):
            lines.append(f"For a larger effect raise {dial}{self._suggestion()}.")
        else:
            lines.append(f"If images look wrong, lower {dial}; for a larger effect, raise it.")
        if plain and move and sum(s.value for s in plain) > SATURATED * sum(len(s.left_out) for s in plain):
            lines.append("Without guidance nearly all differ already, as far as this number tells; judge by eye.")
        if not self.prompts_known:
            lines.append(
                "The prompts are unknown, so all images count as images of one prompt; `with guide.attach(pipe)` reads "
                "prompts that a callback cannot."
            )
        if guided and not plain and move:
            lines.append("guide.compare(pipe, ...) makes the same call without guidance beside it.")
        return lines

    def _reason(self) -> str:
        """Why moves are 0, as far as the report can know it."""
        if self.images == 1 and not self.remembered:
            return (
                "one image and an empty memory, so there is nothing to be different from. Generate several images in one "
                "call, or call again with the same guide, whose memory grows."
            )
        if any(name == "apart" for name, _ in self.strengths):
            return "the images of each prompt differ as much already as apart= asks for. For a larger effect raise it."
        if self.prompts == self.images > 1 or (self.images == 1 and self.remembered):
            return (
                "no two images have related prompts, in this call or in the memory. Generate several images per prompt, or "
                "call again with the same guide."
            )
        return "the objective has no gradient at these images, which may be unrelated already, or rounding took the moves."

    def _suggestion(self) -> str:
        """A strength that brings the mean move to a moderate size, or nearer to it by a factor of 4, if there is one."""
        if len(self.strengths) != 1:
            return ""
        name, value = self.strengths[0]
        wanted = value * min(0.2 / self.mean_relative_move, 4)
        if name == "apart":  # moves are not in proportion to it
            return ""
        if name == "variety" and wanted > 100:
            return ", to 100, or set a scale, which has no limit"
        return f", to about {float(f'{wanted:.1g}'):g}"


def _score(samples: Tensor) -> PromptScore:
    """The score of one prompt's samples ``[m, ...]``, on the CPU: in float64, which some accelerators lack."""
    squares = gram(natural_rows(samples, normalize=True), GaussianKernel(IMAGE_BANDWIDTH)).square()
    rest = squares.sum() - 2 * squares.sum(1) + squares.diagonal()
    return PromptScore(len(squares) ** 2 / float(squares.sum()), (len(squares) - 1) ** 2 / rest)


def _mean(scores: list[PromptScore]) -> float | None:
    return sum(score.value for score in scores) / len(scores) if scores else None


def _error(parts: list[Tensor]) -> tuple[float, int]:
    """Standard error and degrees of freedom of a mean of independent scores, each left out by ``[m]``."""
    errors = [jackknife_interval(part.mean(), part).standard_error for part in parts]
    return math.sqrt(sum(e**2 for e in errors)) / len(errors), sum(len(part) - 1 for part in parts)


def _half_width(parts: list[Tensor]) -> float | None:
    """Half of the 95% interval of a mean of scores; None if one is of too few samples."""
    if not parts or min(map(len, parts)) < INTERVAL_IMAGES:
        return None
    from scipy.stats import t

    error, freedom = _error(parts)
    return float(t.ppf(0.975, freedom)) * error


def _interval(scores: list[PromptScore]) -> tuple[float, float] | None:
    half, value = _half_width([score.left_out for score in scores]), _mean(scores)
    if half is None or value is None:
        return None
    most = sum(len(score.left_out) for score in scores) / len(scores)
    return max(value - half, 1.0), min(value + half, most)


def _number(scores: list[PromptScore]) -> str:
    interval = _interval(scores)
    return f"{_mean(scores):.1f}" + ("" if interval is None else f" [{interval[0]:.1f}, {interval[1]:.1f}]")


def _verdict(plain: list[PromptScore], guided: list[PromptScore]) -> str:
    """Whether the numbers differ, judged by the interval of the difference, since both start from the same noise.

    A difference below a tenth may be certain and still too small to see, so it is not called clear.
    """
    half = _half_width([b.left_out - a.left_out for a, b in zip(plain, guided, strict=True)])
    if half is None:
        return ""
    difference = sum(b.value - a.value for a, b in zip(plain, guided, strict=True)) / len(plain)
    if abs(difference) <= half:
        return " No clear change."
    share = difference / (sum(a.value for a in plain) / len(plain))
    if abs(share) < 0.1:
        return f" Slightly {'more' if share > 0 else 'fewer'}: {share:+.1%}."
    return " Clearly more." if share > 0 else " Clearly fewer."


def _percent(share: float) -> str:
    """A relative move in words, with at most three digits."""
    return f"{share:.3g} times the norm" if share >= 10 else f"{float(f'{100 * share:.2g}'):g}% of the norm"
