"""Scores of a comparison: diversity in features that no method optimised, agreement with prompts, preference, realism.

A score is a :class:`Metric`: its name, what it stands for, and a function that loads what it needs. Packages and networks
of others are optional. One that is absent raises :class:`~kspec_guidance.bench.resources.Unavailable` with the reason.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.bench import elsewhere
from kspec_guidance.bench.elsewhere import INSTALL, SCORERS
from kspec_guidance.bench.resources import Resources, Sample, Unavailable, package
from kspec_guidance.demo import load_demo_judge
from kspec_guidance.evaluation.embedders.cache import LazyImages
from kspec_guidance.evaluation.perceptual import SIZES, mean_distance, pair_distance
from kspec_guidance.kernels import IMAGE_BANDWIDTH, PROMPT_BANDWIDTH, GaussianKernel, l2_normalize
from kspec_guidance.utils.images import to_pixels

__all__ = ["ASPECTS", "METRICS", "NEAREST", "Measure", "Metric"]

ASPECTS = ("diversity", "agreement", "preference", "realism")
UNITS = ("image", "prompt", "set")
NEAREST = 5  # neighbours of precision, recall, density and coverage
SET_IMAGES = 2000  # of scores by a kernel matrix of all images
DISTANCE = 0.05  # relative increase of a distance that still counts as equal

Measure = Callable[[Sequence[Sample]], Tensor]


@dataclass(frozen=True)
class Metric:
    """A score of a method's images.

    Attributes:
        name: key in ``results.json``.
        title: for tables.
        aspect: one of ``ASPECTS``.
        unit: what one value is of: an ``image``, the images of a ``prompt``, or all images, the ``set``.
        load: loads what is needed, and returns the function that measures: images of one prompt to ``[n]`` or ``[]``, or
            all images to ``[]``. NaN stands for unknown.
        features: name of the embedder whose features it uses, see :class:`Resources`; "" for none.
        higher: whether larger is better.
        tolerance: loss of quality that still counts as equal.
        relative: whether the tolerance is a share of plain sampling's value.
        most: images that a score of a set takes at most, of evenly spaced prompts; 0 for all.
        prompts: whether it uses features of the prompts.
        reference: whether it compares with real images.
        bounds: least and largest possible value.
        about: what it is, in a sentence part.

    Raises:
        ValueError: for a score of quality without a tolerance, or an unknown aspect or unit.
    """

    name: str
    title: str
    aspect: str
    unit: str
    load: Callable[[Resources], Measure]
    features: str = ""
    higher: bool = True
    tolerance: float = 0.0
    relative: bool = False
    most: int = 0
    prompts: bool = False
    reference: bool = False
    bounds: tuple[float, float] = (-math.inf, math.inf)
    about: str = ""

    def __post_init__(self) -> None:
        if self.aspect not in ASPECTS or self.unit not in UNITS:
            raise ValueError(f"{self.name}: aspect must be one of {ASPECTS} and unit one of {UNITS}")
        if self.aspect != "diversity" and not self.tolerance > 0:
            raise ValueError(f"{self.name}: a score of quality needs a tolerance, the loss that still counts as equal")


def _of_rows(features: str, score: Callable[[Tensor], Tensor]) -> Callable[[Resources], Measure]:
    """A score of unit rows."""

    def load(r: Resources) -> Measure:
        return lambda samples: score(l2_normalize(r.rows(features, [s.path for s in samples]).double()))

    return load


def _distance_of_pairs(name: str) -> Callable[[Resources], Measure]:
    def load(r: Resources) -> Measure:
        try:
            distance = pair_distance(name, r.device)
        except ImportError as error:
            raise Unavailable(str(error)) from error
        size = SIZES[name]

        def measure(samples: Sequence[Sample]) -> Tensor:
            return mean_distance(distance, (255 * _pixels(samples, size)).round().to(torch.uint8))

        return measure

    return load


def _pixels(samples: Sequence[Sample], size: int | None = None) -> Tensor:
    """Pixels ``[n, 3, h, w]`` in 0..1, of the size of the first image by default."""
    images = LazyImages([s.path for s in samples])
    return to_pixels(images, images[0].size[::-1] if size is None else size)


def _given_prompts(score: Callable[..., Tensor]) -> Callable[[Resources], Measure]:
    kernels = GaussianKernel(IMAGE_BANDWIDTH), GaussianKernel(PROMPT_BANDWIDTH)

    def load(r: Resources) -> Measure:
        def measure(samples: Sequence[Sample]) -> Tensor:
            x = r.rows("own", [s.path for s in samples]).double()
            return score(l2_normalize(x), l2_normalize(r.prompt_rows(samples).double()), *kernels)

        return measure

    return load


def _scendi(r: Resources) -> Measure:
    def measure(samples: Sequence[Sample]) -> Tensor:
        x, t = r.rows("own", [s.path for s in samples]).double(), r.prompt_rows(samples).double()
        if t.shape[1] >= len(x):
            raise Unavailable(f"needs more images than the {t.shape[1]} features of a prompt; there are {len(x)}")
        return F.scendi_score(l2_normalize(x), l2_normalize(t))

    return measure


def _judged(name: str, scale: float = 1.0) -> Callable[[Resources], Measure]:
    """Agreement of images with their prompts, in 0..100 times ``scale``."""

    def load(r: Resources) -> Measure:
        judge = r.judge(name)
        return lambda samples: scale * judge.agreement(r.rows(name, [s.path for s in samples]), [s.prompt for s in samples])

    return load


def _on_data(r: Resources) -> Measure:
    r.judge("demo")
    judge = load_demo_judge()
    return lambda samples: 100 * judge.probabilities(r.rows("demo", [s.path for s in samples])).amax(1)


def _elsewhere(name: str) -> Callable[[Resources], Measure]:
    """A score of another environment: its values if there are any, else measured here if its package is installed."""

    def load(r: Resources) -> Measure:
        given = r.given(name)
        if given:
            return lambda samples: torch.tensor([_value(given, s.path, name) for s in samples])
        try:
            score = SCORERS[name](r.device)
        except ModuleNotFoundError as error:
            raise Unavailable(
                f"{INSTALL[name]} asks for other versions: install it in an environment of its own, and run there "
                f"{Path(elsewhere.__file__).name} OUT {name} ({error})"
            ) from error
        return lambda samples: torch.tensor(score([str(s.path) for s in samples], samples[0].prompt))

    return load


def _value(given: Mapping[Path, float], path: Path, name: str) -> float:
    if path not in given:
        raise Unavailable(f"{path.name} and maybe other images have no value yet; run elsewhere.py again for {name}")
    return given[path]


def _aesthetic(r: Resources) -> Measure:
    model = package("pyiqa").create_metric("laion_aes", device=torch.device(r.device))
    return lambda samples: model(_pixels(samples).to(r.device)).detach().float().cpu().reshape(-1)


def _against(features: str, score: Callable[[Tensor, Tensor], Any]) -> Callable[[Resources], Measure]:
    """A score of rows, as they are, and those of the reference."""

    def load(r: Resources) -> Measure:
        def measure(samples: Sequence[Sample]) -> Tensor:
            x, y = r.rows(features, [s.path for s in samples]), r.rows(features, r.reference)
            return torch.as_tensor(score(x.double(), y.double()))

        return measure

    return load


def _neighbours(field: str) -> Callable[[Resources], Measure]:
    """One of four scores against the reference that are computed together."""

    def load(r: Resources) -> Measure:
        def measure(samples: Sequence[Sample]) -> Tensor:
            paths = tuple(s.path for s in samples)
            if min(len(paths), len(r.reference)) <= NEAREST:
                raise Unavailable(
                    f"needs more than {NEAREST} images and real images, got {len(paths)} and {len(r.reference)}"
                )
            found = r.shared(
                ("neighbours", paths),
                lambda: F.neighbour_scores(r.rows("own", paths), r.rows("own", r.reference), NEAREST),
            )
            return torch.tensor(getattr(found, field))

        return measure

    return load


def _attributes(r: Resources) -> Measure:
    judge = r.judge("judge")

    def values(samples: Sequence[Sample]) -> Tensor:
        """By the values of the attributes that the source of a prompt states: what an image is most like."""
        lists, x = attribute_values(samples[0].truth), r.rows("judge", [s.path for s in samples])
        shares = []
        for values in lists:
            texts = [f"{samples[0].prompt}, {value}" for value in values]
            agreement = torch.stack([judge.agreement(x, [text] * len(x)) for text in texts], 1)
            shares.append(len(set(agreement.argmax(1).tolist())) / min(len(x), len(values)))
        return torch.tensor(sum(shares) / len(shares) if shares else torch.nan)

    def kinds(samples: Sequence[Sample]) -> Tensor:
        """By the emoji that a prompt may describe."""
        emoji = load_demo_judge()
        described = emoji.described(samples[0].prompt)
        if not described.any():
            return torch.tensor(torch.nan)
        shown = emoji.probabilities(r.rows("judge", [s.path for s in samples])).argmax(1)
        return torch.tensor(len(set(shown[described[shown]].tolist())) / min(len(samples), int(described.sum())))

    return kinds if r.demo else values


def attribute_values(truth: Mapping[str, Any]) -> list[list[str]]:
    """The values of each attribute that the truth of a prompt states, from a mapping of names to values, or one list."""
    found = truth.get("attributes") or {}
    lists = list(found.values()) if isinstance(found, Mapping) else [found]
    return [[str(v) for v in values] for values in lists if isinstance(values, list | tuple) and len(values) > 1]


_METRICS = [
    Metric("vendi", "Vendi", "diversity", "prompt", _of_rows("own", F.vendi_score), "own",
           about="effective number of different images of a prompt, cosine kernel"),
    Metric("mss", "MSS", "diversity", "prompt", _of_rows("own", F.mean_cosine), "own", higher=False,
           about="mean pairwise similarity of the images of a prompt"),
    Metric("lpips", "LPIPS", "diversity", "prompt", _distance_of_pairs("lpips"),
           about="mean perceptual distance of two images of a prompt, AlexNet"),
    Metric("dreamsim", "DreamSim", "diversity", "prompt", _distance_of_pairs("dreamsim"),
           about="mean perceptual distance of two images of a prompt, DreamSim's ensemble"),
    Metric("dino_pairwise", "DINOv2 pairwise", "diversity", "prompt",
           _of_rows("dinov2", lambda x: 1 - F.mean_cosine(x)), "dinov2",
           about="one less the mean cosine of two images of a prompt, DINOv2 ViT-L/14"),
    Metric("attribute_coverage", "attribute coverage", "diversity", "prompt", _attributes, "judge", bounds=(0, 1),
           about="share of the kinds that the images of a prompt could show and do"),
    Metric("conditional_vendi", "Conditional-Vendi", "diversity", "set", _given_prompts(F.conditional_vendi_score), "own",
           most=SET_IMAGES, prompts=True,
           about="effective number of different images given their prompts"),
    Metric("conditional_rke", "Conditional RKE", "diversity", "set", _given_prompts(F.conditional_rke_score), "own",
           most=SET_IMAGES, prompts=True,
           about="the same of order 2, what SPARKE maximises in its own features"),
    Metric("vendi_set", "Vendi, all images", "diversity", "set",
           _of_rows("own", lambda x: F.vendi_score(x, GaussianKernel(IMAGE_BANDWIDTH))), "own", most=SET_IMAGES,
           about="effective number of different images of all prompts together"),
    Metric("scendi", "Scendi", "diversity", "set", _scendi, "own", most=SET_IMAGES, prompts=True,
           about="diversity that the prompts do not explain"),
    Metric("recall", "recall", "diversity", "set", _neighbours("recall"), "own", reference=True, bounds=(0, 1),
           about="share of the real images among the images"),
    Metric("coverage", "coverage", "diversity", "set", _neighbours("coverage"), "own", reference=True, bounds=(0, 1),
           about="share of the real images with an image nearby"),
    Metric("vqascore", "VQAScore", "agreement", "image", _elsewhere("vqascore"), tolerance=0.02, bounds=(0, 1),
           about="probability of yes to the question whether an image shows its prompt, CLIP-FlanT5"),
    Metric("clip_score", "CLIP score", "agreement", "image", _judged("clip"), "clip", tolerance=0.5,
           about="100 times the cosine of image and prompt"),
    Metric("agreement", "prompt agreement", "agreement", "image", _judged("demo"), "demo", tolerance=2.0,
           bounds=(0, 100),
           about="how sure a classifier of emoji is that an image shows its prompt, in %"),
    Metric("image_reward", "ImageReward", "preference", "image", _elsewhere("image_reward"), tolerance=0.1,
           about="learned preference of people"),
    Metric("hpsv3", "HPSv3", "preference", "image", _elsewhere("hpsv3"), tolerance=0.3,
           about="learned preference of people"),
    Metric("hpsv2", "HPSv2.1", "preference", "image", _judged("hpsv2", 0.01), "hpsv2", tolerance=0.005,
           about="learned preference of people"),
    Metric("pickscore", "PickScore", "preference", "image", _judged("pickscore"), "pickscore", tolerance=0.2,
           about="learned preference of people"),
    Metric("aesthetic", "aesthetic", "preference", "image", _aesthetic, tolerance=0.1,
           about="learned rating of looks, 1 to 10, LAION"),
    Metric("on_data", "clear images", "realism", "image", _on_data, "demo", tolerance=2.0, bounds=(0, 100),
           about="how sure a classifier of emoji is that an image is some emoji, in %"),
    Metric("fd_dinov2", "FD-DINOv2", "realism", "set", _against("dinov2", F.frechet_distance), "dinov2", False, DISTANCE,
           True, reference=True, bounds=(0, math.inf), about="Frechet distance to the real images, DINOv2 ViT-L/14"),
    Metric("fid", "FID", "realism", "set", _against("inception", F.frechet_distance), "inception", False, DISTANCE, True,
           reference=True, bounds=(0, math.inf), about="Frechet distance to the real images, Inception v3"),
    Metric("kid", "KID", "realism", "set", _against("inception", F.mmd), "inception", False, DISTANCE, True,
           reference=True, about="squared MMD to the real images, unbiased, Inception v3"),
    Metric("cmmd", "CMMD", "realism", "set", _against("clip336", F.cmmd), "clip336", False, DISTANCE, True,
           reference=True, about="MMD to the real images, CLIP ViT-L/14 at 336 pixels"),
    Metric("fd", "Frechet distance", "realism", "set", _against("own", F.frechet_distance), "own", False, DISTANCE, True,
           reference=True, bounds=(0, math.inf), about="to the real images, in the features of this comparison"),
    Metric("precision", "precision", "realism", "set", _neighbours("precision"), "own", reference=True, tolerance=0.02,
           bounds=(0, 1), about="share of the images among the real ones"),
    Metric("density", "density", "realism", "set", _neighbours("density"), "own", reference=True, tolerance=0.02,
           bounds=(0, math.inf), about="how many real images are around an image"),
]  # fmt: skip
METRICS = {m.name: m for m in _METRICS}
