"""Clips and sound."""

from tests.tiny import inputs
from tests.tiny.rules import CLIP, PROMPT, few_frames, picture, when

CLIPS = (
    r"AnimateDiff|PIA|Video|^Wan|^CogVideoX|^LTX|^Mochi|^Allegro|^Latte|^Cosmos|^SkyReels|^EasyAnimate|^ConsisID|^Helios"
    r"|^AnyFlow|^ChronoEdit|^LucyEdit|^Kandinsky5.*V|^I2VGen"
)

RULES = [
    when(CLIPS, call={"num_videos_per_prompt": 1}),
    when(r"AnimateDiff|PIA|TextToVideoSD|VideoToVideoSD|I2VGen|StableVideo", call={"num_frames": 4}),
    when(r"ImageToVideo|I2V|ConsisID|HunyuanVideoFramepack", call=CLIP),
    when(r"VideoToVideo(?!.*DiffusionForcing)|LTXCondition", call={"video": inputs.clip, "prompt": PROMPT}),
    # on Stable Diffusion
    when(r"AnimateDiff.*ControlNet", call={"conditioning_frames": few_frames, "prompt": PROMPT, "image": None}),
    when(r"VideoToVideoSD|AnimateDiffVideoToVideo", call={"video": few_frames, "prompt": PROMPT}),
    when(r"^PIA", parts={"unet": {"in_channels": 9}}, call={"image": picture, "prompt": PROMPT}),
    when(
        r"StableVideoDiffusion",
        parts={
            "image_encoder": ("CLIPVisionModelWithProjection", {"image_size": 224, "patch_size": 56}),
            "feature_extractor": "CLIPImageProcessor",
        },
    ),
    when(r"TextToVideoZero", call=CLIP | {"video_length": 2, "t0": 1, "t1": 3, "num_images_per_prompt": None}),
    # on transformers, by name
    when(r"^AnyFlowFAR", call={"video": None, "num_frames": 9}),
    when(r"^CogVideoX|^ConsisID", parts={"scheduler": "CogVideoXDDIMScheduler"}),
    when(r"CogVideoXFunControl", call={"control_video": inputs.clip, "prompt": PROMPT}),
    when(r"CogVideoX(FunControl|ImageToVideo)|ConsisID", parts={"transformer": {"in_channels": 8}}),
    when(r"^ChronoEdit|^WanAnimate", parts={"image_encoder": "CLIPVisionModel", "image_processor": "CLIPImageProcessor"}),
    when(r"^Cosmos(?!3)", parts={"safety_checker": "CosmosSafetyChecker"}),
    when(r"^CosmosTextToWorld", parts={"transformer": {"in_channels": 4}}),
    when(
        r"^CosmosVideoToWorld",
        parts={"transformer": {"in_channels": 5}},
        call={"video": inputs.clip, "image": inputs.NOTHING, "prompt": PROMPT},
    ),
    when(r"^Cosmos2TextToImage", parts={"transformer": {"in_channels": 16, "out_channels": 16}}),
    when(
        r"^Cosmos2Video|^Cosmos2_5",
        parts={"transformer": {"in_channels": 17, "out_channels": 16}},
        call={"video": None, "prompt": PROMPT},
    ),
    when(r"^Cosmos2(Text|Video)", parts={"scheduler": ("FlowMatchEulerDiscreteScheduler", {"use_karras_sigmas": True})}),
    when(
        r"^Cosmos2_5",
        parts={
            "transformer": {
                "in_channels": 17,
                "out_channels": 16,
                "use_crossattn_projection": True,
                "crossattn_proj_in_channels": 64,
                "encoder_hidden_states_channels": 32,
            },
        },
    ),
    when(r"^EasyAnimate", parts={"tokenizer": "Qwen2Tokenizer"}, call={"negative_prompt": ["", ""]}),
    when(
        r"^Helios",
        parts={"scheduler": ("HeliosScheduler", {"stages": 1, "stage_range": [0, 1]})},
        call={"num_frames": 33},
    ),
    when(r"HunyuanSkyreels", parts={"transformer": {"in_channels": 8}}),
    when(
        r"^LTX2",
        call={
            "num_frames": 5,
            "prompt": PROMPT,
            "stg_scale": 0.0,
            "modality_scale": 1.0,
            "audio_guidance_scale": 1.0,
            "audio_stg_scale": 0.0,
            "audio_modality_scale": 1.0,
            "spatio_temporal_guidance_blocks": inputs.NOTHING,
            "use_cross_timestep": False,
            "frame_rate": 25.0,
        },
    ),
    when(r"LucyEdit", parts={"transformer": {"in_channels": 32}}, call={"prompt": PROMPT, "video": inputs.clip}),
    when(r"^Motif", parts={"guider": "ClassifierFreeGuidance"}),
    when(r"Sana.*Video", parts={"vae": "AutoencoderKLWan"}),
    when(
        r"^SkyReelsV2ImageToVideo",
        parts={
            "transformer": {"in_channels": 36, "image_dim": 32, "added_kv_proj_dim": 24},
            "image_processor": "CLIPImageProcessor",
            "image_encoder": "CLIPVisionModelWithProjection",
        },
    ),
    when(r"^Wan(Pipeline|ImageToVideo|VACE|Animate)|^LucyEdit", settings={"boundary_ratio": None}),
    when(r"^Wan(Pipeline|VACE|Animate)", parts={"transformer": {}}),
    when(r"^WanImageToVideo", parts={"transformer": {"in_channels": 36}}),
    when(
        r"^WanVACE",
        parts={"transformer": {"vace_in_channels": 96}},
        call={"prompt": PROMPT, "video": None, "mask": None, "image": None},
    ),
    when(
        r"WanAnimate",
        call={
            "image": picture,
            "pose_video": lambda: inputs.clip(17),
            "face_video": lambda: inputs.clip(17),
            "prompt": PROMPT,
            "segment_frame_length": 17,
            "num_frames": 17,
        },
    ),
    # sound
    when(r"^AudioLDM|^MusicLDM", parts={"vae": {"in_channels": 1, "out_channels": 1}}, call={"audio_length_in_s": 0.1}),
    when(r"^AudioLDM2", parts={"tokenizer_2": "T5Letters"}),
    when(
        r"^AceStep",
        parts={"text_encoder": "Qwen3Model", "vae": {"decoder_input_channels": 8}},
        call={"audio_duration": 2.0, "lyrics": "la la", "prompt": PROMPT},
    ),
    when(
        r"^StableAudioPipeline",
        parts={"scheduler": "CosineDPMSolverMultistepScheduler"},
        call={"audio_end_in_s": 1.0},
    ),
]
