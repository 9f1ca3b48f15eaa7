"""Stable Diffusion 1.x and 2.x and their fine-tuned versions, guided by SPARKE.

For ``custom_pipeline="pipelines/stable_diffusion"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEStableDiffusionPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
