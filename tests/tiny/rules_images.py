"""Image pipelines with transformers as denoisers."""

from tests.tiny import autoencoders, inputs
from tests.tiny.rules import ONE, PROMPT, TWO, image, mask, rule

GEMMA = {"text_encoder": "Gemma2PreTrainedModel"}

RULES = [
    rule(r"^StableDiffusion3", components={"text_encoder_3": {"d_model": 64}}),
    rule(r"^StableDiffusion3.*ControlNet", call={"control_image": image}),
    rule(r"^StableDiffusion3PAG|PixArtSigmaPAG", init={"pag_applied_layers": "blocks.0"}),
    rule(
        r"StableDiffusion3Inpaint|StableDiffusion3ControlNetInpainting",
        components={
            "transformer": {"in_channels": 16, "out_channels": 16},
            "vae": {"latent_channels": 16},
            "controlnet": {"in_channels": 16, "extra_conditioning_channels": 1},
        },
        call={"control_image": image, "control_mask": mask},
    ),
    rule(r"^DiT", components={"transformer": {"num_embeds_ada_norm": 1000}}, call={"class_labels": lambda: [1, 1, 2, 2]}),
    # Flux
    rule(r"^Flux", call={"image": image, "mask_image": mask, "control_image": image}),
    rule(r"^(FluxPipeline|FluxControlNetPipeline|FluxControlPipeline)$", call={"image": None}),
    rule(
        r"^FluxControl(Img2Img|Inpaint)?Pipeline",
        components={"transformer": {"in_channels": 32, "out_channels": 16}},
    ),
    rule(r"FluxFill", components={"transformer": {"in_channels": 48, "out_channels": 16}}),
    rule(r"FluxKontext", call={"_auto_resize": False, "max_area": 1024}),
    rule(r"^Flux2", call={"text_encoder_out_layers": (0, 1, 2), "image": None}),
    rule(r"Flux2KleinInpaint", call={"image": image}),
    # others, by name
    rule(
        r"^BriaFiboEdit",
        call={"prompt": '{"edit_instruction": "make it red"}', "image": image, "num_images_per_prompt": 1},
    ),
    # prompts start with token 128000
    rule(r"^BriaFibo(Edit)?Pipeline", components={"text_encoder": {"vocab_size": 128010}}),
    # reads the hidden states of fixed layers
    rule(r"^BriaFibo2", components={"text_encoder": {"text": {"num_hidden_layers": 36}}}),
    rule(r"^CogView3", components={"scheduler": "CogVideoXDDIMScheduler"}),
    rule(r"CogView4Control", components={"transformer": {"in_channels": 8}}, call={"control_image": image}),
    rule(r"^DreamLite", call=ONE),
    rule(r"^HiDream", attributes={"default_sample_size": 16}, call={"height": 64, "width": 64}),
    rule(
        r"^HunyuanDiT",
        components={"tokenizer_2": "T5Tokenizer", "text_encoder_2": "T5EncoderModel", "vae": autoencoders.KL8},
        call={"height": 64, "width": 64},
    ),
    rule(r"HunyuanDiTControlNet", call={"control_image": image}),
    rule(r"HunyuanDiTPAG", init={"pag_applied_layers": "blocks.1"}),
    rule(
        r"^HunyuanImagePipeline",
        components={"guider": "AdaptiveProjectedMixGuidance"},  # that of its calls without one
        attributes={"tokenizer_max_length": 300},
    ),
    rule(
        r"HunyuanImageRefiner",
        components={
            "transformer": {
                "in_channels": 8,
                "patch_size": (1, 1, 1),
                "rope_axes_dim": (4, 6, 6),
                "text_embed_2_dim": None,
            },
        },
        call=ONE | {"image": image},
    ),
    rule(
        r"^Ideogram4",
        components={"text_encoder": "Qwen3Model"},
        call={"guidance_scale": 4.0, "guidance_schedule": inputs.EXPLICIT_NONE},
    ),
    rule(r"Kandinsky5", call={"max_sequence_length": 512}),  # its prompt template has 129 tokens
    rule(r"^Kandinsky5T2I", attributes={"resolutions": [(32, 32)]}),
    # their prompt templates, too, are longer than the default limit of 16 tokens
    rule(r"^Flux2Pipe|^Krea2|^Lumina2|^Nucleus|^Ovis|^QwenImage", call={"max_sequence_length": 256}),
    rule(r"^Krea2", init={"text_encoder_select_layers": (0, 1)}),
    rule(r"^LongCatImage", components={"vae": {"latent_channels": 16}, "transformer": {"in_channels": 64}}),
    rule(r"^LongCatImagePipeline", call=TWO, attributes={"tokenizer_max_length": 64}),  # of a prompt rewritten, too
    rule(r"^Nucleus", call={"return_index": -1}),
    rule(
        r"^OmniGen",
        components={
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "num_train_timesteps": 1}),
            "vae": autoencoders.KL8,
        },
        call=ONE | {"max_sequence_length": None, "height": 64, "width": 64, "max_input_image_size": 64},
    ),
    rule(r"^PixArt", components={"transformer": {"out_channels": 8}}),
    rule(r"^PRX", components=GEMMA, call=ONE),
    rule(r"^PRXPixel", components=GEMMA | {"transformer": {"in_channels": 3}}),
    rule(
        r"QwenImageControlNetInpaint",
        components={"controlnet": {"extra_condition_channels": 4}},
        call={"control_image": image, "control_mask": mask},
    ),
    rule(r"QwenImageLayered", call={"image": image, "output_type": "pt", "prompt": PROMPT}),
    rule(
        r"SanaSprint",
        components={
            "scheduler": "SCMScheduler",
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        },
        call={"num_inference_steps": 2, "strength": 1.0},
    ),
    rule(r"^VisualCloze", call={"task_prompt": "paint", "content_prompt": "a heart"}),
    rule(r"^ZImage", components={"text_encoder": "Qwen3Model"}),
    rule(r"^Z.*ControlNet", call={"control_image": image}),
    rule(r"ZImageControlNetInpaint", components={"controlnet": {"control_in_dim": 9}}, call=ONE),
]
