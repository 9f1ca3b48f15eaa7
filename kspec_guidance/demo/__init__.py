"""The embedded emoji pipeline, its reference sets, and a judge of its images."""

from kspec_guidance.demo.judge import load_demo_judge
from kspec_guidance.demo.pipeline import load_demo_pipeline, load_demo_reference, unknown_words

__all__ = ["load_demo_judge", "load_demo_pipeline", "load_demo_reference", "unknown_words"]
