"""LTX-Video, text to video, guided by SPARKE.

For ``custom_pipeline="pipelines/ltx"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKELTXPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
