"""FluxPipeline guided by SPARKE, for ``custom_pipeline="pipelines/flux"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEFluxPipeline = sparke_pipeline("FluxPipeline", __name__)
