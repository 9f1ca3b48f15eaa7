"""Everything that `evaluate` and `compare` report, computed from features; no files, no pages."""

import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance import metrics
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.functional.inputs import smaller_matrix
from kspec_guidance.kernels import CosineKernel, GaussianKernel, l2_normalize, median_bandwidth
from kspec_guidance.kernels.spectrum import eigenvalues
from kspec_guidance.statistics import Comparison, Curve, ScoreRecord, bandwidth_curve, compare, convergence_curve, jackknife

__all__ = ["ComparisonReport", "Duplicate", "Evaluation", "PromptScore", "compare_sets", "evaluate_set"]

EXACT = 1500  # samples up to which scores come from the n x n kernel matrix
GROUPS = 10  # of the jackknife
PROMPT_BANDWIDTH = 0.35  # of unit-norm prompt features, as in guidance


@dataclass(frozen=True)
class Duplicate:
    """Two images and the cosine of their features."""

    first: int
    second: int
    cosine: float


@dataclass(frozen=True)
class PromptScore:
    """Variety among the images of one prompt."""

    prompt: str
    images: list[int]
    vendi: float

    @property
    def share(self) -> float:
        """Vendi score over the number of images: 1 if all differ."""
        return self.vendi / len(self.images)


@dataclass
class Evaluation:
    """One set, scored."""

    images: ImageSet
    embedder: dict[str, Any]
    scores: list[ScoreRecord]
    spectrum: list[float]
    convergence: Curve
    bandwidths: Curve
    modes: list[F.Mode]
    duplicates: list[Duplicate]
    prompts: list[PromptScore] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; pictures and features left out."""
        names = self.images.names
        return {
            "path": str(self.images.path),
            "images": len(self.images),
            "skipped": self.images.skipped,
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
    """Two sets, scored together on as many images of each."""

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


def unit(x: Tensor) -> Tensor:
    return l2_normalize(x.double())


class _Recorder:
    """Scores with intervals, each with what is needed to repeat it."""

    def __init__(self, n: int, embedder: ImageEmbedder | None, seed: int):
        self.n, self.seed, self.records = n, seed, list[ScoreRecord]()
        self.name = None if embedder is None else embedder.name
        self.fingerprint = None if embedder is None else embedder.fingerprint

    def exact(
        self, name: str, score: Callable[..., Tensor], sets: tuple[Tensor, ...], kernel: str, order: float | None
    ) -> None:
        if self.n >= 8:
            found = jackknife(score, *sets, groups=GROUPS, seed=self.seed)
            value, bounds = found.value, (found.low, found.high)
        else:
            value, bounds = float(score(*sets)), None
        self._add(name, value, bounds, kernel, order, "exact", None)

    def stream(self, name: str, metric: metrics.VendiScore | metrics.ConditionalVendiScore | Any, *sets: Tensor) -> None:
        for start in range(0, self.n, 4096):
            metric.update(*(s[start : start + 4096] for s in sets))
        found, about = metric.interval(), metric.record()
        kernel = " x ".join(str(about[k]) for k in ("kernel", "prompt_kernel") if k in about)
        self._add(name, found.value, (found.low, found.high), kernel, about.get("order"), about["features"], about["seed"])

    def plain(self, name: str, value: float, kernel: str = "-", bounds: tuple[float, float] | None = None) -> None:
        self._add(name, value, bounds, kernel, None, "exact", None)

    def _add(self, name: str, value: float, bounds: Any, kernel: str, order: Any, features: str, seed: Any) -> None:
        self.records.append(
            ScoreRecord(name, value, self.n, kernel, order, features, seed, self.name, self.fingerprint, bounds)
        )


def _diversity(record: _Recorder, x: Tensor, kernel: GaussianKernel) -> None:
    cosine = CosineKernel()
    if len(x) <= EXACT:
        record.exact("Vendi", lambda z: F.vendi_score(z, kernel), (x,), repr(kernel), 1.0)
        record.exact("RKE", lambda z: F.rke_score(z, kernel), (x,), repr(kernel), 2.0)
    else:
        record.stream("Vendi", metrics.VendiScore(kernel, num_features=1024, groups=GROUPS), x)
        record.stream("RKE", metrics.RKEScore(kernel, num_features=1024, groups=GROUPS), x)
    record.exact("Vendi, cosine", lambda z: F.vendi_score(z, cosine), (x,), repr(cosine), 1.0)
    record.exact("RKE, cosine", lambda z: F.rke_score(z, cosine), (x,), repr(cosine), 2.0)


def _conditional(record: _Recorder, x: Tensor, t: Tensor, kernel: GaussianKernel) -> None:
    kt = GaussianKernel(PROMPT_BANDWIDTH)
    both = f"{kernel} x {kt}"
    exact = {
        "Conditional-Vendi": (F.conditional_vendi_score, 1.0),
        "Information-Vendi": (F.information_vendi_score, 1.0),
        "Conditional RKE": (F.conditional_rke_score, 2.0),
    }
    streams = {
        "Conditional-Vendi": metrics.ConditionalVendiScore,
        "Information-Vendi": metrics.InformationVendiScore,
        "Conditional RKE": metrics.ConditionalRKEScore,
    }
    for name, (score, order) in exact.items():
        if len(x) <= EXACT:
            record.exact(name, lambda z, s, score=score: score(z, s, kernel, kt), (x, t), both, order)
        else:
            record.stream(name, streams[name](kernel, kt, num_features=1024, groups=GROUPS), x, t)
    if t.shape[1] < len(x):
        record.exact("Scendi, images' own part", F.scendi_score, (x, t), "CosineKernel()", 1.0)
        record.exact("Scendi, prompts' part", F.prompt_vendi_score, (x, t), "CosineKernel()", 1.0)


def near_duplicates(x: Tensor, pairs: int = 12, at_least: float = 0.9) -> list[Duplicate]:
    """The pairs of rows with the largest cosines, most alike first."""
    u, found = unit(x), []
    for start in range(0, len(u), 1024):
        block = u[start : start + 1024] @ u.T
        i = torch.arange(start, start + len(block))[:, None]
        block = block.masked_fill(torch.arange(len(u))[None] <= i, -1.0)
        values, places = block.flatten().topk(min(pairs, block.numel()))
        rows, columns = places // len(u) + start, places % len(u)
        found += [
            Duplicate(a, b, v)
            for a, b, v in zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)
            if v >= at_least
        ]
    return sorted(found, key=lambda d: -d.cosine)[:pairs]


def prompt_ranking(x: Tensor, prompts: list[str]) -> list[PromptScore]:
    """Prompts with two images and more, from the least to the most varied per image (cosine kernel)."""
    groups: dict[str, list[int]] = {}
    for i, p in enumerate(prompts):
        groups.setdefault(p, []).append(i)
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

    Gaussian kernels work on features of norm 1 and take the median rule; the record of each score says the bandwidth. Above
    1,500 images they go by 1,024 random features, in one pass.

    Raises:
        ValueError: for a reference embedded with another model.
    """
    x = unit(images.features)
    kernel = GaussianKernel(median_bandwidth(x))
    record = _Recorder(len(x), embedder, seed)
    _diversity(record, x, kernel)
    ranking = []
    if images.prompts is not None and len(set(images.prompts)) > 1:
        from kspec_guidance.evaluation.embedders.texts import one_hot_embedder

        encoder = text_embedder or one_hot_embedder()
        t = unit(encoder(images.prompts))
        _conditional(record, x, t, kernel)
        if encoder.name == embedder.name and t.shape[1] == x.shape[1]:
            record.plain("CLIP score", float(100 * (x * t).sum(1).clamp_min(0).mean()), "CosineKernel()")
    if images.prompts is not None:
        ranking = prompt_ranking(x, images.prompts)
    if reference is not None:
        _against(record, images.features, reference.features)
    if len(x) <= EXACT:
        spectrum, modes = eigenvalues(smaller_matrix(x, kernel, None)), F.top_modes(x, kernel, 8, 10)
    else:
        phi = RandomFourierFeatures(kernel, x.shape[1], 1024)
        rows = phi(x.float())
        spectrum, modes = eigenvalues(smaller_matrix(x, None, rows)), F.top_modes(x, None, 8, 10, rows)
    some = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))[:EXACT]]
    about = {"name": embedder.name, "fingerprint": embedder.fingerprint, "input size": embedder.size, "width": x.shape[1]}
    return Evaluation(
        images,
        about,
        record.records,
        spectrum.flip(0)[:100].tolist(),
        convergence_curve(some, kernel, repeats=3, seed=seed),
        bandwidth_curve(some[:500]),
        modes,
        near_duplicates(x),
        ranking,
    )


