"""Wan 2.1 and 2.2, text to video, guided by SPARKE.

For ``custom_pipeline="pipelines/wan"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEWanPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
