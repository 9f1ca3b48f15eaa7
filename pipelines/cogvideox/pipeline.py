"""CogVideoX and CogVideoX1.5, text to video, guided by SPARKE.

For ``custom_pipeline="pipelines/cogvideox"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKECogVideoXPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
