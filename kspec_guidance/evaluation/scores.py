"""Scores of a set of features, each recorded with its interval and the settings that reproduce it."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance import metrics
from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.evaluation.perceptual import SIZES, PairDistance, perceptual_diversity
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import PROMPT_BANDWIDTH, CosineKernel, GaussianKernel, l2_normalize
from kspec_guidance.kernels.distances import evenly_spaced
from kspec_guidance.statistics import jackknife, kid_interval

__all__ = ["AGREEMENT", "EXACT_ROWS", "ScoreRecord", "ScoreRecorder"]

EXACT_ROWS = 1500  # samples up to which scores come from the n x n kernel matrix
STREAM_ROWS = 4096  # samples per update of a streaming metric
NUM_FEATURES = 1024  # random features of a streaming metric
GROUPS = 10  # groups of the jackknife
AGREEMENT = "Prompt agreement"


@dataclass(frozen=True)
class ScoreRecord:
    """A score with the settings that reproduce it.

    Attributes:
        score: name of the score.
        value: value of the score.
        n: number of samples.
        kernel: kernel with its bandwidth.
        order: order of the entropy.
        features: ``exact``, or the random features used.
        seed: seed of the random features.
        embedder, fingerprint: name and fingerprint of the embedder.
        interval: 95% jackknife interval; None if it was not computed, or if the parts of the set do not differ.
    """

    score: str
    value: float
    n: int
    kernel: str
    order: float | None = None
    features: str = "exact"
    seed: int | None = None
    embedder: str | None = None
    fingerprint: str | None = None
    interval: tuple[float, float] | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return asdict(self)


class ScoreRecorder:
    """Computes scores of sets of n samples, and collects their records.

    Args:
        n: number of samples.
        embedder: embedder of the features.
        seed: seed of the jackknife groups.
    """

    def __init__(self, n: int, embedder: ImageEmbedder | None, seed: int):
        self.n, self.seed, self.records = n, seed, list[ScoreRecord]()
        self.name = None if embedder is None else embedder.name
        self.fingerprint = None if embedder is None else embedder.fingerprint

    def add(self, name: str, value: float, kernel: str = "-", bounds: tuple[float, float] | None = None) -> None:
        """Record a given score."""
        self._record(name, value, bounds, kernel, None, "exact", None)

    def _record(self, name: str, value: float, bounds: Any, kernel: str, order: Any, features: str, seed: Any) -> None:
        if bounds is not None and not bounds[1] - bounds[0] > 1e-9 * max(1.0, abs(value)):
            bounds = None
        self.records.append(
            ScoreRecord(name, value, self.n, kernel, order, features, seed, self.name, self.fingerprint, bounds)
        )

    def exact(
        self, name: str, score: Callable[..., Tensor], sets: tuple[Tensor, ...], kernel: str, order: float | None
    ) -> None:
        """Record ``score(*sets)`` with its interval."""
        if self.n >= 8:
            found = jackknife(score, *sets, groups=GROUPS, seed=self.seed)
            value, bounds = found.value, (found.low, found.high)
        else:
            value, bounds = float(score(*sets)), None
        self._record(name, value, bounds, kernel, order, "exact", None)

    def stream(self, name: str, metric: Any, *sets: Tensor) -> None:
        """Record a streaming metric of the sets, with its interval."""
        for start in range(0, self.n, STREAM_ROWS):
            metric.update(*(s[start : start + STREAM_ROWS] for s in sets))
        found, about = metric.interval(), metric.record()
        kernel = " x ".join(str(about[k]) for k in ("kernel", "prompt_kernel") if k in about)
        bounds = found.low, found.high
        self._record(name, found.value, bounds, kernel, about.get("order"), about["features"], about["seed"])

    def diversity(self, x: Tensor, kernel: GaussianKernel) -> None:
        """Vendi and RKE of unit rows ``[n, d]``, by the Gaussian and by the cosine kernel."""
        cosine = CosineKernel()
        if len(x) <= EXACT_ROWS:
            self.exact("Vendi", lambda z: F.vendi_score(z, kernel), (x,), repr(kernel), 1.0)
            self.exact("RKE", lambda z: F.rke_score(z, kernel), (x,), repr(kernel), 2.0)
        else:
            self.stream("Vendi", metrics.VendiScore(kernel, num_features=NUM_FEATURES, groups=GROUPS), x)
            self.stream("RKE", metrics.RKEScore(kernel, num_features=NUM_FEATURES, groups=GROUPS), x)
        if len(x) > 1:
            self.exact("Mean cosine, MSS", F.mean_cosine, (x,), repr(cosine), None)
        self.exact("Vendi, cosine", lambda z: F.vendi_score(z, cosine), (x,), repr(cosine), 1.0)
        self.exact("RKE, cosine", lambda z: F.rke_score(z, cosine), (x,), repr(cosine), 2.0)

    def agreement(self, values: Tensor) -> None:
        """Mean agreement of images and prompts ``[n]``."""
        self.exact(AGREEMENT, torch.mean, (values.double(),), "-", None)

    def perceptual(self, name: str, images: ImageSet, distance: PairDistance) -> None:
        """Mean perceptual distance of two images of a prompt."""
        found = perceptual_diversity(images, distance, SIZES.get(name, 256))
        if found is not None:
            interval, pairs = found
            title = f"{name}, mean of {pairs} pairs of one prompt"
            self._record(title, interval.value, (interval.low, interval.high), "-", None, "exact", None)

    def conditional(self, x: Tensor, t: Tensor, kernel: GaussianKernel) -> None:
        """Scores of unit rows ``[n, d]`` given unit prompt features ``[n, p]``."""
        prompt_kernel = GaussianKernel(PROMPT_BANDWIDTH)
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
            if len(x) <= EXACT_ROWS:
                self.exact(
                    name, lambda z, s, score=score: score(z, s, kernel, prompt_kernel), (x, t),
                    f"{kernel} x {prompt_kernel}", order,
                )  # fmt: skip
            else:
                self.stream(name, streams[name](kernel, prompt_kernel, num_features=NUM_FEATURES, groups=GROUPS), x, t)
        if t.shape[1] < len(x):
            if x.shape[1] > len(x):  # coordinates in the span of the rows: the same inner products, smaller matrices
                x = torch.linalg.qr(x.mT).R.mT
            self.exact("Scendi, images' own part", F.scendi_score, (x, t), "CosineKernel()", 1.0)
            self.exact("Scendi, prompts' part", F.prompt_vendi_score, (x, t), "CosineKernel()", 1.0)

    def against(self, features: Tensor, reference: Tensor) -> None:
        """Fidelity to, and novelty against, reference features ``[m, d]``.

        Raises:
            ValueError: for features of different width.
        """
        x, y = on_host(features), on_host(reference)
        if x.shape[1] != y.shape[1]:
            raise ValueError(
                f"the reference has {y.shape[1]} features per image, the set {x.shape[1]}; embed both with the same model"
            )
        smaller = min(len(x), len(y))
        if smaller > 5:
            f = F.fidelity_scores(x, y)
            for name in ("frechet_distance", "precision", "recall", "density", "coverage"):
                self.add(name.replace("_", " ").capitalize(), getattr(f, name))
        if smaller > 3:
            found = kid_interval(x, y)
            self.add("KID", found.value, "PolynomialKernel()", (found.low, found.high))
        elif smaller > 1:
            self.add("KID", float(F.mmd(x, y)), "PolynomialKernel()")
        a, b = (l2_normalize(z[evenly_spaced(len(z), EXACT_ROWS)]) for z in (x, y))
        self.add("KEN, novelty against the reference", float(F.ken_score(a, b)), "CosineKernel()")
        self.add("KEN, what the reference has more of", float(F.ken_score(b, a)), "CosineKernel()")
