"""Stable Diffusion XL and its fine-tuned versions, guided by SPARKE.

For ``custom_pipeline="pipelines/stable_diffusion_xl"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEStableDiffusionXLPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
