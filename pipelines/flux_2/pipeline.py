"""FLUX.2 [dev], guided by SPARKE.

For ``custom_pipeline="pipelines/flux_2"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEFlux2Pipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
