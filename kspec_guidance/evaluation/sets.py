"""Evaluation of an image set from its features, for `evaluate`; without files or pages."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType
from typing import Any

from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.names import DEMO_NAME
from kspec_guidance.evaluation.embedders.texts import one_hot_embedder
from kspec_guidance.evaluation.image_sets import ImageSet, by_prompt
from kspec_guidance.evaluation.neighbours import Duplicate, near_duplicates, prompt_bound, redundant
from kspec_guidance.evaluation.perceptual import PairDistance
from kspec_guidance.evaluation.runs import made_by_demo
from kspec_guidance.evaluation.scores import EXACT_ROWS, ScoreRecord, ScoreRecorder
from kspec_guidance.evaluation.verdicts import (
    Headline,
    advice,
    doubts,
    set_verdict,
)
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import IMAGE_BANDWIDTH, GaussianKernel, l2_normalize
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.statistics import (
    Curve,
    convergence_curve,
    distance_curve,
    effective_number_interval,
)

__all__ = ["Evaluation", "PromptScore", "evaluate_set", "prompt_ranking"]

DUPLICATE = 0.98  # cosine from which an image nearly repeats another
KERNEL = GaussianKernel(IMAGE_BANDWIDTH)  # one for all sets, so that their scores can be compared


@dataclass(frozen=True)
class PromptScore:
    """Diversity among the images of one prompt.

    Attributes:
        prompt: text of the prompt.
        images: indices of the images.
        different: number of different images: RKE, which also sees variation within a kind.
        agreement: mean agreement of the images with the prompt, in 0..100; None without a judge that knows the prompt.
    """

    prompt: str
    images: list[int]
    different: float
    agreement: float | None = None

    @property
    def share(self) -> float:
        """Number of different images over the number of images: 1 if all differ."""
        return self.different / len(self.images)


@dataclass
class Evaluation:
    """Scores of one set.

    Attributes:
        images: the set.
        embedder: name, fingerprint, input size and width of the embedder.
        headline: number of different images.
        verdict: the headline in one sentence.
        warnings: what makes the figures doubtful.
        actions: what to do about the set.
        scores: scores with their intervals.
        convergence: scores against the number of samples.
        distances: number of different images against the distance up to which images are of one kind.
        modes: kinds of images, largest first; each image is in one.
        duplicates: near-duplicates, most similar first.
        redundant: indices of the images to leave out so that no two of the others are near-duplicates.
        prompts: scores of prompts, from the least to the most diverse.
        bound: how much closer each image is to others of its prompt than to those of other prompts, from least to most.
        reference: the second set of the scores of fidelity and novelty.
    """

    images: ImageSet
    embedder: dict[str, Any]
    headline: Headline
    verdict: str
    warnings: list[str]
    actions: list[str]
    scores: list[ScoreRecord]
    convergence: Curve
    distances: Curve
    modes: list[F.Mode]
    duplicates: list[Duplicate]
    redundant: list[int] = field(default_factory=list)
    prompts: list[PromptScore] = field(default_factory=list)
    bound: dict[int, float] = field(default_factory=dict)
    reference: ImageSet | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; images and features left out."""
        names = self.images.names
        return {
            "embedder": self.embedder,
            "verdict": self.verdict,
            "headline": asdict(self.headline),
            "warnings": self.warnings,
            "actions": self.actions,
            **self.images.account(),
            "reference": None if self.reference is None else self.reference.account(),
            "scores": [s.as_dict() for s in self.scores],
            "modes": [{"share": m.share, "images": [names[i] for i in m.samples]} for m in self.modes],
            "duplicates": [{"images": [names[d.first], names[d.second]], "cosine": d.cosine} for d in self.duplicates],
            "redundant": [names[i] for i in self.redundant],
            "judge": None if self.images.judge is None else self.images.judge.name,
            "prompts": [
                {"prompt": p.prompt, "images": len(p.images), "different": p.different, "agreement": p.agreement}
                for p in self.prompts
            ],
            "prompt_bound": {names[i]: v for i, v in self.bound.items()},
            "convergence": asdict(self.convergence),
            "distances": asdict(self.distances),
        }

    def summary(self) -> list[str]:
        """The features, the verdict, what makes it doubtful, and what to do, one sentence each."""
        doubtful, to_do = [f"Read with care: {w}" for w in self.warnings], [f"To do: {a}." for a in self.actions]
        return [f"Image features: {self.embedder['name']}.", self.verdict, *doubtful, *to_do]

    def scalars(self) -> dict[str, float]:
        """All figures by name, for trackers of experiments."""
        bounds = {k: v for k in ("low", "high") if (v := getattr(self.headline, k)) is not None}
        return {"different": self.headline.different, **bounds, **{s.score: s.value for s in self.scores}}


