"""Lumina2Pipeline guided by SPARKE, for ``custom_pipeline="pipelines/lumina_2"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKELumina2Pipeline = sparke_pipeline("Lumina2Pipeline", __name__)
