"""Which images are dropped: blank ones, near-duplicates, and those that the user's function rejects."""

import traceback
from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.memory import MemoryBank
from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError

__all__ = ["Filter", "Screen", "filter_name", "load_filter"]

Filter = Callable[[Image.Image, dict[str, Any]], Any]


def load_filter(name: str) -> Filter:
    """Import a function named ``module:function``, from the current folder or the environment.

    Raises:
        SynthesisError: if there is no such function.
    """
    import importlib
    import sys

    module, _, function = name.partition(":")
    if not module or not function:
        raise SynthesisError(f"a filter is named module:function, got {name!r}")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except Exception as error:  # of the user's module
        raise SynthesisError(f"cannot import the filter {name!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise SynthesisError(f"the filter {name!r} is a {type(found).__name__}, not a function")
    return found


def filter_name(function: Filter | None) -> str | None:
    """The name of a filter as :func:`load_filter` takes it.

    Raises:
        TypeError: for a function that cannot be imported by name.
    """
    if function is None:
        return None
    module, name = getattr(function, "__module__", "__main__"), getattr(function, "__qualname__", "<>")
    if module == "__main__" or "<" in name or "." in name:
        raise TypeError(f"{name} is no function of a module")
    return f"{module}:{name}"


class Screen:
    """Decides for each image of a batch whether it is dropped, and why.

    Args:
        duplicates: cosine of features from which an image is a near-duplicate of one that this process kept.
        user_filter: called with an image and its row; True keeps it, False or a reason drops it.

    Raises:
        SynthesisError: for a cosine outside of (0, 1].
    """

    def __init__(self, duplicates: float | None, user_filter: Filter | None):
        if duplicates is not None and not 0 < duplicates <= 1:
            raise SynthesisError(f"duplicates is a cosine in (0, 1], e.g. 0.98, got {duplicates!r}")
        self.duplicates, self.user_filter = duplicates, user_filter
        self.kept = MemoryBank()

    @property
    def drops(self) -> bool:
        """Whether it drops other images than blank ones."""
        return self.duplicates is not None or self.user_filter is not None

    def add(self, features: Tensor) -> None:
        """Add features ``[k, d]`` of kept images."""
        if self.duplicates is not None and len(features):
            self.kept.add(features)

    def reasons(self, images: list[Image.Image], rows: list[dict[str, Any]], features: Tensor) -> list[str | None]:
        """Why each image is dropped; None keeps it.

        Args:
            images: of one batch.
            rows: their metadata.
            features: ``[n, d]``.
        """
        reasons: list[str | None] = []
        u = l2_normalize(features.float())
        cosines = None if self.duplicates is None else self.kept.select().largest_cosine(u)
        for k, (image, row) in enumerate(zip(images, rows, strict=True)):
            reason = "blank" if _is_blank(image) else None
            if reason is None and self.duplicates is not None and cosines is not None:
                earlier = [j for j in range(k) if reasons[j] is None]
                in_batch = float((u[earlier] @ u[k]).max()) if earlier else -1.0
                if max(in_batch, float(cosines[k])) >= self.duplicates:
                    reason = "near duplicate"
            if reason is None and self.user_filter is not None:
                try:
                    verdict = self.user_filter(image, dict(row))
                except Exception as error:
                    place = traceback.extract_tb(error.__traceback__)[-1]
                    raise RunFailedError(
                        f"the filter failed for an image of {row['prompt']!r}, seed {row['seed']}: {type(error).__name__}: "
                        f"{' '.join(str(error).split())} ({place.filename}, line {place.lineno}); finished images are safe"
                    ) from error
                reason = _reason_of(verdict)
            reasons.append(reason)
        return reasons


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
