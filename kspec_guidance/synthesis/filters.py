"""What is dropped: failures, near duplicates, and what the user's own function says."""

from collections.abc import Callable
from typing import Any

from PIL import Image
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.memory import MemoryBank
from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["Screen", "load_filter"]

Filter = Callable[[Image.Image, dict[str, Any]], Any]


def load_filter(name: str) -> Filter:
    """A function by ``module:function``; the module is imported from the current folder or the environment.

    Raises:
        SynthesisError: if there is none.
    """
    import importlib
    import sys

    module, _, function = name.partition(":")
    if not module or not function:
        raise SynthesisError(f"a filter is named module:function, got {name!r}")
    sys.path.insert(0, "")
    try:
        found = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise SynthesisError(f"cannot import the filter {name!r}: {error}") from error
    finally:
        sys.path.remove("")
    if not callable(found):
        raise SynthesisError(f"the filter {name!r} is a {type(found).__name__}, not a function")
    return found


class Screen:
    """Says of each image of a batch why it is to be dropped, or nothing.

    Args:
        duplicates: cosine of features from which an image counts as a duplicate of one that this process kept.
        user: called with the image and its row; True keeps it, False or a reason drops it.
    """

    def __init__(self, duplicates: float | None, user: Filter | None):
        if duplicates is not None and not 0 < duplicates <= 1:
            raise SynthesisError(f"duplicates is a cosine in (0, 1], e.g. 0.98, got {duplicates!r}")
        self.duplicates, self.user = duplicates, user
        self.kept = MemoryBank()

    def learn(self, features: Tensor) -> None:
        """Features ``[k, d]`` of kept images."""
        if self.duplicates is not None and len(features):
            self.kept.add(features)

    def reasons(self, images: list[Image.Image], rows: list[dict[str, Any]], features: Tensor) -> list[str | None]:
        """One for each image; None keeps it."""
        reasons: list[str | None] = []
        u = l2_normalize(features.float())
        alike = None if self.duplicates is None else self.kept.select().largest_cosine(u)
        for k, (image, row) in enumerate(zip(images, rows, strict=True)):
            reason = "blank" if _blank(image) else None
            if reason is None and self.duplicates is not None and alike is not None:
                before = [j for j in range(k) if reasons[j] is None]
                inside = float((u[before] @ u[k]).max()) if before else -1.0
                if max(inside, float(alike[k])) >= self.duplicates:
                    reason = "near duplicate"
            if reason is None and self.user is not None:
                reason = _verdict(self.user(image, dict(row)))
            reasons.append(reason)
        return reasons


def _blank(image: Image.Image) -> bool:
    bounds: Any = image.getextrema()
    bounds = bounds if isinstance(bounds[0], tuple) else (bounds,)
    return all(low == high for low, high in bounds)


def _verdict(said: Any) -> str | None:
    if isinstance(said, str):
        return said or "filter"
    if said is None:
        raise SynthesisError("the filter returned nothing; return True to keep an image, False or a reason to drop it")
    return None if said else "filter"
