"""PixArtSigmaPipeline guided by SPARKE, for ``custom_pipeline="pipelines/pixart_sigma"``; needs kspec-guidance installed."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEPixArtSigmaPipeline = sparke_pipeline("PixArtSigmaPipeline", __name__)
