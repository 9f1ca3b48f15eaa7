"""StableAudioPipeline guided by SPARKE, for ``custom_pipeline="pipelines/stable_audio"``."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEStableAudioPipeline = sparke_pipeline("StableAudioPipeline", __name__)
