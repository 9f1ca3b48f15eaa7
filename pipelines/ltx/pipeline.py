"""LTXPipeline guided by SPARKE, for ``custom_pipeline="pipelines/ltx"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKELTXPipeline = sparke_pipeline("LTXPipeline", __name__)
