"""Classes that cannot be guided or are not run here, with the reason."""

from tests.tiny.rules import rule

MEGAPIXEL = "it resizes every image to one megapixel, whatever the requested size: minutes per run on a CPU"

RULES = [
    rule(r"^Amused|^VQDiffusion|^LLaDA2|^DiffusionGemma", unguidable="it samples discrete tokens, which have no gradient"),
    rule(r"FluxPriorRedux", unguidable="it turns images into prompt embeddings: no denoising loop"),
    rule(r"LatentUpsample|VideoDiffusionDecode", unguidable="a one-pass upsampler: no denoising loop"),
    rule(r"Panorama", unguidable="it steps overlapping views one by one and restores the scheduler's state between them"),
    rule(r"Paradigms", unguidable="it steps whole windows of timesteps with batch_step_no_noise, not with scheduler.step"),
    rule(
        r"SkyReelsV2DiffusionForcing",
        unguidable="it steps each latent frame with its own copy of the scheduler: no step has a whole clip",
    ),
    rule(r"^Echo", unguidable="its loop adds noise to the predictions itself, without a scheduler's step"),
    rule(r"VersatileDiffusionPipeline", unguidable="a collection of three pipelines without its own __call__"),
    rule(
        r"^AnyFlowFAR",
        not_run="it makes a clip in chunks of different lengths, which a memory of x0 cannot hold; space='pooled' can",
    ),
    rule(
        r"^ChromaInpaint",
        not_run="diffusers itself fails: the pipeline reads transformer.config.guidance_embeds, which Chroma lacks",
    ),
    rule(
        r"^I2VGenXL",
        not_run="diffusers itself fails with transformers 5: the pipeline reads text_encoder.text_model",
    ),
    rule(r"^Kandinsky5I2V", not_run="its attention returns NaN for so small a model, also without guidance"),
    rule(r"^LTX2ImageToVideo", not_run="it compresses its image with PyAV, which is not installed here"),
    rule(
        r"^MusicLDM",
        not_run="diffusers itself fails with transformers 5: CLAP returns its text features in another type",
    ),
    rule(r"^QwenImageEdit|^Kandinsky5I2I|^LongCatImageEdit|^JoyImageEditPipeline", not_run=MEGAPIXEL),
]
