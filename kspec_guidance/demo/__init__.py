"""The embedded emoji pipeline and its reference sets."""

from kspec_guidance.demo.pipeline import load_demo_pipeline, load_demo_reference

__all__ = ["load_demo_pipeline", "load_demo_reference"]
