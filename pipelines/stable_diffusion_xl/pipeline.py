"""StableDiffusionXLPipeline guided by SPARKE, for ``custom_pipeline="pipelines/stable_diffusion_xl"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEStableDiffusionXLPipeline = sparke_pipeline("StableDiffusionXLPipeline", __name__)
