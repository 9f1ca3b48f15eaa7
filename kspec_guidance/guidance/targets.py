"""VarietyTarget: raises the variety of each prompt from call to call until its images are as different as asked."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.demo import unknown_words
from kspec_guidance.guidance.spaces import Pixels
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel
from kspec_guidance.loop.context import CallContext, StepContext
from kspec_guidance.objectives import natural_rows
from kspec_guidance.utils.images import to_frames

__all__ = ["SAME_PROMPT", "STATUSES", "Fidelity", "PromptTarget", "VarietyTarget"]

SAME_PROMPT = 5e-3  # distance of unit-norm prompt features up to which prompts are the same: rounding of half precision
FIRST, LARGEST, STEP = 25.0, 100.0, 25.0  # variety of the first call; the largest; the largest step from call to call
SMALLEST_STEP = 1.0
# a calibrated variety of 50 lowers the mean squared kernel of two images by 30%, see kspec_guidance.calibration
RATE = -math.log(0.7) / 50
LEAST_PAIRS = 6  # pairs of images, those of four images, from which on a strength is judged
LEAST_ALIKE = 1e-6  # mean squared kernel below which images are unrelated
KEPT_ROWS, KEPT_PROMPTS = 16, 256  # newest images of a prompt that later ones are compared with, and of how many prompts
SKETCH = 2048  # numbers that are kept of an image
# the guards
LARGEST_MOVE = 0.4  # mean move, relative to the prediction: from there on some images break (benchmarks/moves.py)
LEAST_SCORED = 4  # images of a strength from which on its fidelity is judged
LEAST_SCORE = 0.1  # mean fidelity of the first strength below which the model does not know the prompt
KEPT_SCORE = 0.8  # share of the first strength's fidelity that a larger one must keep

STATUSES = ("reached", "stopped", "not reached", "too few images")

Fidelity = Callable[[list[Image.Image], list[str]], Sequence[float]]


@dataclass(frozen=True)
class PromptTarget:
    """What a target has done for one prompt so far.

    Attributes:
        prompt: its text; None if unknown.
        images: number of its images, of all calls.
        different: how many different images as many of them as the target names look like; None for fewer than four.
        status: ``reached``, ``stopped``, ``not reached`` (yet) or ``too few images``.
        reason: why its variety rises no more, a prompt that the model does not know included; else empty.
        varieties: the strengths so far, in order.
        next_variety: the strength of the next call.
        fidelity: mean score of the images at the latest strength that was judged; None without a judge.
    """

    prompt: str | None
    images: int
    different: float | None
    status: str
    reason: str
    varieties: list[float]
    next_variety: float
    fidelity: float | None


@dataclass
class _Level:
    """The images of a prompt that were made at one strength."""

    variety: float
    images: int = 0
    pairs: int = 0  # of images of which the newer one has this strength
    alike: float = 0.0  # sum of their squared kernels
    scored: int = 0
    score: float = 0.0  # sum of the fidelity of the scored images

    @property
    def fidelity(self) -> float | None:
        return self.score / self.scored if self.scored >= LEAST_SCORED else None


@dataclass(eq=False)
class _Prompt:
    """What is known of one prompt."""

    features: Tensor | None
    text: str | None = None
    levels: list[_Level] = field(default_factory=list)
    variety: float = FIRST  # of the next call
    stopped: str = ""  # why a guard has stopped it for good
    known: bool = True  # whether the model knows the prompt
    limit: str = ""  # why it cannot rise now
    rows: Tensor | None = None  # sketches of its newest images
    size: int = 0  # numbers of an image

    @property
    def pairs(self) -> int:
        return sum(level.pairs for level in self.levels)

    @property
    def alike(self) -> float:
        """Mean squared kernel of two images of the prompt."""
        return sum(level.alike for level in self.levels) / max(self.pairs, 1)


class VarietyTarget:
    """Raises the variety of each prompt from call to call until its images are as different as asked, and no further.

    Images are compared as in :class:`~kspec_guidance.guidance.GuidanceReport`. ``6 of 8`` is reached once 8 images of the
    prompt look like 6 different ones: ``1 / (1/8 + 7/8 a)``, the effective number of 8 images whose mean squared kernel is
    the mean ``a`` over all images of the prompt so far. It does not depend on how many there are.

    The first call of a prompt has variety 25. After a call that misses the target the variety rises by what the missing
    difference needs on a calibrated pipeline, at most 25, to at most 100. It stays where it is once the target is reached,
    or once the latest images are as different as asked and only earlier ones are not.

    A guard stops the rise. By default it judges what costs nothing: after a mean move above 40% of the prediction the
    variety goes back in proportion, and for prompts with words that the embedded pipeline has never seen it stays at 25. A
    ``fidelity`` judges the decoded images instead: if those of a strength have less than 80% of the first strength's mean
    score, the variety goes back to the strength before; if the first strength's is below 0.1, the model does not know the
    prompt, and the variety stays at 25.

    Args:
        different: the number of different images, above 1 and below ``of``.
        of: out of how many, at least 2.
        fidelity: called at the end of each run with the images and their prompts; returns for each a number in 0..1, such
            as the probability that it shows its prompt. False for no guard.

    Raises:
        ValueError: for numbers outside their ranges.
        TypeError: if ``fidelity`` is not callable.
    """

    def __init__(self, different: float, of: int, fidelity: Fidelity | bool | None = None):
        if of < 2 or not 1 < different < of:
            raise ValueError(
                f"a target is a number of different images out of several, such as '6 of 8': above 1 and below the second "
                f"number, which copies and unrelated images have; got {different:g} of {of}"
            )
        if not (fidelity is None or fidelity is False or callable(fidelity)):
            raise TypeError(
                "fidelity must be a function of images and prompts, None for the guard that costs nothing, or False for "
                f"none, got {fidelity!r}"
            )
        self.different, self.of, self.fidelity = float(different), int(of), fidelity
        self._prompts: list[_Prompt] = []
        self.used: list[float] = []  # variety of each sample of the latest run

    @classmethod
    def parse(cls, text: Any, fidelity: Fidelity | bool | None = None) -> "VarietyTarget":
        """Read ``6 of 8``.

        Raises:
            ValueError: for any other value.

        >>> VarietyTarget.parse("6 of 8")
        VarietyTarget('6 of 8')
        """
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*of\s*(\d+)\s*", text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(
                f"a target is a text such as '6 of 8', 6 different images of every 8 of a prompt, got {text!r}"
            )
        return cls(float(match[1]), int(match[2]), fidelity)

    def __str__(self) -> str:
        return f"{self.different:g} of {self.of}"

    def __repr__(self) -> str:
        return f"VarietyTarget('{self}')"

    # -- strengths ---------------------------------------------------------------------------------------------------

    def varieties(self, context: StepContext, n: int) -> list[float]:
        """The variety of each of the ``n`` samples of a pass that begins.

        Raises:
            ValueError: if there is no pipeline whose images a ``fidelity`` could judge.
        """
        if callable(self.fidelity) and context.call.pipe is None:
            raise ValueError("fidelity= judges decoded images, and a bare scheduler has no decoder; attach to a pipeline")
        found = [FIRST] * n
        for prompt, index in self._groups(context.prompts, n, create=False):
            for k in index:
                found[k] = prompt.variety
        self.used = found
        return found

    def _groups(self, prompts: Tensor | None, n: int, create: bool) -> list[tuple[_Prompt, list[int]]]:
        """The known prompts of a batch, each with the indices of its samples; unknown ones are added if asked for."""
        if prompts is None or len(prompts) != n:
            known = next((p for p in self._prompts if p.features is None), None)
            if known is None and create:
                known = _Prompt(None)
                self._prompts.append(known)
            return [] if known is None else [(known, list(range(n)))]
        t = prompts.detach().float().cpu()
        owners: list[int | None] = [None] * n
        listed = [k for k, p in enumerate(self._prompts) if p.features is not None and len(p.features) == t.shape[1]]
        if listed:
            rows = torch.stack([self._prompts[k].features for k in listed])  # type: ignore[misc]
            distance, nearest = _distances(t, rows).min(1)
            close = (distance <= SAME_PROMPT).tolist()
            owners = [listed[k] if near else None for k, near in zip(nearest.tolist(), close, strict=True)]
        if create:
            first = (_distances(t, t) <= SAME_PROMPT).int().argmax(1).tolist()  # the first sample of the same prompt
            for k in range(n):
                if owners[k] is None and first[k] == k:
                    owners[k] = len(self._prompts)
                    self._prompts.append(_Prompt(t[k].clone()))
                elif owners[k] is None:
                    owners[k] = owners[first[k]]
        return [
            (self._prompts[k], [i for i, owner in enumerate(owners) if owner == k])
            for k in dict.fromkeys(owners)
            if k is not None
        ]

    # -- what a run has given ----------------------------------------------------------------------------------------

    def observe(self, samples: Tensor, moves: Sequence[Tensor], context: StepContext) -> list[PromptTarget]:
        """Take note of the finished samples of a run, and choose the strengths of the next one.

        Args:
            samples: ``[n, ...]``.
            moves: relative moves ``[n]`` of the guided steps.
            context: of the run.

        Returns:
            What is known now of each prompt of the run.
        """
        n = len(samples)
        host, prompts = samples.detach().cpu(), context.prompts
        sizes = torch.stack([move.float() for move in moves if len(move) == n]).mean(0).cpu() if moves else torch.zeros(n)
        texts = context.call.texts_of_samples(n)
        scores = self._scores(samples, texts, context.call)
        used = self.used if len(self.used) == n else [FIRST] * n
        results = []
        for prompt, index in self._groups(prompts, n, create=True):
            if texts is not None:
                prompt.text = texts[index[0]]
            self._add(prompt, used[index[0]], host[index])
            level = prompt.levels[-1]
            if scores is not None:
                level.scored += len(index)
                level.score += sum(scores[k] for k in index)
            self._choose(prompt, float(sizes[index].mean()), context.call)
            results.append(self._status(prompt))
            self._prompts.remove(prompt)  # the newest last
            self._prompts.append(prompt)
        for prompt in self._prompts[:-KEPT_PROMPTS]:
            prompt.rows = None
        return results

    def _scores(self, samples: Tensor, texts: list[str] | None, call: CallContext) -> list[float] | None:
        """Fidelity of the finished samples; None if it is not judged."""
        if not callable(self.fidelity):
            return None
        if texts is None:
            call.warn(
                "the texts of the prompts are unknown, so fidelity= cannot judge these images; moves are limited instead"
            )
            return None
        found = [float(score) for score in self.fidelity(_pictures(Pixels().decode(samples, call)), texts)]
        if len(found) != len(texts) or not all(0 <= score <= 1 for score in found):
            raise ValueError(
                f"fidelity must return {len(texts)} numbers in 0..1, one for each image, got {str(found)[:80]}"
            )
        return found

    @staticmethod
    def _add(prompt: _Prompt, variety: float, samples: Tensor) -> None:
        """Compare new samples of a prompt with each other and with its newest earlier ones."""
        rows = natural_rows(samples, normalize=True).double()
        if not prompt.levels or prompt.levels[-1].variety != variety:
            prompt.levels.append(_Level(variety))
        level, m = prompt.levels[-1], len(rows)
        kernel = GaussianKernel(IMAGE_BANDWIDTH)
        level.images += m
        level.pairs += m * (m - 1) // 2
        level.alike += float(kernel(rows, rows).square().triu(1).sum())
        sketches = _sketch(rows).float()
        if prompt.rows is not None and prompt.size == rows.shape[1]:
            level.pairs += m * len(prompt.rows)
            level.alike += float(kernel(sketches.double(), prompt.rows.double()).square().sum())
            sketches = torch.cat([prompt.rows, sketches])
        prompt.rows, prompt.size = sketches[-KEPT_ROWS:].contiguous(), rows.shape[1]

    def _different(self, alike: float) -> float:
        """Effective number of different images among ``of`` with this mean squared kernel of two."""
        return 1 / (1 / self.of + (1 - 1 / self.of) * alike)

    def _choose(self, prompt: _Prompt, move: float, call: CallContext) -> None:
        """The strength of a prompt's next call."""
        level, prompt.limit = prompt.levels[-1], ""
        if prompt.stopped or self._guarded(prompt, move, call):
            return
        if level.pairs < LEAST_PAIRS or self._different(prompt.alike) >= self.different or self._enough(level):
            return
        if level.variety >= LARGEST:
            prompt.limit = f"{LARGEST:g} is the largest variety"
            return
        wanted = (1 / self.different - 1 / self.of) / (1 - 1 / self.of)
        step = math.log(max(level.alike / level.pairs, LEAST_ALIKE) / wanted) / RATE
        variety = min(level.variety + min(max(step, SMALLEST_STEP), STEP), LARGEST)
        if self._limits_moves(level) and move:
            most = level.variety * LARGEST_MOVE / move
            if most < level.variety + SMALLEST_STEP:
                prompt.limit = f"larger moves than {LARGEST_MOVE:.0%} of the image break images"
                return
            variety = min(variety, most)
        prompt.variety = round(variety, 1)

    def _enough(self, level: _Level) -> bool:
        """Whether images of this strength are as different from each other and from earlier ones as asked."""
        return level.pairs >= LEAST_PAIRS and self._different(level.alike / level.pairs) >= self.different

    def _limits_moves(self, level: _Level) -> bool:
        """Whether the guard is the size of moves: by default, and where images could not be judged."""
        return self.fidelity is None or (callable(self.fidelity) and not level.scored)

    def _guarded(self, prompt: _Prompt, move: float, call: CallContext) -> bool:
        """Whether a guard has stopped a prompt now."""
        level = prompt.levels[-1]
        words = unknown_words(call.pipe, prompt.text or "") if self.fidelity is None else []
        first, now = prompt.levels[0].fidelity, level.fidelity
        if words:
            prompt.known = False
            prompt.stopped = f"this model has never seen {', '.join(map(repr, words[:5]))}"
        elif first is not None and first < LEAST_SCORE:
            prompt.known = False
            prompt.stopped = f"the model does not know this prompt: its images have a fidelity of {first:.2g}"
            prompt.variety = prompt.levels[0].variety
        elif first is not None and now is not None and now < KEPT_SCORE * first:
            prompt.stopped = f"at {level.variety:g} fidelity fell from {first:.2g} to {now:.2g}"
            prompt.variety = prompt.levels[-2].variety
        elif self._limits_moves(level) and move > LARGEST_MOVE:
            prompt.stopped = (
                f"at {level.variety:g} moves were {move:.0%} of the image, and above {LARGEST_MOVE:.0%} images break"
            )
            prompt.variety = round(level.variety * LARGEST_MOVE / move, 1)
        return bool(prompt.stopped)

    def _status(self, prompt: _Prompt) -> PromptTarget:
        different = self._different(prompt.alike) if prompt.pairs >= LEAST_PAIRS else None
        reason = prompt.stopped or prompt.limit
        if different is not None and different >= self.different and prompt.known:
            status = "reached"
        elif reason:
            status = "stopped"
        elif different is None:
            status = "too few images"
        else:
            status = "not reached"
            if self._enough(prompt.levels[-1]):
                reason = "the latest images are as different as asked, and only earlier ones are not"
        images = sum(level.images for level in prompt.levels)
        judged = [level.fidelity for level in prompt.levels if level.fidelity is not None]
        return PromptTarget(
            prompt.text, images, different, status, reason, [level.variety for level in prompt.levels],
            prompt.variety, judged[-1] if judged else None,
        )  # fmt: skip

    def describe(self, found: PromptTarget) -> str:
        """What a target has done for one prompt, in a sentence or two."""
        name = "Target" if found.prompt is None else f"Target for {found.prompt[:40]!r}"
        if found.different is None:
            so_far = f"{found.images} image{'s' if found.images > 1 else ''} so far, too few to tell"
        else:
            so_far = (
                f"{self.of} of its images would look like {found.different:.1f} different ones, by {found.images} so far"
            )
        reached = found.different is not None and found.different >= self.different
        text = f"{name}, {self}: {'reached' if reached else 'not reached'} ({so_far}), "
        if found.next_variety != found.varieties[-1] and not found.reason:
            return f"{text}next at variety {found.next_variety:g}."
        stays = f"{'stopped ' if found.status == 'stopped' else ''}at variety {found.next_variety:g}"
        return f"{text}{stays}{f': {found.reason}' if found.reason else ''}."

    @property
    def prompts(self) -> list[PromptTarget]:
        """What is known of each prompt, the latest ones last."""
        return [self._status(prompt) for prompt in self._prompts]

    # -- saving ------------------------------------------------------------------------------------------------------

    def copy(self) -> "VarietyTarget":
        """A copy that learns on its own."""
        other = VarietyTarget(self.different, self.of, self.fidelity)
        other.load(self.state())
        return other

    def state(self, prompts: Tensor | None = None, n: int | None = None) -> list[dict[str, Any]]:
        """What is known of the prompts, as plain values and tensors.

        Args:
            prompts: features ``[n, p]`` of a batch; only its prompts are returned.
            n: number of samples of that batch; None for all prompts.
        """
        found = self._prompts if n is None else [prompt for prompt, _ in self._groups(prompts, n, create=False)]
        return [vars(prompt) | {"levels": [asdict(level) for level in prompt.levels]} for prompt in found]

    def load(self, state: Sequence[dict[str, Any]]) -> None:
        """Take over what :meth:`state` returned, in place of what is known of the same prompts."""
        for values in state:
            new = _Prompt(**{**values, "levels": [_Level(**level) for level in values["levels"]]})
            features = None if new.features is None else new.features[None]
            for old, _ in self._groups(features, 1, create=False):
                self._prompts.remove(old)
            self._prompts.append(new)


