"""ZImagePipeline guided by SPARKE, for ``custom_pipeline="pipelines/z_image"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEZImagePipeline = sparke_pipeline("ZImagePipeline", __name__)
