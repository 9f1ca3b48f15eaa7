"""Z-Image and Z-Image-Turbo, guided by SPARKE.

For ``custom_pipeline="pipelines/z_image"``.
"""

# The same name in every file: diffusers executes them in one module, which may hold one pipeline class only.
from kspec_guidance.pipelines import SPARKEZImagePipeline as GuidedPipeline

__all__ = ["GuidedPipeline"]
