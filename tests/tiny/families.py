"""What a family of pipelines needs beside the shared builders: one rule each, later rules adding to earlier ones.

``parts`` are components (a class name, settings, or both), ``call`` arguments of the call (a function makes a fresh value),
``settings`` other arguments of the constructor, ``not_run`` why a class is not run here.
"""

import re
from dataclasses import dataclass, field
from typing import Any

import torch

from tiny import inputs, models


@dataclass
class Rule:
    parts: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    not_run: str = ""


def picture():
    return inputs.picture(1)


def black():
    return inputs.mask()


def embeds(n: int = 2, width: int = 32, seed: int = 5):
    return torch.randn(n, width, generator=torch.Generator().manual_seed(seed))


def few_frames():
    return inputs.clip(4)


XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80, "cross_attention_dim": 64,
    "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
}  # fmt: skip
REFINER = XL | {"projection_class_embeddings_input_dim": 72}
IN9, IN8, IN5, IN7 = ({"in_channels": n} for n in (9, 8, 5, 7))
ONE_PROMPT = {"prompt": "a red heart", "num_images_per_prompt": 1, "num_videos_per_prompt": 1}
PIXELS = {"output_type": "np"}
VIDEO = {"num_frames": 9, "num_videos_per_prompt": 1}
RULES: list[tuple[str, dict[str, Any]]] = [
    # what asks for pictures
    (r"Img2Img|Inpaint|Upscale|Depth2Img|Pix2Pix|ControlNet|Controlnet|Adapter|ImageToVideo|I2V|I2I|Edit|Image2Video|VideoToWorld|LongPrompt|Cycle|LEdits|PaintBy", {
        "call": {"image": picture},
    }),
    # Stable Diffusion 1, 2 and XL
    (r"StableDiffusionXL|AnimateDiffSDXL|TextToVideoZeroSDXL|StableDiffusionXLPipelineStable", {
        "parts": {"unet": XL, "controlnet": XL, "adapter": {"adapter_type": "full_adapter_xl"}},
    }),
    (r"StableDiffusionXLControlNetUnion", {"parts": {"controlnet": {"cross_attention_dim": 64}}, "call": {"control_mode": [0], "control_image": lambda: [picture()]}}),
    (r"ControlNetXS", {"parts": {"unet": {"block_out_channels": (16, 32)}, "controlnet": {}}}),
    (r"StableDiffusionXLControlNetXS", {"parts": {"unet": XL, "controlnet": {
        "cross_attention_dim": 64, "transformer_layers_per_block": (1, 2), "use_linear_projection": True}}}),
    (r"^StableDiffusion.*Inpaint(?!ing)", {"parts": {}}),
    (r"InstructPix2Pix", {"parts": {"unet": IN8}}),
    (r"StableDiffusionXLInstructPix2Pix", {"parts": {"unet": XL | IN8}}),
    (r"Depth2Img", {"parts": {"unet": IN5, "depth_estimator": "DPTForDepthEstimation", "feature_extractor": "DPTImageProcessor"}}),
    (r"StableDiffusionUpscale", {
        "parts": {"unet": IN7 | {"num_class_embeds": 1000}, "low_res_scheduler": "DDPMScheduler"}, "call": {"noise_level": 20},
    }),
    (r"LatentUpscale", {"parts": {"unet": {"in_channels": 8, "time_cond_proj_dim": 128}}}),
    (r"LDM3D", {"parts": {"vae": {"in_channels": 6, "out_channels": 6}}, "call": PIXELS}),
    (r"ImageVariation", {"parts": {"feature_extractor": "CLIPImageProcessor", "image_encoder": "CLIPVisionModelWithProjection"}}),
    (r"AttendAndExcite", {"call": {"token_indices": lambda: [[1, 2]], "prompt": "a red heart"}}),
    (r"Adapter", {"call": {"image": picture}}),
    (r"LatentConsistency|^LCM", {"parts": {"unet": {"time_cond_proj_dim": 32}}, "call": {"original_inference_steps": 20}}),
    # Stable Diffusion 3
    (r"^StableDiffusion3", {"parts": {"text_encoder_3": {"d_model": 64}}, "call": {"prompt_3": None}}),
    (r"^StableDiffusion3.*ControlNet", {"call": {"control_image": picture}}),
    (r"^StableDiffusion3PAG", {"settings": {"pag_applied_layers": "blocks.0"}}),
    # DiT, classes instead of prompts
    (r"^DiT", {"call": {"class_labels": lambda: [1, 1, 2, 2]}, "parts": {"transformer": {"num_embeds_ada_norm": 1000}}}),
    # Flux
    (r"^Flux", {"call": {"image": picture, "mask_image": black, "control_image": picture}}),
    (r"^(FluxPipeline|FluxControlNetPipeline|FluxControlPipeline)$", {"call": {"image": None}}),
    (r"^FluxControl(Img2Img)?Pipeline", {"parts": {"transformer": {"in_channels": 32, "out_channels": 16}}}),
    (r"FluxControlInpaint", {"parts": {"transformer": {"in_channels": 32, "out_channels": 16}}}),
    (r"FluxFill", {"parts": {"transformer": {"in_channels": 48, "out_channels": 16}}}),
    (r"FluxKontext", {"call": {"_auto_resize": False, "max_area": 1024}}),
    (r"^Flux2", {"call": {"text_encoder_out_layers": (0, 1, 2), "image": None}}),
    (r"Flux2KleinInpaint", {"call": {"image": picture}}),
    # other image transformers
    (r"^PixArt", {"parts": {"transformer": {"out_channels": 8}}}),
    (r"SanaSprint", {"parts": {"scheduler": "SCMScheduler", "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"}}}),
    (r"Sana.*Video", {"parts": {"vae": "AutoencoderKLWan"}}),
    (r"HunyuanDiT", {"parts": {}, "call": {}}),
    (r"HiDream", {"parts": {"text_encoder_4": {}}}),
    (r"OmniGen", {"call": {"max_input_image_size": 64, "input_images": None}}),
    (r"^Kandinsky5", {"call": {"max_sequence_length": 64}}),
    (r"^ZImage", {"parts": {"text_encoder": "Qwen3Model"}}),
    (r"^Z.*ControlNet", {"call": {"control_image": picture}}),
    (r"^PRXPixel", {"parts": {"text_encoder": "Gemma2PreTrainedModel", "transformer": {"in_channels": 3}}}),
    (r"^PRX", {"parts": {"text_encoder": "Gemma2PreTrainedModel"}}),
    (r"^Krea2", {"settings": {"text_encoder_select_layers": (0, 1)}}),
    (r"^CogView3|^CogVideoX|^ConsisID", {"parts": {"scheduler": "CogVideoXDDIMScheduler"}}),
    (r"^Kolors", {}),
    (r"^Ideogram4", {"parts": {"text_encoder": "Qwen3Model"}}),
    # pixels
    (r"^IF", {
        "parts": {"unet": {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": 32, "cross_attention_dim": 32, "sample_size": 32},
                  "scheduler": ("DDPMScheduler", {"variance_type": "learned_range"})},
        "call": {"output_type": "pt", "original_image": None},
    }),
    (r"^IF.*SuperResolution", {"parts": {"unet": {"in_channels": 6, "out_channels": 6, "encoder_hid_dim": 32, "num_class_embeds": 1000}}}),
    (r"^IF.+SuperResolution", {"call": {"original_image": picture}}),
    (r"^IFSuperResolution", {"call": {"image": picture}}),
    # unconditional
    (r"^(DDPM|DDIM|PNDM|ScoreSdeVe|KarrasVe|ConsistencyModel|RePaint|LDM|DanceDiffusion)Pipeline", {"call": {"output_type": "np"}}),
    (r"^ConsistencyModel", {"parts": {"scheduler": "CMStochasticIterativeScheduler"}}),
    (r"^LDMPipeline", {"parts": {"unet": {"in_channels": 4, "out_channels": 4}, "vqvae": {"latent_channels": 4}}}),
    # clips
    (r"AnimateDiff|PIA|Video|^Wan|^CogVideoX|^LTX|^Mochi|^Allegro|^Latte|^Cosmos|^SkyReels|^EasyAnimate|^ConsisID|^Helios|^AnyFlow|^ChronoEdit|^LucyEdit|^Kandinsky5.*V|^I2VGen", {
        "call": {"num_videos_per_prompt": 1},
    }),
    (r"AnimateDiff|PIA|TextToVideoSD|VideoToVideoSD|I2VGen|StableVideo", {"call": {"num_frames": 4}}),
    (r"ControlNet.*AnimateDiff|AnimateDiff.*ControlNet", {"call": {"conditioning_frames": few_frames, "video": few_frames}}),
    (r"AnimateDiffVideoToVideo|VideoToVideoSD", {"call": {"video": few_frames, "prompt": "a red heart"}}),
    # sound
    (r"^AudioLDM|^MusicLDM", {"call": {"audio_length_in_s": 0.1, "output_type": "latent"}, "parts": {"vae": {"in_channels": 1, "out_channels": 1}}}),
    (r"^StableAudioPipeline", {"parts": {"scheduler": "CosineDPMSolverMultistepScheduler"}, "call": {"audio_end_in_s": 3.0, "num_inference_steps": 4}}),
    # two stages
    (r"Kandinsky|UnCLIP|Wuerstchen|StableCascade", {"call": {}}),
    (r"^KandinskyV22(?!.*(Prior|Combined))", {"call": {"image_embeds": lambda: embeds(2), "negative_image_embeds": lambda: embeds(2, seed=6), "num_images_per_prompt": 2}}),
]  # fmt: skip


def rule(name: str) -> Rule:
    """Everything that is said of the class ``name``."""
    made = Rule()
    for pattern, says in RULES:
        if re.search(pattern, name):
            made.parts = made.parts | says.get("parts", {})
            made.call = made.call | says.get("call", {})
            made.settings = made.settings | says.get("settings", {})
            made.not_run = says.get("not_run", made.not_run)
    return made
