"""WanPipeline guided by SPARKE, for ``custom_pipeline="pipelines/wan"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEWanPipeline = sparke_pipeline("WanPipeline", __name__)
