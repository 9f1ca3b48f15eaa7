"""Flux2Pipeline guided by SPARKE, for ``custom_pipeline="pipelines/flux_2"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEFlux2Pipeline = sparke_pipeline("Flux2Pipeline", __name__)
