"""CogVideoXPipeline guided by SPARKE, for ``custom_pipeline="pipelines/cogvideox"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKECogVideoXPipeline = sparke_pipeline("CogVideoXPipeline", __name__)
