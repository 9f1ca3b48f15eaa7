"""Image pipelines on transformers."""

from tests.tiny import autoencoders, inputs
from tests.tiny.rules import ONE, PROMPT, TWO, mask, picture, when

GEMMA = {"text_encoder": "Gemma2PreTrainedModel"}

RULES = [
    when(r"^StableDiffusion3", parts={"text_encoder_3": {"d_model": 64}}),
    when(r"^StableDiffusion3.*ControlNet", call={"control_image": picture}),
    when(r"^StableDiffusion3PAG|PixArtSigmaPAG", settings={"pag_applied_layers": "blocks.0"}),
    when(
        r"StableDiffusion3Inpaint|StableDiffusion3ControlNetInpainting",
        parts={
            "transformer": {"in_channels": 16, "out_channels": 16},
            "vae": {"latent_channels": 16},
            "controlnet": {"in_channels": 16, "extra_conditioning_channels": 1},
        },
        call={"control_image": picture, "control_mask": mask},
    ),
    when(r"^DiT", parts={"transformer": {"num_embeds_ada_norm": 1000}}, call={"class_labels": lambda: [1, 1, 2, 2]}),
    # Flux
    when(r"^Flux", call={"image": picture, "mask_image": mask, "control_image": picture}),
    when(r"^(FluxPipeline|FluxControlNetPipeline|FluxControlPipeline)$", call={"image": None}),
    when(
        r"^FluxControl(Img2Img|Inpaint)?Pipeline",
        parts={"transformer": {"in_channels": 32, "out_channels": 16}},
    ),
    when(r"FluxFill", parts={"transformer": {"in_channels": 48, "out_channels": 16}}),
    when(r"FluxKontext", call={"_auto_resize": False, "max_area": 1024}),
    when(r"^Flux2", call={"text_encoder_out_layers": (0, 1, 2), "image": None}),
    when(r"Flux2KleinInpaint", call={"image": picture}),
    # others, by name
    when(
        r"^BriaFiboEdit",
        call={"prompt": '{"edit_instruction": "make it red"}', "image": picture, "num_images_per_prompt": 1},
    ),
    when(r"^BriaFibo(Edit)?Pipeline", parts={"text_encoder": {"vocab_size": 128010}}),  # prompts start with token 128000
    when(r"^BriaFibo2", parts={"text_encoder": {"text": {"num_hidden_layers": 36}}}),  # it reads layers by number
    when(r"^CogView3", parts={"scheduler": "CogVideoXDDIMScheduler"}),
    when(r"CogView4Control", parts={"transformer": {"in_channels": 8}}, call={"control_image": picture}),
    when(r"^DreamLite", call=ONE),
    when(r"^HiDream", attributes={"default_sample_size": 16}, call={"height": 64, "width": 64}),
    when(
        r"^HunyuanDiT",
        parts={"tokenizer_2": "T5Tokenizer", "text_encoder_2": "T5EncoderModel", "vae": autoencoders.KL8},
        call={"height": 64, "width": 64},
    ),
    when(r"HunyuanDiTControlNet", call={"control_image": picture}),
    when(r"HunyuanDiTPAG", settings={"pag_applied_layers": "blocks.1"}),
    when(
        r"HunyuanImageRefiner",
        parts={
            "transformer": {
                "in_channels": 8,
                "patch_size": (1, 1, 1),
                "rope_axes_dim": (4, 6, 6),
                "text_embed_2_dim": None,
            },
        },
        call=ONE | {"image": picture},
    ),
    when(
        r"^Ideogram4",
        parts={"text_encoder": "Qwen3Model"},
        call={"guidance_scale": 4.0, "guidance_schedule": inputs.NOTHING},
    ),
    when(r"Kandinsky5", call={"max_sequence_length": 512}),  # its template takes 129 tokens
    when(r"^Krea2", settings={"text_encoder_select_layers": (0, 1)}),
    when(r"^LongCatImage", parts={"vae": {"latent_channels": 16}, "transformer": {"in_channels": 64}}),
    when(r"^LongCatImagePipeline", call=TWO),
    when(r"^Nucleus", call={"return_index": -1}),
    when(
        r"^OmniGen",
        parts={
            "scheduler": ("FlowMatchEulerDiscreteScheduler", {"invert_sigmas": True, "num_train_timesteps": 1}),
            "vae": autoencoders.KL8,
        },
        call=ONE | {"max_sequence_length": None, "height": 64, "width": 64, "max_input_image_size": 64},
    ),
    when(r"^PixArt", parts={"transformer": {"out_channels": 8}}),
    when(r"^PRX", parts=GEMMA, call=ONE),
    when(r"^PRXPixel", parts=GEMMA | {"transformer": {"in_channels": 3}}),
    when(
        r"QwenImageControlNetInpaint",
        parts={"controlnet": {"extra_condition_channels": 4}},
        call={"control_image": picture, "control_mask": mask},
    ),
    when(r"QwenImageLayered", call={"image": picture, "output_type": "pt", "prompt": PROMPT}),
    when(
        r"SanaSprint",
        parts={
            "scheduler": "SCMScheduler",
            "transformer": {"guidance_embeds": True, "qk_norm": "rms_norm_across_heads"},
        },
        call={"num_inference_steps": 2, "strength": 1.0},
    ),
    when(r"^VisualCloze", call={"task_prompt": "paint", "content_prompt": "a heart"}),
    when(r"^ZImage", parts={"text_encoder": "Qwen3Model"}),
    when(r"^Z.*ControlNet", call={"control_image": picture}),
    when(r"ZImageControlNetInpaint", parts={"controlnet": {"control_in_dim": 9}}, call=ONE),
]
