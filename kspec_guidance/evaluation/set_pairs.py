"""Comparison of two image sets from their features, for `compare`; without files or pages."""

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.comparison import DiversityGap, diversity_gap
from kspec_guidance.evaluation.differences import Difference, novel_modes, split_prompts
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.texts import one_hot_embedder
from kspec_guidance.evaluation.image_sets import ImageSet, by_prompt
from kspec_guidance.evaluation.runs import seeds_of
from kspec_guidance.evaluation.scores import AGREEMENT, EXACT_ROWS, ScoreRecord, ScoreRecorder
from kspec_guidance.evaluation.sets import KERNEL, Evaluation, evaluate_set
from kspec_guidance.evaluation.verdicts import agreement_verdict, compare_verdict, gap_verdict, set_names
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import l2_normalize
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.statistics import Comparison, compare, compare_paired

__all__ = ["ComparisonReport", "SharedKind", "compare_sets"]

TEST_ROWS = 400  # rows of each set in a permutation test
KIND_ROWS = 1500  # rows of each set in the search for kinds that the other set lacks
PROMPTS_TESTED = 6  # shared prompts from which a test over prompts can find a difference
PER_PROMPT = "RKE per prompt"


@dataclass(frozen=True)
class SharedKind:
    """A kind of images that is more frequent in one of two sets.

    Attributes:
        share, share_other: of the set in which it is more frequent, and of the other.
        samples, samples_other: indices of its images in each set, the most typical first.
        p_value: probability of so many more if both sets had it equally often (Fisher's exact test, one-sided).
    """

    share: float
    share_other: float
    samples: list[int]
    samples_other: list[int]
    p_value: float


@dataclass
class ComparisonReport:
    """Comparison of two sets.

    Attributes:
        a, b: evaluation of each set.
        verdict: which set is more varied, by how much, and whether that is sure, in one sentence.
        warnings: what makes the comparison doubtful.
        tests: permutation tests of the difference in each score, on equal numbers of images.
        scores: scores of ``a`` with ``b`` as reference.
        only_in_a, only_in_b: kinds of images that are more frequent in one set than in the other.
        prompts: different images of each shared prompt in ``a`` and in ``b``, among equally many.
        novel_in_a, novel_in_b: modes that one set has more of (KEN).
        split_in_a, split_in_b: prompts of which one set makes something more often than the other (PromptSplit).
        gaps: diversity that ``a`` and ``b`` lack against held-out images, among equally many of all three; empty without.
    """

    a: Evaluation
    b: Evaluation
    verdict: str
    warnings: list[str]
    tests: dict[str, Comparison]
    scores: list[ScoreRecord]
    only_in_a: list[SharedKind]
    only_in_b: list[SharedKind]
    prompts: dict[str, tuple[float, float]]
    novel_in_a: list[Difference]
    novel_in_b: list[Difference]
    split_in_a: list[Difference]
    split_in_b: list[Difference]
    gaps: dict[str, DiversityGap] = field(default_factory=dict)

    @property
    def main_test(self) -> str:
        """The test that the verdict is about."""
        return PER_PROMPT if len(self.prompts) >= PROMPTS_TESTED else "RKE"

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""

        def named(kinds: list[SharedKind], images: ImageSet, other: ImageSet) -> list[dict[str, Any]]:
            return [
                {
                    "share": k.share,
                    "share_other": k.share_other,
                    "images": [images.names[i] for i in k.samples],
                    "images_other": [other.names[i] for i in k.samples_other],
                    "p_value": k.p_value,
                }
                for k in kinds
            ]

        names = self.a.images.names, self.b.images.names
        return {
            "embedder": self.a.embedder,
            "verdict": self.verdict,
            "headline": {"a": asdict(self.a.headline), "b": asdict(self.b.headline)},
            "warnings": self.warnings,
            "a": self.a.as_dict(),
            "b": self.b.as_dict(),
            "tests": {k: {**asdict(t), "difference": t.difference} for k, t in self.tests.items()},
            "scores": [s.as_dict() for s in self.scores],
            "only_in_a": named(self.only_in_a, self.a.images, self.b.images),
            "only_in_b": named(self.only_in_b, self.b.images, self.a.images),
            "prompts": [{"prompt": p, "a": a, "b": b} for p, (a, b) in self.prompts.items()],
            "novel_in_a": [d.as_dict(*names) for d in self.novel_in_a],
            "novel_in_b": [d.as_dict(*names[::-1]) for d in self.novel_in_b],
            "split_in_a": [d.as_dict(*names) for d in self.split_in_a],
            "split_in_b": [d.as_dict(*names[::-1]) for d in self.split_in_b],
            "gaps": {name: asdict(gap) for name, gap in self.gaps.items()},
        }

    def summary(self) -> list[str]:
        """The features, the verdict, the headline of each set, and what makes them doubtful, one sentence each."""
        names = set_names(self.a.images.path, self.b.images.path)
        sets = [f"{name}: {e.verdict}" for name, e in zip(names, (self.a, self.b), strict=True)]
        sets += [gap_verdict(name, gap) for name, gap in zip(names, self.gaps.values(), strict=False)]
        doubtful = list(dict.fromkeys([*self.warnings, *self.a.warnings, *self.b.warnings]))
        doubtful = [f"Read with care: {w}" for w in doubtful]
        return [f"Image features: {self.a.embedder['name']}.", self.verdict, *self.disagreement, *sets, *doubtful]

    @property
    def disagreement(self) -> list[str]:
        """On which prompts the sets surely differ, in one sentence; empty if there are none."""
        prompts = dict.fromkeys(p for d in (*self.split_in_a, *self.split_in_b) if d.sure for p in d.prompts[:1])
        return [f"The sets differ most on: {', '.join(prompts)}."] if prompts else []

    def scalars(self) -> dict[str, float]:
        """All figures by name, for trackers of experiments."""
        sets = {f"{name}/{k}": v for name, e in (("a", self.a), ("b", self.b)) for k, v in e.scalars().items()}
        tests = {f"{name}/{k}": getattr(t, k) for name, t in self.tests.items() for k in ("a", "b", "p_value")}
        gaps = {
            f"{name}/gap of {score}": found.gap.value
            for name, gap in self.gaps.items()
            for score, found in gap.scores.items()
        }
        return {**sets, **tests, **gaps, **{s.score: s.value for s in self.scores}}


