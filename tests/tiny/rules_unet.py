"""Pipelines on UNets: Stable Diffusion and its kin, Kandinsky, DeepFloyd IF, unconditional ones."""

import torch

from tests.tiny.rules import ONE, PROMPT, TWO, mask, noise, picture, when

XL = {
    "addition_embed_type": "text_time", "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 80,
    "cross_attention_dim": 64, "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
}  # fmt: skip
CROSS_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"), "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}  # fmt: skip
KANDINSKY_2_2 = {
    "in_channels": 4, "out_channels": 8, "addition_embed_type": "image", "encoder_hid_dim": 32,
    "encoder_hid_dim_type": "image_proj", "cross_attention_dim": 32, "mid_block_type": "UNetMidBlock2DSimpleCrossAttn",
    "down_block_types": ("ResnetDownsampleBlock2D", "SimpleCrossAttnDownBlock2D"), "class_embed_type": None,
    "up_block_types": ("SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"), "resnet_time_scale_shift": "scale_shift",
}  # fmt: skip
KANDINSKY_2_1 = KANDINSKY_2_2 | {
    "encoder_hid_dim_type": "text_image_proj", "addition_embed_type": "text_image", "addition_embed_type_num_heads": 2,
}  # fmt: skip
PRIOR_STEPS = {
    "variance_type": "fixed_small_log", "prediction_type": "sample", "num_train_timesteps": 1000, "clip_sample": True,
    "clip_sample_range": 5.0,
}  # fmt: skip
SHAPE_PRIOR = {
    "num_embeddings": 16, "embedding_dim": 16, "embedding_proj_dim": 32, "clip_embed_dim": 32, "additional_embeddings": 0,
    "time_embed_act_fn": "gelu", "norm_in_type": "layer", "encoder_hid_proj_type": None, "added_emb_type": None,
    "time_embed_dim": 64,
}  # fmt: skip
IF = {"in_channels": 3, "out_channels": 6, "encoder_hid_dim": 32, "cross_attention_dim": 32, "sample_size": 32}
ARRAYS = {"output_type": "np"}
TENSORS = {"output_type": "pt"}
EMBEDS = {"image_embeds": lambda: noise(1, 32), "negative_image_embeds": lambda: noise(1, 32, seed=6)}
TWO_EMBEDS = {"image_embeds": lambda: noise(2, 32), "negative_image_embeds": lambda: noise(2, 32, seed=6)}
WITH_PICTURES = (
    r"Img2Img|Inpaint|Upscale|Depth2Img|Pix2Pix|ControlNet|Controlnet|Adapter|ImageToVideo|I2V|I2I|Edit|Image2Video"
    r"|VideoToWorld|Cycle|LEdits|PaintBy"
)

