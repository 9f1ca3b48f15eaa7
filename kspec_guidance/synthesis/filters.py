"""Which images are dropped: blank ones, near-duplicates, and those that filters reject."""

import math
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.memory import MemoryBank
from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError
from kspec_guidance.synthesis.stages import ScoreFilter, load_function, parse_score_filter

__all__ = [
    "Filter",
    "Screen",
    "Stage",
    "call_on_image",
    "filter_name",
    "describe_filters",
    "filter_stages",
    "load_filter",
    "score_types",
]

ROUNDING = 1e-6  # of the cosine of two equal rows in float32

Filter = Callable[[Image.Image, dict[str, Any]], Any]
Stage = Filter | ScoreFilter


def load_filter(name: str, judge: str = "auto", device: str = "cpu") -> Stage:
    """A filter by scores, such as ``blur<=0.6`` (see :func:`parse_score_filter`), or a function ``module:function``.

    Args:
        name: of the filter.
        judge: of agreement with prompts.
        device: of models.

    Raises:
        SynthesisError: for an unknown one.
    """
    return parse_score_filter(name, judge, device) or load_function(name)


def filter_stages(filters: Any, judge: str = "auto", device: str = "cpu") -> list[Stage]:
    """The filters of a run, from one or several functions, :class:`ScoreFilter` and names.

    Raises:
        SynthesisError: for an unknown name, something else, or two scores of one name.
    """
    listed = [] if filters is None else filters if isinstance(filters, list | tuple) else [filters]
    stages = [load_filter(one, judge, device) if isinstance(one, str) else one for one in listed]
    for stage in stages:
        if not isinstance(stage, ScoreFilter) and not callable(stage):
            raise SynthesisError(f"a filter is a function, a ScoreFilter or a name, got {stage!r}")
    names = [stage.name for stage in stages if isinstance(stage, ScoreFilter)]
    for name in names:
        if names.count(name) > 1:
            raise SynthesisError(
                f"two filters use the name {name!r}; a text has one limit: in Python, one ScoreFilter takes both "
                "(at_least=, at_most=)"
            )
    return stages


def describe_filters(stages: Sequence[Stage]) -> Any:
    """What the settings of a run say of its filters: nothing, the name of one, or a list of names."""
    names = [str(s) if isinstance(s, ScoreFilter) else getattr(s, "__qualname__", type(s).__name__) for s in stages]
    return names if len(names) > 1 else next(iter(names), None)


def score_types(stages: Sequence[Stage], own: Mapping[str, type | None]) -> dict[str, type]:
    """The columns of scores in the metadata, with their type.

    Raises:
        SynthesisError: for a score with the name of a column of the prompts.
    """
    names = [stage.name for stage in stages if isinstance(stage, ScoreFilter)]
    for name in names:
        if name in own:
            raise SynthesisError(
                f"the prompts have a column {name!r}, and a filter of that name would write its scores there"
            )
    return dict.fromkeys(names, float)


def filter_name(function: Stage) -> str:
    """The name of a filter as :func:`load_filter` takes it.

    Raises:
        TypeError: for a function that cannot be imported by name.
    """
    if isinstance(function, ScoreFilter):
        if function.spec is None:
            raise TypeError(f"{function} is no text")
        return function.spec
    module, name = getattr(function, "__module__", "__main__"), getattr(function, "__qualname__", "<>")
    if module == "__main__" or "<" in name or "." in name:
        raise TypeError(f"{name} is no function of a module")
    return f"{module}:{name}"


class Screen:
    """Decides for each image of a batch whether it is dropped, and why.

    Args:
        duplicates: cosine of features from which an image is a near-duplicate of one that this process kept.
        stages: filters, in order: by scores, and functions that are called with an image and its row, of which True keeps
            it, and False or a reason drops it.

    Raises:
        SynthesisError: for a cosine outside of (0, 1].
    """

    def __init__(self, duplicates: float | None, stages: Sequence[Stage] | None = None):
        if duplicates is not None and not 0 < duplicates <= 1:
            raise SynthesisError(f"duplicates is a cosine in (0, 1], e.g. 0.98, got {duplicates!r}")
        self.duplicates, self.stages = duplicates, list(stages or ())
        self.kept = MemoryBank()

    @property
    def drops(self) -> bool:
        """Whether it drops other images than blank ones."""
        return self.duplicates is not None or bool(self.stages)

    def add(self, features: Tensor) -> None:
        """Add features ``[k, d]`` of kept images."""
        if self.duplicates is not None and len(features):
            self.kept.add(features)

    def reasons(self, images: list[Image.Image], rows: list[dict[str, Any]], features: Tensor) -> list[str | None]:
        """Why each image is dropped; None keeps it.

        Args:
            images: of one batch.
            rows: their metadata, to which scores are added.
            features: ``[n, d]``.
        """
        reasons: list[str | None] = []
        u = l2_normalize(features.float())
        prompts = [str(row.get("prompt", "")) for row in rows]
        scores = {s.name: s.scores(images, prompts) for s in self.stages if isinstance(s, ScoreFilter)}
        cosines = None if self.duplicates is None else self.kept.select().largest_cosine(u)
        for k, image in enumerate(images):
            reason = "blank" if _is_blank(image) else None
            if reason is None and self.duplicates is not None and cosines is not None:
                earlier = [j for j in range(k) if reasons[j] is None]
                in_batch = float((u[earlier] @ u[k]).max()) if earlier else -1.0
                if max(in_batch, float(cosines[k])) >= self.duplicates - ROUNDING:
                    reason = "near duplicate"
            for stage in self.stages if reason is None else ():
                if isinstance(stage, ScoreFilter):
                    value = scores[stage.name][k]
                    rows[k][stage.name] = round(value, 4) if math.isfinite(value) else None
                    reason = stage.reason(value)
                else:
                    reason = _reason_of(call_on_image(stage, image, rows[k], "filter"))
                if reason is not None:
                    break
            reasons.append(reason)
        return reasons


def call_on_image(function: Filter, image: Image.Image, row: dict[str, Any], what: str) -> Any:
    """What a function of the user's returns for an image and its row.

    Args:
        function: of the user.
        image: of the batch.
        row: its metadata.
        what: the function is, in errors.

    Raises:
        RunFailedError: if it fails, with the image and the line.
    """
    try:
        return function(image, dict(row))
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise RunFailedError(
            f"the {what} failed for an image of {row['prompt']!r}, seed {row['seed']}: {type(error).__name__}: "
            f"{' '.join(str(error).split())} ({place.filename}, line {place.lineno}); finished images are safe"
        ) from error


def _is_blank(image: Image.Image) -> bool:
    bounds: Any = image.getextrema()
    bounds = bounds if isinstance(bounds[0], tuple) else (bounds,)
    return all(low == high for low, high in bounds)


def _reason_of(verdict: Any) -> str | None:
    """The reason to drop an image, of what the user's function returned."""
    if isinstance(verdict, str):
        return verdict or "filter"
    if verdict is None:
        raise RunFailedError("the filter returned nothing; return True to keep an image, False or a reason to drop it")
    return None if verdict else "filter"