def compare_sets(
    a: ImageSet,
    b: ImageSet,
    embedder: ImageEmbedder,
    text_embedder: TextEmbedder | None = None,
    seed: int = 0,
    reference: ImageSet | None = None,
) -> ComparisonReport:
    """Compare two sets: tests on equal numbers of images, what is more frequent in one set, and distances.

    What is more frequent is shown as kinds of images, as modes (KEN), and, where both sets have captions, by the prompts on
    which they disagree (PromptSplit).

    The verdict is about RKE at ``IMAGE_BANDWIDTH``, which also sees variation within a kind: per prompt if the sets share
    at least 6 prompts, else of the whole sets.

    Args:
        a: the first set.
        b: the second set.
        embedder: embedder of the features of both.
        text_embedder: see :func:`evaluate_set`.
        seed: seed of the tests.
        reference: real images that neither model was trained on: how much less diverse than them is each set, by
            :func:`~kspec_guidance.comparison.diversity_gap`? Of at most 400 images of each, as many of all three.

    Raises:
        ValueError: for sets whose features have different widths, or fewer than 8 images in a set with a reference.
    """
    x, y = l2_normalize(on_host(a.features)), l2_normalize(on_host(b.features))
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the sets have {x.shape[1]} and {y.shape[1]} features per image; embed both with the same model")
    gaps = {} if reference is None else _gaps(x, y, l2_normalize(on_host(reference.features)), seed)
    tests = {}
    for name, score in {
        "RKE": lambda z: F.rke_score(z, KERNEL),
        "Vendi": lambda z: F.vendi_score(z, KERNEL),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tests[name] = compare(
                _subset(x, TEST_ROWS), _subset(y, TEST_ROWS), score, matched=True, permutations=199, seed=seed
            )
    prompts = _shared_prompts(x, a.prompts, y, b.prompts)
    if prompts:
        first, second = ([pair[k] for pair in prompts.values()] for k in (0, 1))
        tests[PER_PROMPT] = compare_paired(first, second, seed=seed)
    agreement = _agreement_test(a, b, seed)
    if agreement is not None:
        tests[AGREEMENT] = agreement
    recorder = ScoreRecorder(min(len(x), len(y)), embedder, seed)
    recorder.against(a.features, b.features)
    only_in_a, only_in_b = _unequal_kinds(x, y, embedder.same_distance)
    per_prompt = len(prompts) >= PROMPTS_TESTED
    return ComparisonReport(
        evaluate_set(a, embedder, text_embedder, seed=seed),
        evaluate_set(b, embedder, text_embedder, seed=seed),
        compare_verdict(set_names(a.path, b.path), tests[PER_PROMPT if per_prompt else "RKE"], per_prompt)
        + agreement_verdict(set_names(a.path, b.path), agreement),
        _overlaps(a, b),
        tests,
        recorder.records,
        only_in_a,
        only_in_b,
        prompts,
        *novel_modes(x, y, KERNEL, seed),
        *split_prompts(x, a.prompts, y, b.prompts, text_embedder or one_hot_embedder(), KERNEL, seed),
        gaps,
    )


def _gaps(x: Tensor, y: Tensor, reference: Tensor, seed: int) -> dict[str, DiversityGap]:
    """The gap of each set, of evenly spaced images, as many of each set as the smallest has."""
    n = min(TEST_ROWS, len(x), len(y), len(reference))
    if n < 8:
        sizes = f"{len(x)}, {len(y)} and {len(reference)}"
        raise ValueError(
            f"the gap to held-out images needs at least 8 images in each set, got {sizes}; leave --reference out"
        )
    held_out = _subset(reference, n)
    return {name: diversity_gap(_subset(z, n), held_out, KERNEL, seed=seed) for name, z in (("a", x), ("b", y))}


def _subset(x: Tensor, max_rows: int) -> Tensor:
    """At most ``max_rows`` evenly spaced rows."""
    return x[evenly_spaced(len(x), max_rows)]


def _shared_prompts(
    x: Tensor, prompts: Sequence[str | None] | None, y: Tensor, other: Sequence[str | None] | None
) -> dict[str, tuple[float, float]]:
    """Different images of each prompt that both sets have, among equally many of each."""
    found, groups, others = {}, by_prompt(prompts), by_prompt(other)
    for prompt in groups.keys() & others.keys():
        k = min(len(groups[prompt]), len(others[prompt]))
        parts = (_subset(z[i], k) for z, i in ((x, groups[prompt]), (y, others[prompt])))
        first, second = (float(F.rke_score(part, KERNEL)) for part in parts)
        found[prompt] = first, second
    return dict(sorted(found.items()))


def _agreement_test(a: ImageSet, b: ImageSet, seed: int) -> Comparison | None:
    """Test of the agreement with prompts: of the means of shared prompts, if there are enough, else of all images."""
    if a.agreement is None or b.agreement is None or a.judge is None or b.judge is None or a.judge.name != b.judge.name:
        return None
    means = [
        {p: m for p, i in by_prompt(s.prompts).items() if not math.isnan(m := float(v[i].mean()))}
        for s, v in ((a, a.agreement), (b, b.agreement))
    ]
    shared = sorted(means[0].keys() & means[1].keys())
    if len(shared) >= PROMPTS_TESTED:
        first, second = ([m[p] for p in shared] for m in means)
        return compare_paired(first, second, seed=seed)
    x, y = (_subset(v[v.isfinite()][:, None].double(), EXACT_ROWS) for v in (a.agreement, b.agreement))
    return compare(x, y, torch.mean, permutations=999, seed=seed) if len(x) and len(y) else None


def _overlaps(a: ImageSet, b: ImageSet) -> list[str]:
    """What the sets share, which makes the difference look smaller than it is, or its test too cautious."""
    found = []
    same = len(set(a.digests) & set(b.digests))
    if same:
        found.append(f"{same} image files are in both sets, which makes the sets look more alike.")
    shared = len(seeds_of(a.path) & seeds_of(b.path))
    if shared:
        found.append(
            f"{shared} images of the two sets have the same prompt and seed: they are not independent, so that tests of "
            "the whole sets are too cautious; the test per prompt is not."
        )
    return found


def _unequal_kinds(x: Tensor, y: Tensor, distance: float) -> tuple[list[SharedKind], list[SharedKind]]:
    """Kinds of the union of both sets that are at least twice as frequent in one, with at least two images there."""
    from scipy.stats import hypergeom

    rows = [evenly_spaced(len(z), KIND_ROWS).tolist() for z in (x, y)]
    sizes = [len(r) for r in rows]
    found: tuple[list[SharedKind], list[SharedKind]] = ([], [])
    for kind in F.kinds(torch.cat([x[rows[0]], y[rows[1]]]), distance):
        parts = (
            [rows[0][i] for i in kind.samples if i < sizes[0]],
            [rows[1][i - sizes[0]] for i in kind.samples if i >= sizes[0]],
        )
        shares = [len(p) / n for p, n in zip(parts, sizes, strict=True)]
        for k in (0, 1):
            if len(parts[k]) > 1 and shares[k] >= 2 * shares[1 - k]:
                p = float(hypergeom.sf(len(parts[k]) - 1, sum(sizes), len(kind.samples), sizes[k]))
                found[k].append(SharedKind(shares[k], shares[1 - k], parts[k], parts[1 - k], p))
    for kinds in found:
        kinds.sort(key=lambda kind: (kind.p_value, kind.share_other - kind.share))
    return found
