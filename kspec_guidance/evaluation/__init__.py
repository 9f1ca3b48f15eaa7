"""Image sets, embedders, scores of sets, and report pages."""

from kspec_guidance.evaluation.image_sets import ImageSet, load_images
from kspec_guidance.evaluation.page import write_page
from kspec_guidance.evaluation.sets import ComparisonReport, Evaluation, compare_sets, evaluate_set

__all__ = ["load_images", "evaluate_set", "compare_sets", "write_page", "ImageSet", "Evaluation", "ComparisonReport"]
