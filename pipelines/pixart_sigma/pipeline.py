"""PixArtSigmaPipeline guided by SPARKE, for ``custom_pipeline="pipelines/pixart_sigma"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEPixArtSigmaPipeline = sparke_pipeline("PixArtSigmaPipeline", __name__)
