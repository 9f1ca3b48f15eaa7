"""Pipelines with UNets: Stable Diffusion and derivatives, Kandinsky, DeepFloyd IF, unconditional ones."""

import torch

from tests.tiny.rules import ONE, PROMPT, TWO, image, mask, noise, rule

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
IMAGE_CONDITIONED = (
    r"Img2Img|Inpaint|Upscale|Depth2Img|Pix2Pix|ControlNet|Controlnet|Adapter|ImageToVideo|I2V|I2I|Edit|Image2Video"
    r"|VideoToWorld|Cycle|LEdits|PaintBy"
)

RULES = [
    rule(IMAGE_CONDITIONED, call={"image": image}),
    # Stable Diffusion 1, 2, XL
    rule(r"StableDiffusionXL|AnimateDiffSDXL|TextToVideoZeroSDXL", components={"unet": XL, "controlnet": XL}),
    rule(
        r"StableDiffusionXLControlNetUnion",
        components={"controlnet": {"cross_attention_dim": 64}},
        call={"control_mode": [0], "control_image": lambda: [image()]},
    ),
    rule(r"ControlNetXS", components={"unet": {"layers_per_block": 2}, "controlnet": {}}),
    rule(
        r"StableDiffusionXLControlNetXS",
        components={
            "unet": XL | {"layers_per_block": 2},
            "controlnet": {
                "cross_attention_dim": 64,
                "transformer_layers_per_block": (1, 2),
                "use_linear_projection": True,
            },
        },
    ),
    rule(r"InstructPix2Pix", components={"unet": {"in_channels": 8}}),
    rule(r"StableDiffusionXLInstructPix2Pix", components={"unet": XL | {"in_channels": 8}}),
    rule(
        r"Depth2Img",
        components={
            "unet": {"in_channels": 5},
            "depth_estimator": "DPTForDepthEstimation",
            "feature_extractor": "DPTImageProcessor",
        },
    ),
    rule(
        r"StableDiffusionUpscale",
        components={"unet": {"in_channels": 7, "num_class_embeds": 1000}, "low_res_scheduler": "DDPMScheduler"},
        call=TWO | {"noise_level": 20},
    ),
    rule(
        r"LatentUpscale",
        components={"unet": {"in_channels": 8, "out_channels": 5, "time_cond_proj_dim": 160}},
        call={"prompt": PROMPT, "image": lambda: noise(1, 3, 32, 32).sigmoid()},
    ),
    rule(r"LDM3D", components={"vae": {"in_channels": 6, "out_channels": 6}}, call=ARRAYS),
    rule(
        r"ImageVariation",
        components={"feature_extractor": "CLIPImageProcessor", "image_encoder": "CLIPVisionModelWithProjection"},
        call={"image": image},
    ),
    rule(r"AttendAndExcite", call=ONE | {"token_indices": lambda: [[1, 2]], "attn_res": (8, 8)}),
    rule(r"LatentConsistency", components={"unet": {"time_cond_proj_dim": 32}}, call={"original_inference_steps": 20}),
    rule(r"^CycleDiffusion", call=ONE | {"source_prompt": "a blue heart", "source_guidance_scale": 1}),
    rule(
        r"^StableDiffusion(XL)?Adapter",
        components={"unet": CROSS_FIRST, "adapter": {"channels": [16, 32], "downscale_factor": 2}},
        call={"prompt": PROMPT},
    ),
    rule(r"StableDiffusionXLAdapter", components={"unet": XL | CROSS_FIRST}),
    rule(
        r"GLIGEN",
        components={"unet": {"attention_type": "gated", "cross_attention_dim": 32}},
        call={
            "prompt": PROMPT,
            "gligen_phrases": lambda: ["a heart"],
            "gligen_boxes": lambda: [[0.1, 0.1, 0.6, 0.6]],
        },
    ),
    rule(r"UnCLIP", call=ARRAYS),
    rule(r"PaintByExample", call={"example_image": image, "mask_image": mask}),
    # Kolors: SDXL with another text encoder
    rule(
        r"^Kolors",
        components={
            "unet": XL
            | {
                "encoder_hid_dim": 32,
                "encoder_hid_dim_type": "text_proj",
                "cross_attention_dim": 32,
            },
        },
    ),
    rule(r"^KolorsPAG", init={"pag_applied_layers": ["mid"]}),
    # Marigold: depth, normals and intrinsics of an image
    rule(
        r"^Marigold",
        components={"unet": {"in_channels": 8, "cross_attention_dim": 32}},
        init={
            "default_processing_resolution": 32,
            "default_denoising_steps": 4,
            "scale_invariant": True,
            "shift_invariant": True,
        },
        call=ARRAYS | {"image": image, "processing_resolution": 32, "ensemble_size": 3},
    ),
    rule(
        r"MarigoldIntrinsics",
        init={
            "target_properties": {"target_names": ["albedo"], "albedo": {"prediction_space": "srgb", "up_to_scale": False}},
        },
    ),
    # Kandinsky 2 and 3
    rule(r"KandinskyV22", components={"unet": KANDINSKY_2_2}),
    rule(r"^KandinskyV22(Controlnet)?Pipeline", call=TWO_EMBEDS | {"num_images_per_prompt": 1}),
    rule(
        r"KandinskyV22Controlnet",
        components={"unet": KANDINSKY_2_2 | {"addition_embed_type": "image_hint", "in_channels": 8}},
        call=TENSORS | {"hint": lambda: torch.ones(2, 3, 128, 128)},
    ),
    rule(r"KandinskyV22ControlnetImg2Img", call={"hint": lambda: torch.ones(1, 3, 128, 128)}),
    rule(r"KandinskyV22Inpaint", components={"unet": KANDINSKY_2_2 | {"in_channels": 9}}),
    rule(r"KandinskyV22.*(Img2Img|Inpaint)(?!.*Combined)", call=EMBEDS | {"num_images_per_prompt": 1}),
    rule(r"^Kandinsky(Img2Img|Inpaint)?(Combined)?Pipeline", components={"unet": KANDINSKY_2_1}, call=TENSORS),
    rule(r"^Kandinsky(Img2Img|Inpaint)?Pipeline", call=EMBEDS | ONE),
    rule(r"^KandinskyInpaint", components={"unet": KANDINSKY_2_1 | {"in_channels": 9}}),
    rule(r"^KandinskyImg2ImgCombined|^KandinskyInpaintCombined|Kandinsky3Img2Img", call=ONE),
    rule(
        r"Kandinsky.*Prior",
        components={"scheduler": ("UnCLIPScheduler", PRIOR_STEPS)},
        attributes={"prior.clip_std": torch.nn.Parameter(torch.ones(1, 32))},  # by default 0, which erases the embedding
        call=TENSORS,
    ),
    rule(
        r"Kandinsky.*Combined|^UnCLIPPipeline|StableUnCLIPPipeline",
        components={"prior_scheduler": ("UnCLIPScheduler", PRIOR_STEPS)},
    ),
    # DeepFloyd IF, in pixel space
    rule(
        r"^IF",
        components={"unet": IF, "scheduler": ("DDPMScheduler", {"variance_type": "learned_range"})},
        call=TENSORS | {"original_image": None},
    ),
    rule(
        r"^IF.*SuperResolution", components={"unet": IF | {"in_channels": 6, "sample_size": 16, "num_class_embeds": 1000}}
    ),
    rule(r"^IF(Img2Img|Inpainting|SuperRes)", call=TWO),
    rule(r"^IF.+SuperResolution", call={"original_image": image}),
    rule(r"^IFSuperResolution", call={"image": image}),
    # without prompts
    rule(r"^(DDPM|DDIM|PNDM|ScoreSdeVe|KarrasVe|ConsistencyModel|RePaint|LDM|DanceDiffusion)Pipeline", call=ARRAYS),
    rule(r"^ConsistencyModel", components={"scheduler": "CMStochasticIterativeScheduler"}),
    rule(r"^LDMPipeline", components={"unet": {"in_channels": 4, "out_channels": 4}, "vqvae": {"latent_channels": 4}}),
    rule(
        r"LDMSuperResolution",
        components={"unet": {"in_channels": 6, "out_channels": 3}, "vqvae": {"latent_channels": 3, "vq_embed_dim": 3}},
        call=ARRAYS | {"image": image},
    ),
    rule(
        r"LDMTextToImage",
        components={
            "bert": "CLIPTextModel",
            "tokenizer": "CLIPTokenizer",
            "unet": "UNet2DConditionModel",
            "vqvae": "AutoencoderKL",
        },
    ),
    # Stable Cascade and Wuerstchen: decoder stages
    rule(
        r"(StableCascade|Wuerstchen)Decoder",
        call={"image_embeddings": lambda: noise(2, 4, 4, 4, seed=3)},
    ),
    rule(r"StableCascade(Decoder|Combined)", init={"latent_dim_scale": 4.0}),
    rule(
        r"Wuerstchen(Decoder|Combined)",
        components={"prior_prior": {"c_in": 16}},
        call={"image_embeddings": lambda: noise(2, 16, 4, 4, seed=3)},
    ),
    # Shap-E: latents of 3D shapes
    rule(
        r"^ShapE",
        components={
            "prior": SHAPE_PRIOR,
            "scheduler": (
                "HeunDiscreteScheduler",
                {"beta_schedule": "exp", "prediction_type": "sample", "clip_sample": True, "use_karras_sigmas": True},
            ),
        },
        call={"frame_size": 32},
    ),
    rule(r"ShapEImg2Img", components={"prior": SHAPE_PRIOR | {"embedding_proj_norm_type": "layer"}}, call={"image": image}),
]
