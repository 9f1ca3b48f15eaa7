"""Comparison of two embedders on one set of images: what one groups and the other does not, both ways."""

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from kspec_guidance.comparison import koda, spec
from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import GaussianKernel, Kernel, l2_normalize
from kspec_guidance.kernels.distances import evenly_spaced

__all__ = ["EmbeddingReport", "Grouping", "SpecMode", "compare_embeddings"]

ROWS = 600  # images that are compared, evenly spaced
DIRECTIONS = 6
EPS = 4.0  # alike images that the other embedder may see in a grouping


@dataclass(frozen=True)
class Grouping:
    """A direction of KODA: images that one embedder holds together, or separates into two groups, and the other does not.

    Attributes:
        alike, alike_other: how many alike images it holds by each embedder: n times its strength.
        coherence, coherence_other: mean similarity along it, in standard deviations of all similarities of the embedder.
        gap: how many alike images the optimum may hold more, by duality.
        first, second: indices of the images on both sides, the strongest first; the second may be empty.
    """

    alike: float
    alike_other: float
    coherence: float
    coherence_other: float
    gap: float
    first: list[int]
    second: list[int]


@dataclass(frozen=True)
class SpecMode:
    """An eigenvector of the difference of the kernel matrices: positive values are grouped more by the first embedder."""

    value: float
    first: list[int]
    second: list[int]


@dataclass
class EmbeddingReport:
    """What two embedders see in one set of images.

    Attributes:
        images: the set.
        a, b: name, fingerprint, input size, width and kernel of each embedder.
        compared: number of images that were compared.
        eps: how many alike images the other embedder may see in a grouping.
        only_a, only_b: what one embedder groups and the other does not.
        stopped_a, stopped_b: why there are no more.
        spec: modes of SPEC, of both signs.
        distance: the largest absolute value of SPEC.
        verdict: how many groupings were found, in one sentence.
    """

    images: ImageSet
    a: dict[str, Any]
    b: dict[str, Any]
    compared: int
    eps: float
    only_a: list[Grouping]
    only_b: list[Grouping]
    stopped_a: str
    stopped_b: str
    spec: list[SpecMode]
    distance: float
    verdict: str

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with the names of images."""

        def named(found: list[Any]) -> list[dict[str, Any]]:
            names = self.images.names
            return [
                {k: v for k, v in asdict(g).items() if k not in ("first", "second")}
                | {"images": [names[i] for i in g.first], "images_opposite": [names[i] for i in g.second]}
                for g in found
            ]

        return {
            "verdict": self.verdict,
            "a": self.a,
            "b": self.b,
            **self.images.account(),
            "compared": self.compared,
            "eps": self.eps,
            "only_a": named(self.only_a),
            "only_b": named(self.only_b),
            "stopped_a": self.stopped_a,
            "stopped_b": self.stopped_b,
            "spec": named(self.spec),
            "distance": self.distance,
        }

    def summary(self) -> list[str]:
        """The embedders, the verdict, and why there are no more groupings, one sentence each."""
        more = [
            f"No further grouping of {about['name']} alone: {why}."
            for about, why in ((self.a, self.stopped_a), (self.b, self.stopped_b))
            if why
        ]
        return [f"A: {self.a['name']}. B: {self.b['name']}.", self.verdict, *more]


def compare_embeddings(
    a: ImageSet,
    b: ImageSet,
    embedder_a: ImageEmbedder,
    embedder_b: ImageEmbedder,
    directions: int = DIRECTIONS,
    eps: float = EPS,
) -> EmbeddingReport:
    """Find what each of two embedders groups in a set of images and the other does not: KODA both ways, and SPEC.

    Kernels are Gaussian on rows of norm 1, with the median distance of each embedder as bandwidth, so that both have
    similarities of one scale. Of more than 600 images, 600 evenly spaced ones are compared.

    Args:
        a: the images with their features by the first embedder.
        b: the same images by the second.
        embedder_a: the first embedder.
        embedder_b: the second.
        directions: number of groupings of each, at most.
        eps: how many alike images the other embedder may see in a grouping.

    Raises:
        ValueError: for sets of different images, fewer than 4 images, or an ``eps`` that no direction meets.
    """
    if a.digests != b.digests:
        raise ValueError(f"two embedders are compared on the same images, got {len(a)} and {len(b)} of different files")
    if len(a) < 4:
        raise ValueError(f"a comparison of embedders needs at least 4 images, got {len(a)}")
    chosen = evenly_spaced(len(a), ROWS)
    rows = [(x, GaussianKernel().fit(x)) for x in (l2_normalize(on_host(s.features))[chosen] for s in (a, b))]
    place = chosen.tolist()

    def grouped(first: tuple[Tensor, Kernel], second: tuple[Tensor, Kernel]) -> tuple[list[Grouping], str]:
        (p, kernel_a), (q, kernel_b) = first, second
        found, n = koda(p, q, directions, eps, kernel_a=kernel_a, kernel_b=kernel_b, rotate=True), len(p)
        return [
            Grouping(
                n * float(found.strength_a[k]), n * float(found.strength_b[k]), float(found.coherence_a[k]),
                float(found.coherence_b[k]), n * float(found.gap[k]), [place[i] for i in found.positive[k]],
                [place[i] for i in found.negative[k]],
            )
            for k in range(len(found))
        ], found.stopped  # fmt: skip

    (only_a, stopped_a), (only_b, stopped_b) = (grouped(*pair) for pair in (rows, rows[::-1]))
    (x, kernel_a), (y, kernel_b) = rows
    both = spec(x, y, kernel_a=kernel_a, kernel_b=kernel_b)
    modes = [
        SpecMode(float(v), [place[i] for i in p], [place[i] for i in q])
        for v, p, q in zip(both.values, both.positive, both.negative, strict=True)
        if v != 0
    ]
    about = [
        {"name": e.name, "fingerprint": e.fingerprint, "input size": e.size, "width": x.shape[1], "kernel": repr(kernel)}
        for e, (x, kernel) in zip((embedder_a, embedder_b), rows, strict=True)
    ]
    verdict = (
        f"A groups the {len(chosen)} images in {_ways(len(only_a))} that B does not see, "
        f"and B in {_ways(len(only_b))} that A does not see."
    )
    return EmbeddingReport(
        a, about[0], about[1], len(chosen), eps, only_a, only_b, stopped_a, stopped_b, modes, both.distance, verdict
    )


def _ways(count: int) -> str:
    return {0: "no way", 1: "one way"}.get(count, f"{count} ways")
