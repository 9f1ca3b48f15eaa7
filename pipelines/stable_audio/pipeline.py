"""Stable Audio Open, guided by SPARKE.

For ``custom_pipeline="pipelines/stable_audio"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEStableAudioPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
