"""Guides: apply the gradients of objectives to the samples of a running pipeline."""

from kspec_guidance.guidance.comparison import GuidanceComparison
from kspec_guidance.guidance.guide import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE, MMDGuidance, NoveltyGuidance, VendiGuidance
from kspec_guidance.guidance.report import GuidanceReport, StepRecord
from kspec_guidance.guidance.start import StartChoice
from kspec_guidance.guidance.targets import PromptTarget, VarietyTarget
from kspec_guidance.guidance.term import DEFAULT_TRANSFORMS, Term

__all__ = [
    "SPARKE",
    "VendiGuidance",
    "MMDGuidance",
    "NoveltyGuidance",
    "KernelGuidance",
    "Term",
    "VarietyTarget",
    "PromptTarget",
    "DEFAULT_TRANSFORMS",
    "GuidanceComparison",
    "StartChoice",
    "GuidanceReport",
    "StepRecord",
]
