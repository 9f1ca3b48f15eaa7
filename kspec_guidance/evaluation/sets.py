"""Evaluation and comparison of image sets from their features, for `evaluate` and `compare`; without files or pages."""

import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.texts import one_hot_embedder
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.evaluation.neighbours import Duplicate, near_duplicates
from kspec_guidance.evaluation.scores import EXACT_ROWS, NUM_FEATURES, ScoreRecord, ScoreRecorder
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.functional.inputs import on_host, smaller_matrix
from kspec_guidance.kernels import GaussianKernel, l2_normalize, median_bandwidth
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.kernels.spectrum import eigenvalues
from kspec_guidance.statistics import Comparison, Curve, bandwidth_curve, compare, convergence_curve

__all__ = ["ComparisonReport", "Evaluation", "PromptScore", "compare_sets", "evaluate_set"]

TEST_ROWS = 400  # rows of each set in a permutation test
MODE_ROWS = 1000  # rows of each set in the search for modes that the other set lacks
CURVE_ROWS = 500  # rows in the curve over bandwidths


@dataclass(frozen=True)
class PromptScore:
    """Diversity among the images of one prompt.

    Attributes:
        prompt: text of the prompt.
        images: indices of the images.
        vendi: Vendi score.
    """

    prompt: str
    images: list[int]
    vendi: float

    @property
    def share(self) -> float:
        """Vendi score over the number of images: 1 if all differ."""
        return self.vendi / len(self.images)


