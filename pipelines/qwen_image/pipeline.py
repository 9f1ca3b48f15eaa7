"""Qwen-Image, text to image, guided by SPARKE.

For ``custom_pipeline="pipelines/qwen_image"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEQwenImagePipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
