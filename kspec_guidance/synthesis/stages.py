"""Filters by scores: blur, agreement with the prompt, and what models of the user say, such as aesthetic or NSFW scores."""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image
from scipy.ndimage import uniform_filter1d

from kspec_guidance.evaluation.judges import PromptJudge, prompt_judge
from kspec_guidance.synthesis.columns import COLUMNS
from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError

__all__ = ["ScoreFilter", "blur_effect", "is_score", "load_function", "parse_score_filter"]

FORM = re.compile(r"([A-Za-z_]\w*)\s*(<=|>=)\s*([-+0-9.eE]+)(?::(.+))?")
FUNCTION = re.compile(r"[^\s<>=:]+:[^\s<>=:]+")
BLUR_WIDTH = 11  # of the mean, in pixels, as published
Scores = Callable[[Sequence[Image.Image], Sequence[str]], Sequence[float]]


def blur_effect(image: Image.Image) -> float:
    """How blurred an image looks, from 0 (sharp) to 1: how little of the differences of neighbours a further blur removes.

    F. Crete, T. Dolmiere, P. Ladret, M. Nicolas, The blur effect, SPIE 6492, 2007. Independent of contrast. An image of one
    colour has no edges, and counts as blurred.
    """
    grey = np.asarray(image.convert("L"), dtype=np.float64)
    found = []
    for axis in (0, 1):
        if grey.shape[axis] < 3:
            continue
        blurred = uniform_filter1d(grey, BLUR_WIDTH, axis=axis, mode="reflect")
        sharp, soft = (np.abs(np.diff(z, axis=axis)) for z in (grey, blurred))
        total = sharp.sum()
        found.append(1.0 if total == 0 else 1.0 - np.maximum(0.0, sharp - soft).sum() / total)
    return float(max(found, default=1.0))


