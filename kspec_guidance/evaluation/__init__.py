"""Image sets, embedders, scores of sets, and report pages."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kspec_guidance.evaluation.image_sets import ImageSet, load_images
    from kspec_guidance.evaluation.page import write_page
    from kspec_guidance.evaluation.set_pairs import ComparisonReport, compare_sets
    from kspec_guidance.evaluation.sets import Evaluation, evaluate_set

_LAZY = {  # scores take seconds to import, and a synthesis needs only embedders
    "ImageSet": "image_sets",
    "load_images": "image_sets",
    "write_page": "page",
    "ComparisonReport": "set_pairs",
    "Evaluation": "sets",
    "compare_sets": "set_pairs",
    "evaluate_set": "sets",
}

__all__ = ["load_images", "evaluate_set", "compare_sets", "write_page", "ImageSet", "Evaluation", "ComparisonReport"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        from importlib import import_module

        return getattr(import_module(f"kspec_guidance.evaluation.{_LAZY[name]}"), name)
    raise AttributeError(f"module 'kspec_guidance.evaluation' has no attribute {name!r}")