def _against(record: _Recorder, features: Tensor, reference: Tensor) -> None:
    x, y = features.double(), reference.double()
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the reference has {y.shape[1]} features per image, the set {x.shape[1]}; embed both alike")
    if min(len(x), len(y)) > 5:
        f = F.fidelity(x, y)
        for name in ("frechet_distance", "precision", "recall", "density", "coverage"):
            record.plain(name.replace("_", " ").capitalize(), getattr(f, name))
    if min(len(x), len(y)) > 1:
        mean, deviation = F.kid(x, y, subset_size=min(len(x), len(y), 500), subsets=50)
        bounds = (float(mean - 2 * deviation), float(mean + 2 * deviation))
        record.plain("KID", float(mean), "PolynomialKernel()", bounds)
    a, b = _few(unit(x)), _few(unit(y))
    record.plain("KEN, novelty against the reference", float(F.ken_score(a, b)), "CosineKernel()")
    record.plain("KEN, what the reference has more of", float(F.ken_score(b, a)), "CosineKernel()")


def _few(x: Tensor, most: int = EXACT) -> Tensor:
    """At most so many rows, evenly spaced."""
    return x if len(x) <= most else x[torch.linspace(0, len(x) - 1, most).round().long()]


def compare_sets(
    a: ImageSet, b: ImageSet, embedder: ImageEmbedder, text_embedder: TextEmbedder | None = None, seed: int = 0
) -> ComparisonReport:
    """Do two sets differ, and in what? Tests on equally many images of each, novel modes both ways, distances.

    Raises:
        ValueError: for sets embedded with different models.
    """
    x, y = unit(a.features), unit(b.features)
    if x.shape[1] != y.shape[1]:
        raise ValueError(f"the sets have {x.shape[1]} and {y.shape[1]} features per image; embed both alike")
    kernel = GaussianKernel(median_bandwidth(torch.cat([_few(x), _few(y)])))
    few_x, few_y = _few(x, 400), _few(y, 400)
    tests = {}
    for name, score in {
        "Vendi": lambda z: F.vendi_score(z, kernel),
        "RKE": lambda z: F.rke_score(z, kernel),
    }.items():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            tests[name] = compare(few_x, few_y, score, matched=True, permutations=199, seed=seed)
    record = _Recorder(min(len(x), len(y)), embedder, seed)
    _against(record, a.features, b.features)
    ex, ey = _few(x, 1000), _few(y, 1000)
    only_a = _renumber(F.novel_modes(ex, ey, kernel, modes=6), len(x), len(ex))
    only_b = _renumber(F.novel_modes(ey, ex, kernel, modes=6), len(y), len(ey))
    return ComparisonReport(
        evaluate_set(a, embedder, text_embedder, seed=seed),
        evaluate_set(b, embedder, text_embedder, seed=seed),
        tests,
        record.records,
        only_a,
        only_b,
    )


def _renumber(modes: list[F.Mode], n: int, few: int) -> list[F.Mode]:
    """Places among the few rows as places among all."""
    if few == n:
        return modes
    place = torch.linspace(0, n - 1, few).round().long().tolist()
    return [F.Mode(m.share, [place[i] for i in m.samples], m.values) for m in modes]
