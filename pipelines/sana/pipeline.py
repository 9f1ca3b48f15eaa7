"""SANA and SANA 1.5, guided by SPARKE.

For ``custom_pipeline="pipelines/sana"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKESanaPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
