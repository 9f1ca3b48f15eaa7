"""Classes that cannot be guided, or are not run here, with the reason."""

from tests.tiny.rules import when

MEGAPIXEL = "it brings every picture to a megapixel, whatever size is asked for: minutes a run on a processor"

RULES = [
    when(r"^Amused|^VQDiffusion|^LLaDA2|^DiffusionGemma", unfit="it samples discrete tokens, which have no gradient"),
    when(r"FluxPriorRedux", unfit="it turns pictures into prompt embeddings: no denoising loop"),
    when(r"LatentUpsample|VideoDiffusionDecode", unfit="an upsampler in one pass: no denoising loop"),
    when(r"Panorama", unfit="it steps overlapping views one by one and puts its scheduler's state back in between"),
    when(r"Paradigms", unfit="it steps whole windows of time at once by batch_step_no_noise, not by scheduler.step"),
    when(
        r"SkyReelsV2DiffusionForcing",
        unfit="each latent frame is stepped by a scheduler copy of its own, so that no step sees a whole clip",
    ),
    when(r"VersatileDiffusionPipeline", unfit="a collection of three pipelines, without a call of its own"),
    when(
        r"^AnyFlowFAR",
        not_run="it makes a clip in chunks of different lengths: memories of x0 refuse the second; space='pooled' fits all",
    ),
    when(
        r"^ChromaInpaint",
        not_run="diffusers itself fails: the pipeline reads transformer.config.guidance_embeds, which Chroma lacks",
    ),
    when(
        r"^I2VGenXL",
        not_run="diffusers itself fails with transformers 5: the pipeline reads text_encoder.text_model",
    ),
    when(r"^Kandinsky5I2V", not_run="its attention turns out NaN on a model this small, without guidance too"),
    when(r"^LTX2ImageToVideo", not_run="it compresses its picture with PyAV, which is not installed here"),
    when(
        r"^MusicLDM",
        not_run="diffusers itself fails with transformers 5: CLAP's text features come in another type",
    ),
    when(r"^QwenImageEdit|^Kandinsky5I2I|^LongCatImageEdit|^JoyImageEditPipeline", not_run=MEGAPIXEL),
]
