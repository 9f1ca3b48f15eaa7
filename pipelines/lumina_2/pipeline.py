"""Lumina-Image 2.0, guided by SPARKE.

For ``custom_pipeline="pipelines/lumina_2"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKELumina2Pipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
