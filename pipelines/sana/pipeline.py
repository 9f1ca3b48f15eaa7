"""SanaPipeline guided by SPARKE, for ``custom_pipeline="pipelines/sana"``; needs kspec-guidance installed."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKESanaPipeline = sparke_pipeline("SanaPipeline", __name__)
