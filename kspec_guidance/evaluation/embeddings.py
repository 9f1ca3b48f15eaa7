"""Comparison of two embedders on one set of images: what one groups and the other does not, both ways."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kspec_guidance.comparison import koda, spec
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.texts import one_hot_embedder
from kspec_guidance.evaluation.image_sets import ImageSet
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel, l2_normalize
from kspec_guidance.kernels.distances import evenly_spaced

__all__ = ["EmbeddingReport", "Grouping", "JointGroupings", "SpecMode", "compare_embeddings"]

ROWS = 600  # images that are compared, evenly spaced
LEAST_IMAGES = 4  # that a grouping must hold
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
        modality: of images with their prompts: ``image``, ``text`` or ``joint``, where the first embedder sees it and the
            other does not; empty for images alone.
    """

    alike: float
    alike_other: float
    coherence: float
    coherence_other: float
    gap: float
    first: list[int]
    second: list[int]
    modality: str = ""


@dataclass(frozen=True)
class SpecMode:
    """An eigenvector of the difference of the kernel matrices: positive values are grouped more by the first embedder.

    Of images with their prompts, ``modality`` is as of :class:`Grouping`.
    """

    value: float
    first: list[int]
    second: list[int]
    modality: str = ""


@dataclass(frozen=True)
class JointGroupings:
    """What two pairs of embedders see in images with their prompts.

    Attributes:
        text_a, text_b: names of the embedders of prompts.
        compared: number of images with a caption that were compared.
        only_a, only_b: what one pair groups and the other does not.
        stopped_a, stopped_b: why there are no more.
        spec: modes of SPEC, of both signs.
        distance: the largest absolute value of SPEC.
    """

    text_a: str
    text_b: str
    compared: int
    only_a: list[Grouping]
    only_b: list[Grouping]
    stopped_a: str
    stopped_b: str
    spec: list[SpecMode]
    distance: float


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
        joint: the same for images with their prompts; None if there are fewer than two prompts.
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
    joint: JointGroupings | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON, with the names of images."""

        def named(found: list[Any]) -> list[dict[str, Any]]:
            names = self.images.names
            return [
                {k: v for k, v in asdict(g).items() if k not in ("first", "second")}
                | {"images": [names[i] for i in g.first], "images_opposite": [names[i] for i in g.second]}
                for g in found
            ]

        joint = None if self.joint is None else asdict(self.joint)
        if self.joint is not None and joint is not None:
            joint |= {
                "only_a": named(self.joint.only_a),
                "only_b": named(self.joint.only_b),
                "spec": named(self.joint.spec),
            }
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
            "joint": joint,
        }

    def summary(self) -> list[str]:
        """The embedders, the verdict, and why there are no more groupings, one sentence each."""
        more = [
            f"No further grouping of {about['name']} alone: {why}."
            for about, why in ((self.a, self.stopped_a), (self.b, self.stopped_b))
            if why
        ]
        if self.joint is not None:
            more.append(
                f"With prompts, A groups {self.joint.compared} images in {_ways(self.joint.only_a)} that B does "
                f"not see, and B in {_ways(self.joint.only_b)} that A does not see."
            )
        return [f"A: {self.a['name']}. B: {self.b['name']}.", self.verdict, *more]


def compare_embeddings(
    a: ImageSet,
    b: ImageSet,
    embedder_a: ImageEmbedder,
    embedder_b: ImageEmbedder,
    directions: int = DIRECTIONS,
    eps: float = EPS,
    text_embedders: tuple[TextEmbedder, TextEmbedder] | None = None,
) -> EmbeddingReport:
    """Find what each of two embedders groups in a set of images and the other does not: KODA both ways, and SPEC.

    Kernels are Gaussian on rows of norm 1, with the median distance of each embedder as bandwidth, so that both have
    similarities of one scale. Of more than 600 images, 600 evenly spaced ones are compared.

    If the images have two or more prompts, those with a caption are compared as pairs of image and prompt too: their kernel
    is the product of both, and each grouping is named by the modality in which it is seen.

    Args:
        a: the images with their features by the first embedder.
        b: the same images by the second.
        embedder_a: the first embedder.
        embedder_b: the second.
        directions: number of groupings of each, at most.
        eps: how many alike images the other embedder may see in a grouping.
        text_embedders: of the prompts, one beside each embedder; by default distinct prompts are unrelated.

    Raises:
        ValueError: for sets of different images, fewer than 4 images, or an ``eps`` that no direction meets.
    """
    if a.digests != b.digests:
        raise ValueError(f"two embedders are compared on the same images, got {len(a)} and {len(b)} of different files")
    if len(a) < LEAST_IMAGES:
        raise ValueError(f"a comparison of embedders needs at least {LEAST_IMAGES} images, got {len(a)}")
    features = [l2_normalize(on_host(s.features)) for s in (a, b)]
    chosen = evenly_spaced(len(a), ROWS)
    rows = [(x[chosen], GaussianKernel().fit(x[chosen])) for x in features]
    place = chosen.tolist()
    sides = [Side({"": x}, {"": kernel}) for x, kernel in rows]
    (only_a, stopped_a), (only_b, stopped_b) = _both_ways(sides, place, directions, eps)
    modes, distance = _differences(sides, place)
    about = [
        {"name": e.name, "fingerprint": e.fingerprint, "input size": e.size, "width": x.shape[1], "kernel": repr(kernel)}
        for e, (x, kernel) in zip((embedder_a, embedder_b), rows, strict=True)
    ]
    verdict = (
        f"A groups the {len(chosen)} images in {_ways(only_a)} that B does not see, "
        f"and B in {_ways(only_b)} that A does not see."
    )
    texts = text_embedders or (one_hot_embedder(), one_hot_embedder())
    return EmbeddingReport(
        a, about[0], about[1], len(chosen), eps, only_a, only_b, stopped_a, stopped_b, modes, distance, verdict,
        _joint(features, a.prompts or [], texts, directions, eps),
    )  # fmt: skip


class Side(NamedTuple):
    """Rows and kernels of one embedder, by modality."""

    rows: dict[str, Tensor]
    kernels: dict[str, Kernel]


Found = tuple[list[Grouping], str]


def _both_ways(sides: list[Side], place: list[int], directions: int, eps: float) -> tuple[Found, Found]:
    """What each side groups and the other does not, and why there is no more; ``place`` are the indices of the images."""

    def grouped(first: Side, second: Side) -> Found:
        found = koda(first.rows, second.rows, directions, eps, kernel_a=first.kernels, kernel_b=second.kernels, rotate=True)
        n = len(place)
        return [
            Grouping(
                n * float(found.strength_a[k]), n * float(found.strength_b[k]), float(found.coherence_a[k]),
                float(found.coherence_b[k]), n * float(found.gap[k]), [place[i] for i in found.positive[k]],
                [place[i] for i in found.negative[k]], found.modality[k] if found.modality else "",
            )
            for k in range(len(found))
        ], found.stopped  # fmt: skip

    return grouped(*sides), grouped(*sides[::-1])


def _differences(sides: list[Side], place: list[int]) -> tuple[list[SpecMode], float]:
    """Modes of SPEC that are not 0, and its distance."""
    first, second = sides
    found = spec(first.rows, second.rows, kernel_a=first.kernels, kernel_b=second.kernels)
    modes = zip(found.values, found.positive, found.negative, found.modality or [""] * len(found.values), strict=True)
    return [
        SpecMode(float(v), [place[i] for i in p], [place[i] for i in q], name) for v, p, q, name in modes if v != 0
    ], found.distance


def _joint(
    features: list[Tensor],
    prompts: Sequence[str | None],
    embedders: tuple[TextEmbedder, TextEmbedder],
    directions: int,
    eps: float,
) -> JointGroupings | None:
    known = [i for i, p in enumerate(prompts) if p is not None]
    chosen = torch.tensor(known)[evenly_spaced(len(known), ROWS)] if known else torch.tensor([], dtype=torch.long)
    place = chosen.tolist()
    texts = [str(prompts[i]) for i in place]
    if len(place) < LEAST_IMAGES or len(set(texts)) < 2:
        return None
    sides: list[Side] = []
    for x, embedder in zip(features, embedders, strict=True):
        image, text = x[chosen], l2_normalize(on_host(embedder(texts)))
        kernels = {"image": GaussianKernel().fit(image), "text": GaussianKernel(PROMPT_BANDWIDTH)}
        sides.append(Side({"image": image, "text": text}, dict(kernels)))
    (only_a, stopped_a), (only_b, stopped_b) = _both_ways(sides, place, directions, eps)
    modes, distance = _differences(sides, place)
    return JointGroupings(
        embedders[0].name, embedders[1].name, len(place), only_a, only_b, stopped_a, stopped_b, modes, distance
    )


def _ways(found: Sequence[Grouping]) -> str:
    return {0: "no way", 1: "one way"}.get(len(found), f"{len(found)} ways")
