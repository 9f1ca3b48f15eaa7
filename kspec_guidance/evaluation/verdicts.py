"""Plain sentences: what the figures of a set or of two sets say, what makes them doubtful, and what to do."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kspec_guidance.comparison import DiversityGap
from kspec_guidance.statistics import Comparison

__all__ = [
    "Headline",
    "advice",
    "agreement_verdict",
    "compare_verdict",
    "difference_is_sure",
    "doubts",
    "gap_verdict",
    "set_names",
    "set_verdict",
]

FEW_IMAGES = 20  # below this, figures change much from set to set
FEW_PER_PROMPT = 5
ALIKE = 0.35  # different images over images of a prompt, below which something should be done
PROMPTS_NAMED = 5  # in advice
SURE = 0.05  # p-value


@dataclass(frozen=True)
class Headline:
    """How many different images a set has.

    Attributes:
        images: number of images.
        different: effective number of kinds of images, see :func:`~kspec_guidance.functional.kinds_score`.
        low, high: 95% interval of ``different``; None for fewer than 5 images.
    """

    images: int
    different: float
    low: float | None = None
    high: float | None = None

    @property
    def interval(self) -> str:
        """The interval in words; empty without one."""
        return "" if self.low is None or self.high is None else f"95% interval {count(self.low)} to {count(self.high)}"


def count(value: float) -> str:
    """An effective number with as many digits as matter."""
    return f"{value:.1f}" if value < 100 else f"{value:.0f}"


def set_verdict(headline: Headline) -> str:
    """How varied one set is, in one sentence."""
    n, d, bounds = headline.images, headline.different, headline.interval
    bounds = f" ({bounds})" if bounds else ""
    if n == 1:
        return "There is one image, so nothing can be said about variety."
    if d <= 1.05:
        return f"All {n} images are of one kind{bounds}."
    if d >= 0.95 * n:
        return f"Nearly all of the {n} images differ in kind: {count(d)} different ones{bounds}."
    return f"The {n} images are as varied as {count(d)} different ones{bounds}."


def doubts(headline: Headline, per_prompt: Sequence[int], embedder: str, measured: bool, distance: float) -> list[str]:
    """What makes the figures of a set doubtful.

    Args:
        headline: of the set.
        per_prompt: numbers of images of its prompts.
        embedder: name of the embedder.
        measured: whether ``distance`` was measured with it.
        distance: up to which images are of one kind.
    """
    found = []
    if headline.images < FEW_IMAGES:
        found.append(f"There are only {headline.images} images; with fewer than {FEW_IMAGES} the figures are rough.")
    few = sum(k < FEW_PER_PROMPT for k in per_prompt)
    if few:
        found.append(
            f"{few} of {len(per_prompt)} prompts have fewer than {FEW_PER_PROMPT} images; their figures are rough."
        )
    if not measured:
        found.append(
            f"The distance {distance:g}, up to which images count as one kind, was not measured with {embedder}; look at "
            "the kinds to see whether they are what you would call one kind."
        )
    return found


def advice(prompts: Sequence[tuple[str, float, int]], redundant: int) -> list[str]:
    """What to do about prompts whose images are alike, and about near-duplicates.

    Args:
        prompts: text, number of different images and number of images of each prompt, the least varied first.
        redundant: number of near-duplicates to leave out.
    """
    alike = [(text, d, n) for text, d, n in prompts if n > 2 and d < ALIKE * n]
    found = [
        f"{text}: {d:.1f} of {n} images differ; raise variety, or rephrase the prompt"
        for text, d, n in alike[:PROMPTS_NAMED]
    ]
    if len(alike) > PROMPTS_NAMED:
        found.append(f"{len(alike) - PROMPTS_NAMED} more prompts have images that are as alike")
    if redundant:
        found.append(f"{redundant} images nearly repeat others; leave them out with --drop and the list of their names")
    return found


def set_names(a: Path, b: Path) -> tuple[str, str]:
    """The shortest suffixes of two paths that differ."""
    a, b = a.absolute(), b.absolute()
    for k in range(1, 1 + max(len(a.parts), len(b.parts))):
        names = "/".join(a.parts[-k:]), "/".join(b.parts[-k:])
        if names[0] != names[1]:
            return names
    return f"{a.name} (first)", f"{b.name} (second)"


def difference_is_sure(test: Comparison) -> bool:
    """Whether a difference as large would be rare if both sets came from one source."""
    return test.p_value < SURE


def compare_verdict(names: tuple[str, str], test: Comparison, per_prompt: bool) -> str:
    """Which of two sets is more varied, by how much, and whether that is sure, in one sentence.

    Args:
        names: of the sets.
        test: of the difference.
        per_prompt: whether the test is of the figures of shared prompts, instead of those of the whole sets.
    """
    n = test.n[0]
    where = f"per prompt, over {n} prompts" if per_prompt else f"among {n} of each"
    small = "" if n >= FEW_IMAGES or per_prompt else f"; with {n} images of each, only large differences can be seen"
    if not difference_is_sure(test):
        return (
            f"No sure difference: {test.a:.1f} different images in {names[0]} and {test.b:.1f} in {names[1]} {where} "
            f"(p = {test.p_value:.2g}){small}."
        )
    (more, high), (less, low) = sorted(zip(names, (test.a, test.b), strict=True), key=lambda pair: -pair[1])
    return (
        f"{more} is more varied than {less}: {high:.1f} against {low:.1f} different images {where}, "
        f"{100 * (high / low - 1):+.0f}% (sure, p = {test.p_value:.2g})."
    )


def agreement_verdict(names: tuple[str, str], test: Comparison | None) -> str:
    """Which set agrees better with its prompts, and whether that is sure, as a sentence to append; empty without a test.

    Args:
        names: of the sets.
        test: of the difference in agreement, in 0..100.
    """
    if test is None:
        return ""
    if not difference_is_sure(test):
        return f" No sure difference in prompt agreement: {test.a:.1f} and {test.b:.1f} of 100 (p = {test.p_value:.2g})."
    (more, high), (less, low) = sorted(zip(names, (test.a, test.b), strict=True), key=lambda pair: -pair[1])
    return (
        f" {more} agrees better with its prompts than {less}: {high:.1f} against {low:.1f} of 100 (p = {test.p_value:.2g})."
    )


def gap_verdict(name: str, found: DiversityGap) -> str:
    """How much less varied a set is than held-out images, by its Vendi score, in one sentence.

    Args:
        name: of the set.
        found: of the set.
    """
    vendi = found.scores["vendi"]
    figures = (
        f"Vendi score {count(vendi.generated)} against {count(vendi.held_out)} among {found.n} of each (gap "
        f"{vendi.gap.value:+.1f}, 95% interval {vendi.gap.low:.1f} to {vendi.gap.high:.1f})"
    )
    if not vendi.is_sure:
        return f"{name} is about as varied as the held-out images: {figures}."
    return f"{name} is {'less' if vendi.gap.value > 0 else 'more'} varied than the held-out images: {figures}."