@dataclass
class Evaluation:
    """Scores of one set.

    Attributes:
        images: the set.
        embedder: name, fingerprint, input size and width of the embedder.
        scores: scores with their intervals.
        spectrum: the largest 100 eigenvalues of ``K / n``, descending.
        convergence: scores against the number of samples.
        bandwidths: scores against the bandwidth.
        modes: modes, largest first.
        duplicates: near-duplicates, most similar first.
        prompts: scores of prompts, from the least to the most diverse.
        reference: the second set of the scores of fidelity and novelty.
    """

    images: ImageSet
    embedder: dict[str, Any]
    scores: list[ScoreRecord]
    spectrum: list[float]
    convergence: Curve
    bandwidths: Curve
    modes: list[F.Mode]
    duplicates: list[Duplicate]
    prompts: list[PromptScore] = field(default_factory=list)
    reference: ImageSet | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; images and features left out."""
        names = self.images.names
        return {
            **self.images.account(),
            "reference": None if self.reference is None else self.reference.account(),
            "embedder": self.embedder,
            "scores": [s.as_dict() for s in self.scores],
            "modes": [{"share": m.share, "images": [names[i] for i in m.samples]} for m in self.modes],
            "duplicates": [{"images": [names[d.first], names[d.second]], "cosine": d.cosine} for d in self.duplicates],
            "prompts": [{"prompt": p.prompt, "images": len(p.images), "vendi": p.vendi} for p in self.prompts],
            "convergence": asdict(self.convergence),
            "bandwidths": asdict(self.bandwidths),
        }


@dataclass
class ComparisonReport:
    """Comparison of two sets.

    Attributes:
        a, b: evaluation of each set.
        tests: permutation tests of the difference in each score, on equal numbers of images.
        scores: scores of ``a`` with ``b`` as reference.
        only_in_a, only_in_b: modes that are more frequent in one set than in the other.
    """

    a: Evaluation
    b: Evaluation
    tests: dict[str, Comparison]
    scores: list[ScoreRecord]
    only_in_a: list[F.Mode]
    only_in_b: list[F.Mode]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""

        def named(modes: list[F.Mode], images: ImageSet) -> list[dict[str, Any]]:
            return [{"share": m.share, "images": [images.names[i] for i in m.samples]} for m in modes]

        return {
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
            "tests": {k: {**asdict(t), "difference": t.difference} for k, t in self.tests.items()},
            "scores": [s.as_dict() for s in self.scores],
            "only_in_a": named(self.only_in_a, self.a.images),
            "only_in_b": named(self.only_in_b, self.b.images),
        }


def prompt_ranking(x: Tensor, prompts: Sequence[str | None]) -> list[PromptScore]:
    """Prompts with at least two images, from the least to the most diverse per image.

    Args:
        x: unit features ``[n, d]``; compared by one Gaussian kernel at the median distance of all.
        prompts: prompt of each image; images without one (None) are left out.
    """
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        if prompt is None:
            continue
        groups.setdefault(prompt, []).append(i)
    kernel = GaussianKernel(median_bandwidth(x))
    scores = [PromptScore(p, i, float(F.vendi_score(x[i], kernel))) for p, i in groups.items() if len(i) > 1]
    return sorted(scores, key=lambda s: s.share)


def evaluate_set(
    images: ImageSet,
    embedder: ImageEmbedder,
    text_embedder: TextEmbedder | None = None,
    reference: ImageSet | None = None,
    seed: int = 0,
) -> Evaluation:
    """Score one set: diversity, diversity given prompts, and fidelity and novelty against a reference.

    Gaussian kernels use features of norm 1 and the median distance as bandwidth, which the score records contain. Above
    1,500 images they use 1,024 random features, in one pass. Scores given prompts are of the images that have one; their
    records have the number of these images.

    Args:
        images: the set.
        embedder: embedder of its features.
        text_embedder: embedder of its prompts; by default distinct prompts are unrelated.
        reference: a second set.
        seed: seed of random subsets.

    Raises:
        ValueError: for a reference whose features have another width.
    """
    x = l2_normalize(on_host(images.features))
    kernel = GaussianKernel(median_bandwidth(x))
    recorder = ScoreRecorder(len(x), embedder, seed)
    recorder.diversity(x, kernel)
    known = {i: p for i, p in enumerate(images.prompts or []) if p is not None}
    if len(set(known.values())) > 1:
        encoder = text_embedder or one_hot_embedder()
        t, captioned = l2_normalize(on_host(encoder(list(known.values())))), x[list(known)]
        conditional = ScoreRecorder(len(captioned), embedder, seed)
        conditional.conditional(captioned, t, kernel)
        if encoder.name == embedder.name and t.shape[1] == x.shape[1]:
            conditional.add("CLIP score", float(100 * (captioned * t).sum(1).clamp_min(0).mean()), "CosineKernel()")
        recorder.records += conditional.records
    if reference is not None:
        recorder.against(images.features, reference.features)
    if len(x) <= EXACT_ROWS:
        spectrum, modes = eigenvalues(smaller_matrix(x, kernel, None)), F.top_modes(x, kernel, 8, 10)
    else:
        rows = RandomFourierFeatures(kernel, x.shape[1], NUM_FEATURES)(x.float())
        spectrum, modes = eigenvalues(smaller_matrix(x, None, rows)), F.top_modes(x, None, 8, 10, rows)
    subset = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:EXACT_ROWS]]
    about = {"name": embedder.name, "fingerprint": embedder.fingerprint, "input size": embedder.size, "width": x.shape[1]}
    return Evaluation(
        images,
        about,
        recorder.records,
        spectrum.flip(0)[:100].tolist(),
        convergence_curve(subset, kernel, repeats=3, seed=seed),
        bandwidth_curve(subset[:CURVE_ROWS]),
        modes,
        near_duplicates(x),
        [] if images.prompts is None else prompt_ranking(x, images.prompts),
        reference,
    )


def compare_sets(
    a: ImageSet, b: ImageSet, embedder: ImageEmbedder, text_embedder: TextEmbedder | None = None, seed: int = 0
) -> ComparisonReport:
    """Compare two sets: tests on equal numbers of images, modes that are more frequent in one set, and distances.

    Args:
        a: the first set.
        b: the second set.
        embedder: embedder of the features of both.
        text_embedder: see :func:`evaluate_set`.
        seed: seed of the tests.

    Raises:
        ValueError: for sets whose features have different widths.
    """
    x, y = l2_normalize(on_host(a.features)), l2_normalize(on_host(b.features))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the sets have {x.shape[1]} and {y.shape[1]} features per image; embed both with the same model")
    kernel = GaussianKernel(median_bandwidth(torch.cat([_subset(x, EXACT_ROWS), _subset(y, EXACT_ROWS)])))
    tests = {}
    for name, score in {
        "Vendi": lambda z: F.vendi_score(z, kernel),
        "RKE": lambda z: F.rke_score(z, kernel),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tests[name] = compare(
                _subset(x, TEST_ROWS), _subset(y, TEST_ROWS), score, matched=True, permutations=199, seed=seed
            )
    recorder = ScoreRecorder(min(len(x), len(y)), embedder, seed)
    recorder.against(a.features, b.features)
    return ComparisonReport(
        evaluate_set(a, embedder, text_embedder, seed=seed),
        evaluate_set(b, embedder, text_embedder, seed=seed),
        tests,
        recorder.records,
        _novel_modes(x, y, kernel),
        _novel_modes(y, x, kernel),
    )


def _subset(x: Tensor, max_rows: int) -> Tensor:
    """At most ``max_rows`` evenly spaced rows."""
    return x[evenly_spaced(len(x), max_rows)]


def _novel_modes(x: Tensor, reference: Tensor, kernel: GaussianKernel) -> list[F.Mode]:
    """Modes of ``x`` that the reference lacks, from a subset of each set, with indices into ``x``."""
    indices = evenly_spaced(len(x), MODE_ROWS).tolist()
    modes = F.novel_modes(x[indices], _subset(reference, MODE_ROWS), kernel, modes=6)
    return [F.Mode(m.share, [indices[i] for i in m.samples], m.values) for m in modes]
