"""What a family of pipelines needs beside the shared builders: one rule each, later rules adding to earlier ones.

``parts`` are components (a class name, settings, or both), ``call`` arguments of the call (a function makes a fresh value),
``settings`` other arguments of the constructor, ``attributes`` what is set afterwards, ``not_run`` why a class that can be guided is not run here, ``unfit`` why one cannot
be guided.
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
    attributes: dict[str, Any] = field(default_factory=dict)
    not_run: str = ""
    unfit: str = ""


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
V22 = {
    "in_channels": 4, "out_channels": 8, "addition_embed_type": "image", "encoder_hid_dim": 32, "encoder_hid_dim_type": "image_proj",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
    "mid_block_type": "UNetMidBlock2DSimpleCrossAttn", "resnet_time_scale_shift": "scale_shift", "class_embed_type": None,
    "cross_attention_dim": 32,
}  # fmt: skip
V21 = V22 | {
    "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image", "addition_embed_type_num_heads": 2,
}  # fmt: skip
PRIOR_STEPS = {
    "variance_type": "fixed_small_log", "prediction_type": "sample", "num_train_timesteps": 1000, "clip_sample": True, "clip_sample_range": 5.0,
}  # fmt: skip
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
    # second thoughts
    (r"AnimateDiff.*ControlNet(?!.*Video)", {"call": {"conditioning_frames": lambda: inputs.clip(4), "prompt": "a red heart", "image": None}}),
    (r"AnimateDiffVideoToVideoControlNet", {"call": {"conditioning_frames": few_frames}}),
    (r"^BriaFiboEdit", {"call": {"prompt": '{"edit_instruction": "make it red"}', "image": picture, "num_images_per_prompt": 1}}),
    (r"CogVideoXFunControl", {"call": {"control_video": inputs.clip, "prompt": "a red heart"}}),
    (r"CogVideoXImageToVideo|ConsisID|HunyuanSkyreels|HunyuanVideoFramepack|ImageToVideo|I2V", {"call": {"prompt": "a red heart", "num_videos_per_prompt": 1}}),
    (r"CogVideoXImageToVideo", {"parts": {"transformer": {"in_channels": 8}}}),
    (r"CogView4Control", {"parts": {"transformer": {"in_channels": 8}}, "call": {"control_image": picture}}),
    (r"^Cosmos(?!3)", {"parts": {"safety_checker": "CosmosSafetyChecker"}}),
    (r"^CycleDiffusion", {"call": {"source_prompt": "a blue heart", "prompt": "a red heart", "source_guidance_scale": 1, "num_images_per_prompt": 1}}),
    (r"^DreamLite", {"call": {"prompt": "a red heart", "num_images_per_prompt": 1}}),
    (r"^EasyAnimate", {"parts": {"tokenizer": "Qwen2Tokenizer"}}),
    (r"FluxPriorRedux", {"unfit": "it turns pictures into prompt embeddings: no denoising loop"}),
    (r"^HiDream", {"call": {"height": 64, "width": 64}}),
    (r"^HunyuanDiT", {"parts": {"tokenizer_2": "T5Tokenizer", "text_encoder_2": "T5EncoderModel"}}),
    (r"HunyuanDiTControlNet", {"call": {"control_image": picture}}),
    (r"HunyuanDiTPAG", {"settings": {"pag_applied_layers": "blocks.1"}}),
    (r"HunyuanImageRefiner", {"call": {"image": picture, "prompt": "a red heart", "num_images_per_prompt": 1}, "parts": {"transformer": {"in_channels": 8, "patch_size": (1, 1, 1), "rope_axes_dim": (4, 6, 6), "text_embed_2_dim": None}}}),
    (r"^IF(Img2Img|Inpainting|SuperRes)", {"call": {"prompt": "a red heart", "num_images_per_prompt": 2}}),
    (r"Kandinsky3Img2Img", {"call": {"prompt": "a red heart", "num_images_per_prompt": 1}}),
    (r"Kandinsky5I2I|QwenImageEdit|LongCatImageEdit", {"call": {"prompt": "a red heart", "num_images_per_prompt": 1}}),
    (r"Kandinsky.*Prior", {"call": {"output_type": "pt"}}),
    (r"KandinskyV22", {"parts": {"unet": V22}}),
    (r"KandinskyV22Controlnet", {"call": {"hint": lambda: torch.ones(2, 3, 32, 32)}, "parts": {"unet": V22 | {"addition_embed_type": "image_hint", "in_channels": 8}}}),
    (r"KandinskyV22Inpaint", {"parts": {"unet": V22 | {"in_channels": 9}}}),
    (r"KandinskyV22.*(Img2Img|Inpaint)(?!.*Combined)", {"call": {"image_embeds": lambda: embeds(1), "negative_image_embeds": lambda: embeds(1, seed=6), "num_images_per_prompt": 1, "hint": lambda: torch.ones(1, 3, 32, 32)}}),
    (r"LDMSuperResolution", {"call": {"image": picture, "output_type": "np"}, "parts": {"unet": {"in_channels": 8, "out_channels": 4}}}),
    (r"LDMTextToImage", {"parts": {"bert": "CLIPTextModel", "tokenizer": "CLIPTokenizer"}}),
    (r"^LongCatImage", {"parts": {"vae": {"latent_channels": 4}}}),
    (r"^Marigold", {"parts": {"unet": {"in_channels": 8, "cross_attention_dim": 32}}, "settings": {"default_processing_resolution": 32, "default_denoising_steps": 4, "scale_invariant": True, "shift_invariant": True},
        "call": {"image": picture, "processing_resolution": 32, "output_type": "np", "ensemble_size": 3, "ensembling_kwargs": None}}),
    (r"MarigoldIntrinsics", {"settings": {"target_properties": {"target_names": ["albedo"], "albedo": {"prediction_space": "srgb", "up_to_scale": False}}}}),
    (r"^Nucleus", {"call": {"return_index": -1}}),
    (r"^PIA", {"call": {"image": picture, "prompt": "a red heart"}}),
    (r"PixArtSigmaPAG", {"settings": {"pag_applied_layers": "blocks.0"}}),
    (r"QwenImageLayered", {"call": {"image": picture}}),
    (r"SanaSprint", {"call": {"num_inference_steps": 2, "strength": 1.0}}),
    (r"^ShapE", {"parts": {"prior": {"num_embeddings": 16, "embedding_dim": 16, "embedding_proj_dim": 32, "clip_embed_dim": 32, "additional_embeddings": 0, "time_embed_act_fn": "gelu", "norm_in_type": "layer", "encoder_hid_proj_type": None, "added_emb_type": None, "time_embed_dim": 64},
        "scheduler": ("HeunDiscreteScheduler", {"beta_schedule": "exp", "prediction_type": "sample", "clip_sample": True, "use_karras_sigmas": True})}, "call": {"frame_size": 32}}),
    (r"ShapEImg2Img", {"parts": {"prior": {"num_embeddings": 16, "embedding_dim": 16, "embedding_proj_dim": 32, "clip_embed_dim": 32, "additional_embeddings": 0, "time_embed_act_fn": "gelu", "norm_in_type": "layer", "encoder_hid_proj_type": None, "added_emb_type": None, "time_embed_dim": 64, "embedding_proj_norm_type": "layer"}}, "call": {"image": picture}}),
    (r"StableAudioPipeline", {"call": {"audio_end_in_s": 1.0}}),
    (r"(StableCascade|Wuerstchen)Decoder", {"call": {"image_embeddings": lambda: torch.randn(2, 4, 4, 4, generator=torch.Generator().manual_seed(3))}}),
    (r"WuerstchenPrior|StableCascadePrior", {"call": {}}),
    (r"StableDiffusion3Inpaint|StableDiffusion3ControlNetInpainting", {"parts": {"transformer": {"in_channels": 16, "out_channels": 16}, "vae": {"latent_channels": 16}, "controlnet": {"in_channels": 16, "extra_conditioning_channels": 1}},
        "call": {"control_image": picture, "control_mask": black}}),
    (r"^StableDiffusion(XL)?Adapter", {"parts": {"adapter": {"channels": [16, 32], "downscale_factor": 2}}}),
    (r"StableDiffusionXLAdapter", {"parts": {"adapter": {"adapter_type": "full_adapter_xl", "downscale_factor": 2}}}),
    (r"GLIGEN", {"call": {"prompt": "a red heart", "gligen_phrases": lambda: ["a heart"], "gligen_boxes": lambda: [[0.1, 0.1, 0.6, 0.6]]}, "parts": {"unet": {"attention_type": "gated", "cross_attention_dim": 32}}}),
    (r"LatentUpscale", {"call": {"prompt": "a red heart", "image": lambda: torch.rand(1, 3, 32, 32) }}),
    (r"StableDiffusionUpscale", {"call": {"prompt": "a red heart", "num_images_per_prompt": 2, "image": picture}}),
    (r"StableVideoDiffusion", {"parts": {"image_encoder": ("CLIPVisionModelWithProjection", {"image_size": 224, "patch_size": 56}), "feature_extractor": "CLIPImageProcessor"}}),
    (r"TextToVideoZero", {"call": {"video_length": 2, "t0": 1, "t1": 3, "prompt": "a red heart", "num_images_per_prompt": None, "num_videos_per_prompt": 1}}),
    (r"UnCLIP", {"call": {"output_type": "np"}}),
    (r"^VisualCloze", {"call": {"task_prompt": "paint", "content_prompt": "a heart"}}),
    (r"^Wan(Pipeline|ImageToVideo|VACE|Animate)|^LucyEdit", {"settings": {"boundary_ratio": None}, "parts": {"transformer": {}}}),
    (r"^WanVACE", {"call": {"prompt": "a red heart", "video": None, "mask": None, "image": None}}),
    (r"^WanImageToVideo", {"parts": {"transformer": {"in_channels": 36}}, "call": {"image": picture}}),
    (r"^SkyReelsV2ImageToVideo", {"parts": {"transformer": {"in_channels": 36}, "image_processor": "CLIPImageProcessor", "image_encoder": "CLIPVisionModelWithProjection"}}),
    (r"^AceStep", {"parts": {"text_encoder": "Qwen3Model", "vae": {"decoder_input_channels": 8}}, "call": {"audio_duration": 2.0, "lyrics": "la la", "prompt": "a red heart"}}),
    (r"^ChromaInpaint", {"parts": {"transformer": {}}}),
    (r"^PRX", {"call": {"num_images_per_prompt": 1}}),
    (r"^OmniGen", {"parts": {"scheduler": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "num_train_timesteps": 1})}}),
    (r"^ChronoEdit|^WanAnimate", {"parts": {"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}}),
    (r"PaintByExample", {"call": {"example_image": picture, "image": picture, "mask_image": black}}),
    # third thoughts
    (r"HunyuanDiT", {"parts": {"vae": models.KL8}, "call": {"height": 64, "width": 64}}),
    (r"Kandinsky5", {"call": {"max_sequence_length": 512}}),
    (r"HiDream", {"attributes": {"default_sample_size": 16}}),
    (r"OmniGen", {"call": {"num_images_per_prompt": 1, "prompt": "a red heart", "max_sequence_length": None}}),
    (r"^StableDiffusion(XL)?Adapter", {"parts": {"unet": {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}}}),
    (r"StableDiffusionXLAdapter", {"parts": {"unet": XL | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}, "adapter": {"adapter_type": "full_adapter", "downscale_factor": 2, "channels": [16, 32]}}}),
    (r"ControlNetXS", {"parts": {"unet": {"layers_per_block": 2, "sample_size": 96 // 6}}}),
    (r"StableDiffusionXLControlNetXS", {"parts": {"unet": XL | {"layers_per_block": 2}}}),
    (r"^Motif", {"parts": {"guider": "ClassifierFreeGuidance"}}),
    (r"^Ideogram4", {"call": {"guidance_scale": None}}),
    (r"Kandinsky.*Prior", {"parts": {"scheduler": ("UnCLIPScheduler", PRIOR_STEPS)}}),
    (r"Kandinsky.*Combined|^UnCLIPPipeline|StableUnCLIPPipeline", {"parts": {"prior_scheduler": ("UnCLIPScheduler", PRIOR_STEPS)}}),
    (r"^Kandinsky(Img2Img|Inpaint)?(Combined)?Pipeline", {"parts": {"unet": V21}}),
    (r"^Kandinsky(Img2Img|Inpaint)?Pipeline", {"call": {"image_embeds": lambda: embeds(1), "negative_image_embeds": lambda: embeds(1, seed=6), "prompt": "a red heart", "num_images_per_prompt": 1}}),
    (r"^KandinskyInpaint", {"parts": {"unet": V21 | {"in_channels": 9}}}),
    (r"^KandinskyImg2ImgCombined|^KandinskyInpaintCombined", {"call": {"prompt": "a red heart", "num_images_per_prompt": 1}}),
    (r"^KandinskyV22(Controlnet)?Pipeline", {"call": {"num_images_per_prompt": 1, "hint": lambda: torch.ones(2, 3, 128, 128)}}),
    (r"KandinskyV22ControlnetImg2Img", {"call": {"hint": lambda: torch.ones(1, 3, 128, 128)}}),
    (r"LDMSuperResolution", {"parts": {"unet": {"in_channels": 6, "out_channels": 3}, "vqvae": {"latent_channels": 3, "vq_embed_dim": 3}}}),
    (r"LDMTextToImage", {"parts": {"unet": "UNet2DConditionModel", "vqvae": "AutoencoderKL"}}),
    (r"^LongCatImage", {"parts": {"vae": {"latent_channels": 16}, "transformer": {"in_channels": 64}}}),
    (r"^PIA", {"parts": {"unet": {"in_channels": 9}}}),
    (r"QwenImageLayered", {"call": {"output_type": "pt", "prompt": "a red heart"}}),
    (r"^Helios", {"call": {"num_frames": 33}}),
    (r"StableDiffusionLatentUpscale", {"parts": {"unet": {"in_channels": 8, "time_cond_proj_dim": 160}}}),
    (r"HunyuanSkyreels", {"parts": {"transformer": {"in_channels": 8}}}),
    (r"AttendAndExcite", {"call": {"attn_res": (8, 8), "num_images_per_prompt": 1}}),
    (r"WanVACE", {"parts": {"transformer": {"vace_in_channels": 96}}}),
    (r"Wuerstchen(Decoder|Combined)", {"parts": {"prior_prior": {"c_in": 16}}, "call": {"image_embeddings": lambda: torch.randn(2, 16, 4, 4, generator=torch.Generator().manual_seed(3))}}),
    (r"ZImageControlNetInpaint", {"parts": {"controlnet": {"control_in_dim": 9}}}),
    (r"^BriaFibo(Edit)?Pipeline", {"parts": {"text_encoder": {"vocab_size": 128010}}}),
    (r"^BriaFibo2", {"parts": {"text_encoder": {"text": {"num_hidden_layers": 36}}}}),
    (r"CogVideoXFunControl", {"parts": {"transformer": {"in_channels": 8}}}),
    (r"ConsisID", {"parts": {"transformer": {"in_channels": 8}}}),
    (r"QwenImageControlNetInpaint", {"call": {"control_image": picture, "control_mask": black}, "parts": {"controlnet": {"extra_condition_channels": 4}}}),
    (r"LucyEdit", {"call": {"prompt": "a red heart", "video": inputs.clip}, "parts": {"transformer": {"in_channels": 32}}}),
    (r"^Cosmos2Text", {"parts": {"transformer": {"in_channels": 17, "out_channels": 16}}}),
    (r"^Cosmos2Video|^Cosmos2_5", {"parts": {"transformer": {"in_channels": 18, "out_channels": 16}}}),
    (r"^CosmosVideoToWorld", {"parts": {"transformer": {"in_channels": 6}}}),
    (r"^EasyAnimate", {"call": {"negative_prompt": ["", ""]}}),
    (r"VideoToVideo(?!.*(AnimateDiff|DiffusionForcing))|LTXCondition", {"call": {"video": inputs.clip, "prompt": "a red heart"}}),
    (r"VideoToVideoSD|AnimateDiffVideoToVideo", {"call": {"video": few_frames}}),
    (r"OmniGen", {"parts": {"vae": models.KL8}, "call": {"height": 64, "width": 64, "max_input_image_size": 64}}),
    (r"^StableDiffusion(XL)?Adapter", {"call": {"prompt": "a red heart"}}),
    (r"Kandinsky.*Prior", {"attributes": {"prior.clip_std": torch.nn.Parameter(torch.ones(1, 32))}}),
    (r"^Kandinsky(Img2Img|Inpaint)?(Combined)?Pipeline|KandinskyV22Controlnet", {"call": {"output_type": "pt"}}),
    (r"^Ideogram4", {"call": {"guidance_scale": 4.0, "guidance_schedule": inputs.NOTHING}}),
    (r"^PRX", {"call": {"prompt": "a red heart"}}),
    (r"^MusicLDM", {"parts": {"text_encoder": "ClapModel"}}),
    (r"^CosmosVideoToWorld|^Cosmos2_5|^Cosmos2Video", {"call": {"video": None, "prompt": "a red heart"}}),
    (r"^Cosmos", {"call": {"guidance_scale": 4.0}}),
    (r"^LongCatImagePipeline", {"call": {"prompt": "a red heart", "num_images_per_prompt": 2}}),
    (r"LatentUpscale", {"parts": {"unet": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 160}}}),
    (r"^LTX2", {"call": {
        "num_frames": 5, "prompt": "a red heart", "stg_scale": 0.0, "modality_scale": 1.0, "audio_guidance_scale": 1.0, "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0, "spatio_temporal_guidance_blocks": inputs.NOTHING, "use_cross_timestep": False, "frame_rate": 25.0}}),
    (r"^LTX2ImageToVideo", {"call": {"image": picture}}),
    (r"^WanVACE", {"call": {"num_videos_per_prompt": 1}}),
    (r"^AnyFlowFAR", {"call": {"video": None, "num_frames": 9}}),
    (r"WanAnimate", {"call": {"image": picture, "pose_video": lambda: inputs.clip(17), "face_video": lambda: inputs.clip(17), "prompt": "a red heart", "segment_frame_length": 17, "num_frames": 17}}),
    (r"^Kolors", {"parts": {"unet": XL | {
        "encoder_hid_dim": 32, "encoder_hid_dim_type": "text_proj", "cross_attention_dim": 32, "projection_class_embeddings_input_dim": 80}}}),
    (r"^KolorsPAG", {"settings": {"pag_applied_layers": ["mid"]}}),
    (r"^CosmosTextToWorld", {"parts": {"transformer": {"in_channels": 4}}}),
    (r"^CosmosVideoToWorld", {"parts": {"transformer": {"in_channels": 5}}, "call": {"video": lambda: inputs.clip(9), "image": inputs.NOTHING}}),
    (r"^Cosmos2TextToImage", {"parts": {"transformer": {"in_channels": 16, "out_channels": 16}}}),
    (r"^Cosmos2Video|^Cosmos2_5", {"parts": {"transformer": {"in_channels": 17, "out_channels": 16}}}),
    (r"^Cosmos2_5", {"parts": {"transformer": {
        "in_channels": 17, "out_channels": 16, "use_crossattn_projection": True, "crossattn_proj_in_channels": 64, "encoder_hidden_states_channels": 32}}}),
    (r"^LTX2ImageToVideo", {"call": {"crf": 0}}),
    (r"^SkyReelsV2ImageToVideo", {"parts": {"transformer": {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24}}}),
    (r"ZImageControlNetInpaint", {"call": {"prompt": "a red heart", "num_images_per_prompt": 1}}),
    (r"^Cosmos2(Text|Video)", {"parts": {"scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True})}}),
    (r"^AudioLDM2", {"parts": {"tokenizer_2": "T5TokenizerFast"}}),
    (r"^Helios", {"parts": {"scheduler": ("HeliosScheduler", {"stages": 1, "stage_range": [0, 1]})}}),
    # what is not run, and why
    (r"^Kandinsky5I2V", {"not_run": "its attention turns out NaN on a model this small, without guidance too"}),
    (r"^MusicLDM", {"not_run": "diffusers itself fails with transformers 5: CLAP's text features come in another type"}),
    (r"^LTX2ImageToVideo", {"not_run": "it compresses its picture with PyAV, which is not installed here"}),
    (r"Panorama", {"unfit": "it steps overlapping views one by one and puts its scheduler's state back in between"}),
    (r"SkyReelsV2DiffusionForcing", {"unfit": "each latent frame is stepped by a scheduler copy of its own, so that no step sees a whole clip"}),
    (r"Paradigms", {"unfit": "it steps whole windows of time at once by batch_step_no_noise, not by scheduler.step"}),
    (r"^ChromaInpaint", {"not_run": "diffusers itself fails: the pipeline reads transformer.config.guidance_embeds, which Chroma lacks"}),
    (r"^I2VGenXL", {"not_run": "diffusers itself fails with transformers 5: the pipeline reads text_encoder.text_model"}),
    (r"^QwenImageEdit|^Kandinsky5I2I|^LongCatImageEdit|^JoyImageEditPipeline", {"not_run": "it brings every picture to a megapixel, whatever size is asked for: minutes a run on a processor"}),
    (r"VersatileDiffusionPipeline", {"unfit": "a collection of three pipelines, without a call of its own"}),
    (r"LatentUpsample|VideoDiffusionDecode", {"unfit": "an upsampler in one pass: no denoising loop"}),
    (r"^Amused|^VQDiffusion|^LLaDA2|^DiffusionGemma", {"unfit": "it samples discrete tokens, which have no gradient"}),
]  # fmt: skip


def rule(name: str) -> Rule:
    """Everything that is said of the class ``name``."""
    made = Rule()
    for pattern, says in RULES:
        if re.search(pattern, name):
            made.parts = made.parts | says.get("parts", {})
            made.call = made.call | says.get("call", {})
            made.settings = made.settings | says.get("settings", {})
            made.attributes = made.attributes | says.get("attributes", {})
            made.not_run = says.get("not_run", made.not_run)
            made.unfit = says.get("unfit", made.unfit)
    return made