RULES = [
    when(WITH_PICTURES, call={"image": picture}),
    # Stable Diffusion 1, 2, XL
    when(r"StableDiffusionXL|AnimateDiffSDXL|TextToVideoZeroSDXL", parts={"unet": XL, "controlnet": XL}),
    when(
        r"StableDiffusionXLControlNetUnion",
        parts={"controlnet": {"cross_attention_dim": 64}},
        call={"control_mode": [0], "control_image": lambda: [picture()]},
    ),
    when(r"ControlNetXS", parts={"unet": {"layers_per_block": 2}, "controlnet": {}}),
    when(
        r"StableDiffusionXLControlNetXS",
        parts={
            "unet": XL | {"layers_per_block": 2},
            "controlnet": {
                "cross_attention_dim": 64,
                "transformer_layers_per_block": (1, 2),
                "use_linear_projection": True,
            },
        },
    ),
    when(r"InstructPix2Pix", parts={"unet": {"in_channels": 8}}),
    when(r"StableDiffusionXLInstructPix2Pix", parts={"unet": XL | {"in_channels": 8}}),
    when(
        r"Depth2Img",
        parts={
            "unet": {"in_channels": 5},
            "depth_estimator": "DPTForDepthEstimation",
            "feature_extractor": "DPTImageProcessor",
        },
    ),
    when(
        r"StableDiffusionUpscale",
        parts={"unet": {"in_channels": 7, "num_class_embeds": 1000}, "low_res_scheduler": "DDPMScheduler"},
        call=TWO | {"noise_level": 20},
    ),
    when(
        r"LatentUpscale",
        parts={"unet": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 160}},
        call={"prompt": PROMPT, "image": lambda: noise(1, 3, 32, 32).sigmoid()},
    ),
    when(r"LDM3D", parts={"vae": {"in_channels": 6, "out_channels": 6}}, call=ARRAYS),
    when(
        r"ImageVariation",
        parts={"feature_extractor": "CLIPImageProcessor", "image_encoder": "CLIPVisionModelWithProjection"},
        call={"image": picture},
    ),
    when(r"AttendAndExcite", call=ONE | {"token_indices": lambda: [[1, 2]], "attn_res": (8, 8)}),
    when(r"LatentConsistency", parts={"unet": {"time_cond_proj_dim": 32}}, call={"original_inference_steps": 20}),
    when(r"^CycleDiffusion", call=ONE | {"source_prompt": "a blue heart", "source_guidance_scale": 1}),
    when(
        r"^StableDiffusion(XL)?Adapter",
        parts={"unet": CROSS_FIRST, "adapter": {"channels": [16, 32], "downscale_factor": 2}},
        call={"prompt": PROMPT},
    ),
    when(r"StableDiffusionXLAdapter", parts={"unet": XL | CROSS_FIRST}),
    when(
        r"GLIGEN",
        parts={"unet": {"attention_type": "gated", "cross_attention_dim": 32}},
        call={
            "prompt": PROMPT,
            "gligen_phrases": lambda: ["a heart"],
            "gligen_boxes": lambda: [[0.1, 0.1, 0.6, 0.6]],
        },
    ),
    when(r"UnCLIP", call=ARRAYS),
    when(r"PaintByExample", call={"example_image": picture, "mask_image": mask}),
    # Kolors: XL with another encoder
    when(
        r"^Kolors",
        parts={
            "unet": XL
            | {
                "encoder_hid_dim": 32,
                "encoder_hid_dim_type": "text_proj",
                "cross_attention_dim": 32,
            },
        },
    ),
    when(r"^KolorsPAG", settings={"pag_applied_layers": ["mid"]}),
    # Marigold: a picture in, its geometry out
    when(
        r"^Marigold",
        parts={"unet": {"in_channels": 8, "cross_attention_dim": 32}},
        settings={
            "default_processing_resolution": 32,
            "default_denoising_steps": 4,
            "scale_invariant": True,
            "shift_invariant": True,
        },
        call=ARRAYS | {"image": picture, "processing_resolution": 32, "ensemble_size": 3},
    ),
    when(
        r"MarigoldIntrinsics",
        settings={
            "target_properties": {"target_names": ["albedo"], "albedo": {"prediction_space": "srgb", "up_to_scale": False}},
        },
    ),
    # Kandinsky 2 and 3
    when(r"KandinskyV22", parts={"unet": KANDINSKY_2_2}),
    when(r"^KandinskyV22(Controlnet)?Pipeline", call=TWO_EMBEDS | {"num_images_per_prompt": 1}),
    when(
        r"KandinskyV22Controlnet",
        parts={"unet": KANDINSKY_2_2 | {"addition_embed_type": "image_hint", "in_channels": 8}},
        call=TENSORS | {"hint": lambda: torch.ones(2, 3, 128, 128)},
    ),
    when(r"KandinskyV22ControlnetImg2Img", call={"hint": lambda: torch.ones(1, 3, 128, 128)}),
    when(r"KandinskyV22Inpaint", parts={"unet": KANDINSKY_2_2 | {"in_channels": 9}}),
    when(r"KandinskyV22.*(Img2Img|Inpaint)(?!.*Combined)", call=EMBEDS | {"num_images_per_prompt": 1}),
    when(r"^Kandinsky(Img2Img|Inpaint)?(Combined)?Pipeline", parts={"unet": KANDINSKY_2_1}, call=TENSORS),
    when(r"^Kandinsky(Img2Img|Inpaint)?Pipeline", call=EMBEDS | ONE),
    when(r"^KandinskyInpaint", parts={"unet": KANDINSKY_2_1 | {"in_channels": 9}}),
    when(r"^KandinskyImg2ImgCombined|^KandinskyInpaintCombined|Kandinsky3Img2Img", call=ONE),
    when(
        r"Kandinsky.*Prior",
        parts={"scheduler": ("UnCLIPScheduler", PRIOR_STEPS)},
        attributes={"prior.clip_std": torch.nn.Parameter(torch.ones(1, 32))},  # it comes as zeros: nothing would be left
        call=TENSORS,
    ),
    when(
        r"Kandinsky.*Combined|^UnCLIPPipeline|StableUnCLIPPipeline",
        parts={"prior_scheduler": ("UnCLIPScheduler", PRIOR_STEPS)},
    ),
    # DeepFloyd IF, in pixels
    when(
        r"^IF",
        parts={"unet": IF, "scheduler": ("DDPMScheduler", {"variance_type": "learned_range"})},
        call=TENSORS | {"original_image": None},
    ),
    when(r"^IF.*SuperResolution", parts={"unet": IF | {"in_channels": 6, "sample_size": 16, "num_class_embeds": 1000}}),
    when(r"^IF(Img2Img|Inpainting|SuperRes)", call=TWO),
    when(r"^IF.+SuperResolution", call={"original_image": picture}),
    when(r"^IFSuperResolution", call={"image": picture}),
    # without prompts
    when(r"^(DDPM|DDIM|PNDM|ScoreSdeVe|KarrasVe|ConsistencyModel|RePaint|LDM|DanceDiffusion)Pipeline", call=ARRAYS),
    when(r"^ConsistencyModel", parts={"scheduler": "CMStochasticIterativeScheduler"}),
    when(r"^LDMPipeline", parts={"unet": {"in_channels": 4, "out_channels": 4}, "vqvae": {"latent_channels": 4}}),
    when(
        r"LDMSuperResolution",
        parts={"unet": {"in_channels": 6, "out_channels": 3}, "vqvae": {"latent_channels": 3, "vq_embed_dim": 3}},
        call=ARRAYS | {"image": picture},
    ),
    when(
        r"LDMTextToImage",
        parts={
            "bert": "CLIPTextModel",
            "tokenizer": "CLIPTokenizer",
            "unet": "UNet2DConditionModel",
            "vqvae": "AutoencoderKL",
        },
    ),
    # two stages in other spaces
    when(
        r"(StableCascade|Wuerstchen)Decoder",
        call={"image_embeddings": lambda: noise(2, 4, 4, 4, seed=3)},
    ),
    when(
        r"Wuerstchen(Decoder|Combined)",
        parts={"prior_prior": {"c_in": 16}},
        call={"image_embeddings": lambda: noise(2, 16, 4, 4, seed=3)},
    ),
    # Shap-E: a latent of a shape
    when(
        r"^ShapE",
        parts={
            "prior": SHAPE_PRIOR,
            "scheduler": (
                "HeunDiscreteScheduler",
                {"beta_schedule": "exp", "prediction_type": "sample", "clip_sample": True, "use_karras_sigmas": True},
            ),
        },
        call={"frame_size": 32},
    ),
    when(r"ShapEImg2Img", parts={"prior": SHAPE_PRIOR | {"embedding_proj_norm_type": "layer"}}, call={"image": picture}),
]
