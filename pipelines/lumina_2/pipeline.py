"""Lumina2Pipeline guided by SPARKE, for ``custom_pipeline="pipelines/lumina_2"``; needs kspec-guidance installed."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKELumina2Pipeline = sparke_pipeline("Lumina2Pipeline", __name__)
