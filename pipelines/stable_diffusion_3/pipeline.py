"""StableDiffusion3Pipeline guided by SPARKE, for ``custom_pipeline="pipelines/stable_diffusion_3"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEStableDiffusion3Pipeline = sparke_pipeline("StableDiffusion3Pipeline", __name__)
