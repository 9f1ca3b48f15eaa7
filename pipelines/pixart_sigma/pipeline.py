"""PixArt-Sigma, guided by SPARKE.

For ``custom_pipeline="pipelines/pixart_sigma"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEPixArtSigmaPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
