"""QwenImagePipeline guided by SPARKE, for ``custom_pipeline="pipelines/qwen_image"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEQwenImagePipeline = sparke_pipeline("QwenImagePipeline", __name__)
