"""StableAudioPipeline guided by SPARKE, for ``custom_pipeline="pipelines/stable_audio"``; needs kspec-guidance installed."""

from kspec_guidance.pipelines import sparke_pipeline

SPARKEStableAudioPipeline = sparke_pipeline("StableAudioPipeline", __name__)