def load_function(name: str, what: str = "filter") -> Any:
    """Import a function named ``module:function``, from the current folder or the environment.

    Args:
        name: of the function.
        what: it is, for errors.

    Raises:
        SynthesisError: if there is no such function.
    """
    import importlib
    import sys

    module, _, function = name.partition(":")
    if not module or not function:
        raise SynthesisError(f"a {what} is named module:function, got {name!r}")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # of the user's module
        raise SynthesisError(f"cannot import the {what} {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise SynthesisError(f"the {what} {name!r} is a {type(found).__name__}, not a function")
    return found


@dataclass(frozen=True)
class ScoreFilter:
    """Keeps images whose score is in a range, and writes the score into their metadata.

    Args:
        name: of the score, and of its column in the metadata.
        score: called with the images of a batch and their prompts; returns a number for each. NaN keeps an image.
        at_least: smallest score of a kept image; None for no limit.
        at_most: largest score of a kept image; None for no limit.
        spec: the text that :func:`parse_score_filter` makes it of; None if there is none.

    Raises:
        SynthesisError: for a name that the metadata uses itself, or without a limit.
    """

    name: str
    score: Scores = field(compare=False)
    at_least: float | None = None
    at_most: float | None = None
    spec: str | None = None

    def __post_init__(self) -> None:
        if self.name in COLUMNS or not self.name.isidentifier():
            raise SynthesisError(f"a score cannot be named {self.name!r}; take a word that no column of the metadata has")
        limits = [limit for limit in (self.at_least, self.at_most) if limit is not None]
        if not limits or not all(math.isfinite(limit) for limit in limits):
            raise SynthesisError(f"the filter {self.name!r} needs a finite at_least or at_most")

    def __str__(self) -> str:
        limits = [f"{self.name}{sign}{limit:g}" for sign, limit in ((">=", self.at_least), ("<=", self.at_most))
                  if limit is not None]  # fmt: skip
        return self.spec or " and ".join(limits)

    def scores(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """The score of each image.

        Raises:
            RunFailedError: if the function fails, or does not return a number for each image.
        """
        try:
            values = [float(value) for value in self.score(images, prompts)]
        except Exception as error:
            raise RunFailedError(
                f"the score {self.name!r} failed: {type(error).__name__}: {' '.join(str(error).split())}; finished images "
                "are safe"
            ) from error
        if len(values) != len(images):
            raise RunFailedError(f"the score {self.name!r} returned {len(values)} numbers for {len(images)} images")
        return values

    def reason(self, value: float) -> str | None:
        """Why an image with this score is dropped; None keeps it."""
        if self.at_least is not None and value < self.at_least:
            return f"{self.name} below {self.at_least:g}"
        if self.at_most is not None and value > self.at_most:
            return f"{self.name} above {self.at_most:g}"
        return None


def is_score(text: str) -> bool:
    """Whether the text of a filter is a score with a limit, such as ``blur<=0.6``; else it names a function.

    Raises:
        SynthesisError: for a text that is neither.
    """
    if FORM.fullmatch(text.strip()):
        return True
    if not FUNCTION.fullmatch(text):
        raise SynthesisError(
            "a filter is named module:function, or is a score with one limit, <= or >= and a finite number, such as "
            f"blur<=0.6, agreement>=25 or nsfw<=0.2:transformers:MODEL:LABEL; got {text!r}"
        )
    return False


def parse_score_filter(text: str, judge: str = "auto", device: str = "cpu") -> ScoreFilter | None:
    """The filter of a text such as ``blur<=0.6``; None for the name of a function.

    * ``blur<=0.6``: :func:`blur_effect`;
    * ``agreement>=25``: agreement with the prompt, 0 to 100, by ``judge``, or the judge after a colon
      (``agreement>=25:transformers:FOLDER``);
    * ``nsfw<=0.2:transformers:MODEL:LABEL``: the probability of a label, by an image classifier of transformers;
    * ``aesthetic>=5:module:function``: a function of a list of images that returns a number for each.

    Args:
        text: the filter.
        judge: of ``agreement``, see :func:`~kspec_guidance.evaluation.judges.prompt_judge`.
        device: of models.

    Raises:
        SynthesisError: for an unknown score, a model or function that cannot be loaded, or a text that is no filter.
    """
    match = FORM.fullmatch(text.strip()) if is_score(text) else None
    if match is None:
        return None
    name, sign, number, source = match.groups()
    try:
        limit = float(number)
    except ValueError as error:
        raise SynthesisError(f"cannot read the number {number!r} in the filter {text!r}") from error
    limits = {"at_least": limit} if sign == ">=" else {"at_most": limit}
    return ScoreFilter(name, _score(name, source, judge, device, text), **limits, spec=text.strip())


def _score(name: str, source: str | None, judge: str, device: str, text: str) -> Scores:
    if name == "agreement":
        return _agreement(source or judge, device)
    if source is None and name == "blur":
        return lambda images, prompts: [blur_effect(image) for image in images]
    if source is None:
        raise SynthesisError(
            f"the filter {text!r} does not say what computes {name!r}; give {text}:transformers:MODEL:LABEL or "
            f"{text}:module:function, or use blur or agreement"
        )
    if source.startswith("transformers:"):
        model, _, label = source.removeprefix("transformers:").rpartition(":")
        return _classifier(model, label, device, text)
    function = load_function(source)
    return lambda images, prompts: function(list(images))


def _agreement(judge: str, device: str) -> Scores:
    try:
        found: PromptJudge | None = prompt_judge(judge, device=device)
    except (ValueError, OSError) as error:
        raise SynthesisError(f"cannot load the judge of agreement: {error}") from error
    if found is None:
        raise SynthesisError(
            "no judge of agreement is on this machine; name one: agreement>=25:transformers:FOLDER of CLIP"
        )
    judge_of_run = found
    return lambda images, prompts: judge_of_run.agreement(judge_of_run.images(list(images)), prompts).tolist()


def _classifier(model: str, label: str, device: str, text: str) -> Scores:
    """The probability of a label, by an image classifier of transformers."""
    if not model or not label:
        raise SynthesisError(f"the filter {text!r} needs transformers:MODEL:LABEL")
    from transformers import pipeline

    try:
        classifier: Any = pipeline("image-classification", model=model, device=device)
    except Exception as error:  # of the hub, or the files
        raise SynthesisError(f"cannot load {model!r}: {type(error).__name__}: {' '.join(str(error).split())}") from error
    labels = list(classifier.model.config.label2id)
    if label not in labels:
        raise SynthesisError(f"{model!r} has no label {label!r}; its labels are {', '.join(map(str, labels[:20]))}")

    def scores(images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        found = classifier([image.convert("RGB") for image in images], top_k=None)
        return [next(entry["score"] for entry in entries if entry["label"] == label) for entries in found]

    return scores
