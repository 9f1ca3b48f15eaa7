"""Stable Diffusion 3 and 3.5, Medium and Large, guided by SPARKE.

For ``custom_pipeline="pipelines/stable_diffusion_3"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEStableDiffusion3Pipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
