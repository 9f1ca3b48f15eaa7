"""StableDiffusionPipeline guided by SPARKE, for ``custom_pipeline="pipelines/stable_diffusion"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEStableDiffusionPipeline = sparke_pipeline("StableDiffusionPipeline", __name__)