def _distances(x: Tensor, y: Tensor) -> Tensor:
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist")


def _sketch(rows: Tensor) -> Tensor:
    """At most 2,048 numbers for each row ``[n, d]``, whose distances are those of the rows to a few percent.

    Numbers are added in random groups with random signs, always the same ones (Charikar, Chen, Farach-Colton 2002, count
    sketch).
    """
    d = rows.shape[1]
    if d <= SKETCH:
        return rows
    g = torch.Generator().manual_seed(d)
    groups = torch.randint(SKETCH, (d,), generator=g)
    signs = torch.randint(2, (d,), generator=g).to(rows) * 2 - 1
    return rows.new_zeros(len(rows), SKETCH).index_add_(1, groups, rows * signs)


def _pictures(decoded: Tensor) -> list[Image.Image]:
    """Decoded samples ``[n, c, h, w]`` in -1..1 as pictures; of clips ``[n, c, f, h, w]`` the middle frames.

    Raises:
        ValueError: for samples that are no pictures.
    """
    y = decoded[:, :, decoded.shape[2] // 2] if decoded.ndim == 5 else decoded
    try:
        return [to_frames(sample)[0] for sample in (y.float() / 2 + 0.5).clamp(0, 1)]
    except ValueError as error:
        raise ValueError(f"fidelity= judges pictures: {error}") from error