def prompt_ranking(x: Tensor, prompts: Sequence[str | None] | None, agreement: Tensor | None = None) -> list[PromptScore]:
    """Prompts with at least two images, from the least to the most diverse per image.

    Args:
        x: features ``[n, d]``.
        prompts: prompt of each image; images without one (None) are left out.
        agreement: of each image with its prompt ``[n]``.
    """
    u, scores = l2_normalize(x), []
    for prompt, i in by_prompt(prompts).items():
        mean = None if agreement is None else float(agreement[i].mean())
        known = None if mean is None or math.isnan(mean) else mean
        scores.append(PromptScore(prompt, i, float(F.rke_score(u[i], KERNEL)), known))
    return sorted(scores, key=lambda s: s.share)


def _about(embedder: ImageEmbedder, width: int) -> dict[str, Any]:
    return {
        "name": embedder.name,
        "fingerprint": embedder.fingerprint,
        "input size": embedder.size,
        "width": width,
        "same_distance": embedder.same_distance,
    }


def _headline(modes: list[F.Mode]) -> Headline:
    sizes = [len(m.samples) for m in modes]
    if sum(sizes) < 5:
        return Headline(sum(sizes), F.effective_number(sizes))
    found = effective_number_interval(sizes)
    return Headline(sum(sizes), found.value, found.low, found.high)


def evaluate_set(
    images: ImageSet,
    embedder: ImageEmbedder,
    text_embedder: TextEmbedder | None = None,
    reference: ImageSet | None = None,
    seed: int = 0,
    distances: Mapping[str, PairDistance] = MappingProxyType({}),
) -> Evaluation:
    """Score one set: how many different images it has, diversity given prompts, fidelity and novelty against a reference.

    The number of different images is that of kinds (:func:`~kspec_guidance.functional.kinds_score`) at the embedder's
    ``same_distance``. Scores by Gaussian kernels use features of norm 1 and one bandwidth, ``IMAGE_BANDWIDTH``, for all
    sets. Above 1,500 images they use 1,024 random features, in one pass. Scores given prompts are of the images that have
    one; their records have the number of these images.

    Args:
        images: the set.
        embedder: embedder of its features.
        text_embedder: embedder of its prompts; by default distinct prompts are unrelated.
        reference: a second set.
        seed: seed of random subsets.
        distances: perceptual distances by name, whose mean over pairs of images of a prompt is added; the files are read
            again.

    Raises:
        ValueError: for a reference whose features have another width.
    """
    x = l2_normalize(on_host(images.features))
    recorder = ScoreRecorder(len(x), embedder, seed)
    recorder.diversity(x, KERNEL)
    known = {i: p for i, p in enumerate(images.prompts or []) if p is not None}
    if len(set(known.values())) > 1:
        encoder = text_embedder or one_hot_embedder()
        t, captioned = l2_normalize(on_host(encoder(list(known.values())))), x[list(known)]
        conditional = ScoreRecorder(len(captioned), embedder, seed)
        conditional.conditional(captioned, t, KERNEL)
        recorder.records += conditional.records
    judged = None if images.agreement is None else images.agreement[images.agreement.isfinite()]
    if judged is not None and len(judged):
        agreement = ScoreRecorder(len(judged), embedder, seed)
        agreement.agreement(judged)
        recorder.records += agreement.records
    for name, distance in distances.items():
        recorder.perceptual(name, images, distance)
    if reference is not None:
        recorder.against(images.features, reference.features)
    modes = F.kinds(x, embedder.same_distance)
    headline, prompts, repeats = (
        _headline(modes),
        prompt_ranking(x, images.prompts, images.agreement),
        redundant(x, DUPLICATE),
    )
    subset = x[evenly_spaced(len(x), EXACT_ROWS)]
    notes = doubts(
        headline, [len(p.images) for p in prompts], embedder.name, embedder.measured, embedder.same_distance
    )  # fmt: skip
    if embedder.name == DEMO_NAME and not made_by_demo(images.path):
        notes.insert(0, "Nothing says that the embedded model made these images, and demo tells other images apart badly.")
    return Evaluation(
        images,
        _about(embedder, x.shape[1]),
        headline,
        set_verdict(headline),
        notes,
        advice([(p.prompt, p.different, len(p.images)) for p in prompts], len(repeats)),
        recorder.records,
        convergence_curve(subset, KERNEL, repeats=3, seed=seed),
        distance_curve(subset),
        modes,
        near_duplicates(x),
        repeats,
        prompts,
        dict(sorted(prompt_bound(x, [p.images for p in prompts]).items(), key=lambda pair: pair[1])),
        reference,
    )
