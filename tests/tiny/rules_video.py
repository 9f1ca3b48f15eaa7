"""Video and audio pipelines."""

from tests.tiny import inputs
from tests.tiny.rules import CLIP, PROMPT, few_frames, image, rule

CLIPS = (
    r"AnimateDiff|PIA|Video|^Wan|^CogVideoX|^LTX|^Mochi|^Allegro|^Latte|^Cosmos|^SkyReels|^EasyAnimate|^ConsisID|^Helios"
    r"|^AnyFlow|^ChronoEdit|^LucyEdit|^Kandinsky5.*V|^I2VGen"
)

RULES = [
    rule(CLIPS, call={"num_videos_per_prompt": 1}),
    rule(r"AnimateDiff|PIA|TextToVideoSD|VideoToVideoSD|I2VGen|StableVideo", call={"num_frames": 4}),
    rule(r"ImageToVideo|I2V|ConsisID|HunyuanVideoFramepack", call=CLIP),
    rule(r"VideoToVideo(?!.*DiffusionForcing)|LTXCondition", call={"video": inputs.clip, "prompt": PROMPT}),
    # based on Stable Diffusion
    rule(r"AnimateDiff.*ControlNet", call={"conditioning_frames": few_frames, "prompt": PROMPT, "image": None}),
    rule(r"VideoToVideoSD|AnimateDiffVideoToVideo", call={"video": few_frames, "prompt": PROMPT}),
    rule(r"^PIA", components={"unet": {"in_channels": 9}}, call={"image": image, "prompt": PROMPT}),
    rule(
        r"StableVideoDiffusion",
        components={
            "image_encoder": ("CLIPVisionModelWithProjection", {"image_size": 224, "patch_size": 56}),
            "feature_extractor": "CLIPImageProcessor",
        },
    ),
    rule(r"TextToVideoZero", call=CLIP | {"video_length": 2, "t0": 1, "t1": 3, "num_images_per_prompt": None}),
    # based on transformers, by name
    rule(r"^AnyFlowFAR", call={"video": None, "num_frames": 9}),
    rule(r"^CogVideoX|^ConsisID", components={"scheduler": "CogVideoXDDIMScheduler"}),
    rule(r"CogVideoXFunControl", call={"control_video": inputs.clip, "prompt": PROMPT}),
    rule(r"CogVideoX(FunControl|ImageToVideo)|ConsisID", components={"transformer": {"in_channels": 8}}),
    rule(
        r"^ChronoEdit|^WanAnimate", components={"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}
    ),
    rule(r"^Cosmos(?!3)", components={"safety_checker": "CosmosSafetyChecker"}),
    rule(r"^CosmosTextToWorld", components={"transformer": {"in_channels": 4}}),
    rule(
        r"^CosmosVideoToWorld",
        components={"transformer": {"in_channels": 5}},
        call={"video": inputs.clip, "image": inputs.EXPLICIT_NONE, "prompt": PROMPT},
    ),
    rule(r"^Cosmos2TextToImage", components={"transformer": {"in_channels": 16, "out_channels": 16}}),
    rule(
        r"^Cosmos2Video|^Cosmos2_5",
        components={"transformer": {"in_channels": 17, "out_channels": 16}},
        call={"video": None, "prompt": PROMPT},
    ),
    rule(
        r"^Cosmos2(Text|Video)", components={"scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True})}
    ),
    rule(
        r"^Cosmos2_5",
        components={
            "transformer": {
                "in_channels": 17,
                "out_channels": 16,
                "use_crossattn_projection": True,
                "crossattn_proj_in_channels": 64,
                "encoder_hidden_states_channels": 32,
            },
        },
    ),
    rule(r"^EasyAnimate", components={"tokenizer": "Qwen2Tokenizer"}, call={"negative_prompt": ["", ""]}),
    rule(
        r"^Helios",
        components={"scheduler": ("HeliosScheduler", {"stages": 1, "stage_range": [0, 1]})},
        call={"num_frames": 33},
    ),
    rule(
        r"^HunyuanVideo15",
        call={"num_inference_steps": 2},
        attributes={"tokenizer_max_length": 300, "vision_num_semantic_tokens": 16},
    ),
    rule(r"^HunyuanVideoPipeline", call={"max_sequence_length": 256}),  # the tiny tokenizer needs more tokens per word
    rule(r"HunyuanSkyreels", components={"transformer": {"in_channels": 8}}),
    rule(
        r"^LTX2",
        call={
            "num_frames": 5,
            "prompt": PROMPT,
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
            "spatio_temporal_guidance_blocks": inputs.EXPLICIT_NONE,
            "use_cross_timestep": False,
            "frame_rate": 25.0,
        },
    ),
    rule(r"LucyEdit", components={"transformer": {"in_channels": 32}}, call={"prompt": PROMPT, "video": inputs.clip}),
    rule(r"^Latte", call={"mask_feature": False}),  # diffusers masks the second clip of a prompt with another prompt's mask
    rule(r"^MotifVideoImage2Video", components={"transformer": {"image_embed_dim": 32}}, call=CLIP),
    rule(
        r"^Motif",
        components={"guider": "ClassifierFreeGuidance", "scheduler": "FlowMatchEulerDiscreteScheduler"},
    ),
    rule(r"Sana.*Video", components={"vae": "AutoencoderKLWan"}),
    rule(
        r"^SkyReelsV2ImageToVideo",
        components={
            "transformer": {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24},
            "image_processor": "CLIPImageProcessor",
            "image_encoder": "CLIPVisionModelWithProjection",
        },
    ),
    rule(r"^Wan(Pipeline|ImageToVideo|VACE|Animate)|^LucyEdit", init={"boundary_ratio": None}),
    rule(r"^Wan(Pipeline|VACE|Animate)", components={"transformer": {}}),
    rule(r"^WanImageToVideo", components={"transformer": {"in_channels": 36}}),
    rule(
        r"^WanVACE",
        components={"transformer": {"vace_in_channels": 96}},
        call={"prompt": PROMPT, "video": None, "mask": None, "image": None},
    ),
    rule(
        r"WanAnimate",
        call={
            "image": image,
            "pose_video": lambda: inputs.clip(17),
            "face_video": lambda: inputs.clip(17),
            "prompt": PROMPT,
            "segment_frame_length": 17,
            "num_frames": 17,
        },
    ),
    # audio
    rule(
        r"^AudioLDM|^MusicLDM", components={"vae": {"in_channels": 1, "out_channels": 1}}, call={"audio_length_in_s": 0.1}
    ),
    rule(r"^AudioLDM2", components={"tokenizer_2": "T5Letters"}),
    rule(
        r"^AceStep",
        components={"text_encoder": "Qwen3Model", "vae": {"decoder_input_channels": 8}},
        call={"audio_duration": 2.0, "lyrics": "la la", "prompt": PROMPT},
    ),
    rule(
        r"^StableAudioPipeline",
        components={"scheduler": "CosineDPMSolverMultistepScheduler"},
        call={"audio_end_in_s": 1.0},
    ),
]
