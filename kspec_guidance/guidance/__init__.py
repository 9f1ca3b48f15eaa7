"""Guides: when, where and how strongly an objective's gradient moves the samples of a running pipeline."""

from kspec_guidance.guidance.guide import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE, MMDGuidance, NoveltyGuidance
from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.guidance.term import DEFAULT_CHAIN, Term

__all__ = ["SPARKE", "MMDGuidance", "NoveltyGuidance", "KernelGuidance", "Term", "GuidanceReport", "DEFAULT_CHAIN"]
