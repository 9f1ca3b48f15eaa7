"""FLUX.1 [dev], [schnell] and Krea [dev], guided by SPARKE.

For ``custom_pipeline="pipelines/flux"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEFluxPipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
