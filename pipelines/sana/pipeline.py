"""SanaPipeline guided by SPARKE, for ``custom_pipeline="pipelines/sana"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKESanaPipeline = sparke_pipeline("SanaPipeline", __name__)
