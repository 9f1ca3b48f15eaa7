"""Tiny denoisers: the smallest configuration that keeps each class's structure."""

from typing import Any

import diffusers
import torch

from tests.tiny.autoencoders import AUTOENCODERS

BLOCKS = (16, 32)
HEAD = 16  # width of a transformer's attention head, and sum of the rotary axes
ROPE = (4, 6, 6)
WIDTH = 32  # of text embeddings
UNET = {
    "block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": WIDTH,
    "attention_head_dim": 4,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "sample_size": 16,
}  # fmt: skip
CONTROL = {k: v for k, v in UNET.items() if k != "sample_size"}
UP = {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D")}
DIT = {"num_attention_heads": 2, "attention_head_dim": HEAD, "num_layers": 1}
FLUX = DIT | {
    "num_single_layers": 1, "in_channels": 16, "joint_attention_dim": WIDTH, "axes_dims_rope": ROPE, "patch_size": 1,
}  # fmt: skip
PIXART = DIT | {"sample_size": 16, "caption_channels": WIDTH, "cross_attention_dim": 32, "num_attention_heads": 2}
SANA = DIT | {
    "in_channels": 4, "out_channels": 4, "num_cross_attention_heads": 2, "cross_attention_head_dim": HEAD,
    "cross_attention_dim": 32,
    "caption_channels": WIDTH, "sample_size": 16,
}  # fmt: skip
WAN = {
    "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 16, "out_channels": 16, "text_dim": WIDTH,
    "freq_dim": 32,
    "ffn_dim": 32, "num_layers": 2, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEO = {
    "num_attention_heads": 4, "attention_head_dim": 8, "in_channels": 4, "out_channels": 4, "time_embed_dim": 8,
    "text_embed_dim": WIDTH,
    "num_layers": 1, "sample_width": 4, "sample_height": 4, "sample_frames": 9, "patch_size": 2, "max_text_seq_length": 16,
}  # fmt: skip
HUNYUAN = DIT | {
    "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": ROPE,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    # UNets, ControlNets and adapters
    "UNet2DConditionModel": UNET | UP,
    "UNet2DModel": {
        "block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 4,
        "sample_size": 16,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"), "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    },
    "UNet1DModel": {"block_out_channels": (8, 8, 16), "extra_in_channels": 16, "sample_size": 512, "sample_rate": 16000},
    "UNet3DConditionModel": UNET | {
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "UNetMotionModel": UNET | {
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
        "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"), "num_attention_heads": 2,
        "motion_num_attention_heads": 2,
    },
    "UNetSpatioTemporalConditionModel": {
        "block_out_channels": (32, 64), "layers_per_block": 1, "sample_size": 16, "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 24, "cross_attention_dim": WIDTH, "num_attention_heads": (2, 4),
        "num_frames": 4,
        "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
    },
    "I2VGenXLUNet": {
        "block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": WIDTH,
        "sample_size": 16,
        "attention_head_dim": 8, "num_attention_heads": 2,
        "down_block_types": ("CrossAttnDownBlock3D", "DownBlock3D"), "up_block_types": ("UpBlock3D", "CrossAttnUpBlock3D"),
    },
    "Kandinsky3UNet": {
        "block_out_channels": (32, 64), "time_embedding_dim": 4, "groups": 2, "attention_head_dim": 4,
        "layers_per_block": 3,
        "cross_attention_dim": 4, "encoder_hid_dim": WIDTH,
    },
    "AudioLDM2UNet2DConditionModel": {
        "block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": ((None, 32,
        32), (None, 32, 32)),
        "attention_head_dim": 4, "sample_size": 16, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    },
    "ControlNetModel": CONTROL | {"conditioning_embedding_out_channels": (8, 16)},
    "SparseControlNetModel": {
        "block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"), "conditioning_embedding_out_channels": (8, 16),
        "motion_num_attention_heads": 2,
    },
    "ControlNetUnionModel": CONTROL | {
        "conditioning_embedding_out_channels": (8, 16), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 80, "num_control_type": 6, "num_trans_channel": 16, "num_trans_head": 2,
        "num_proj_channel": 16, "transformer_layers_per_block": (1, 2), "use_linear_projection": True,
    },
    "ControlNetXSAdapter": {
        "base_block_out_channels": BLOCKS, "block_out_channels": (2, 4), "conditioning_embedding_out_channels": (8, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "num_attention_heads": 2, "cross_attention_dim": WIDTH,
        "transformer_layers_per_block": 1, "max_norm_num_groups": 2, "use_linear_projection": False, "sample_size": 16,
        "time_embedding_mix": 0.95, "learn_time_embedding": True,
    },
    "T2IAdapter": {"channels": [16, 32], "num_res_blocks": 1, "downscale_factor": 2},
    "MotionAdapter": {
        "block_out_channels": BLOCKS, "motion_layers_per_block": 1, "motion_norm_num_groups": 2,
        "motion_num_attention_heads": 2,
    },
    "PriorTransformer": {
        "num_attention_heads": 2, "attention_head_dim": HEAD, "num_layers": 1, "embedding_dim": WIDTH, "num_embeddings": 77,
        "additional_embeddings": 4,
    },
    # image transformers
    "SD3Transformer2DModel": DIT | {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64, "pos_embed_max_size": 32,
    },
    "SD3ControlNetModel": DIT | {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "joint_attention_dim": 64,
        "caption_projection_dim": 32,
        "pooled_projection_dim": 64, "pos_embed_max_size": 32,
    },
    "FluxTransformer2DModel": FLUX | {"pooled_projection_dim": WIDTH},
    "FluxControlNetModel": FLUX | {"pooled_projection_dim": WIDTH},
    "Flux2Transformer2DModel": FLUX | {
        "axes_dims_rope": (4, 4, 4, 4), "timestep_guidance_channels": 32, "joint_attention_dim": 3 * WIDTH,
    },
    "ChromaTransformer2DModel": FLUX | {
        "approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1,
    },
    "BriaTransformer2DModel": FLUX | {"axes_dims_rope": list(ROPE)},
    "BriaFiboTransformer2DModel": FLUX | {"axes_dims_rope": list(ROPE), "joint_attention_dim": 2 * WIDTH,
    "text_encoder_dim": WIDTH},
    "LongCatImageTransformer2DModel": FLUX | {"axes_dims_rope": list(ROPE), "pooled_projection_dim": WIDTH},
    "OvisImageTransformer2DModel": FLUX | {"out_channels": 16},
    "QwenImageTransformer2DModel": DIT | {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "joint_attention_dim": WIDTH, "axes_dims_rope": ROPE,
    },
    "QwenImageControlNetModel": DIT | {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "joint_attention_dim": WIDTH, "axes_dims_rope": ROPE,
    },
    "AuraFlowTransformer2DModel": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_mmdit_layers": 1,
        "num_single_dit_layers": 1,
        "attention_head_dim": HEAD, "num_attention_heads": 2, "joint_attention_dim": WIDTH, "caption_projection_dim": 32,
        "pos_embed_max_size": 256,
    },
    "PixArtTransformer2DModel": PIXART | {"norm_num_groups": 8},
    "DiTTransformer2DModel": DIT | {
        "sample_size": 8, "norm_num_groups": 8, "num_embeds_ada_norm": 10, "out_channels": 8,
    },
    "SanaTransformer2DModel": SANA | {"patch_size": 1},
    "SanaControlNetModel": SANA | {"patch_size": 1},
    "SanaVideoTransformer3DModel": SANA | {"in_channels": 16, "out_channels": 16, "attention_head_dim": 12,
    "qk_norm": "rms_norm_across_heads", "cross_attention_head_dim": 12, "cross_attention_dim": 24},
    "HunyuanDiT2DModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 16,
        "hidden_size": 32,
        "num_layers": 2, "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH, "pooled_projection_dim": 16,
    },
    "HunyuanDiT2DControlNetModel": {
        "num_attention_heads": 2, "attention_head_dim": 16, "in_channels": 4, "patch_size": 2, "sample_size": 16,
        "hidden_size": 32,
        "transformer_num_layers": 2, "cross_attention_dim": WIDTH, "cross_attention_dim_t5": WIDTH,
        "pooled_projection_dim": 16,
    },
    "Lumina2Transformer2DModel": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2, "num_refiner_layers": 1,
        "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 16, "axes_dim_rope": ROPE, "axes_lens": (2048, 64,
        64), "cap_feat_dim": WIDTH,
    },
    "LuminaNextDiT2DModel": {
        "sample_size": 16, "patch_size": 2, "in_channels": 4, "hidden_size": 32, "num_layers": 2,
        "num_attention_heads": 2, "num_kv_heads": 1,
        "multiple_of": 16, "cross_attention_dim": WIDTH,
    },
    "CogView3PlusTransformer2DModel": DIT | {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": WIDTH, "time_embed_dim": 8,
        "condition_dim": 2, "pos_embed_max_size": 16,
        "sample_size": 16,
    },
    "CogView4Transformer2DModel": DIT | {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": WIDTH, "time_embed_dim": 8,
        "condition_dim": 4,
        "pos_embed_max_size": 16, "sample_size": 16, "rope_axes_dim": (16, 16),
    },
    "HiDreamImageTransformer2DModel": DIT | {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "caption_channels": (WIDTH,
        WIDTH), "text_emb_dim": 64,
        "num_routed_experts": 4, "num_activated_experts": 2, "axes_dims_rope": ROPE, "max_resolution": (32, 32),
        "llama_layers": (0, 1),
    },
    "OmniGenTransformer2DModel": {
        "in_channels": 4, "patch_size": 2, "hidden_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2,
        "intermediate_size": 32,
        "num_layers": 1, "pad_token_id": 0, "vocab_size": 20000, "rope_scaling": {"long_factor": [1.0] * 8,
        "short_factor": [1.0] * 8},
        "time_step_dim": 4, "pos_embed_max_size": 32,
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2,
        "cap_feat_dim": WIDTH,
        "axes_dims": [4, 6, 6], "axes_lens": [512, 64, 64],
    },
    "ZImageControlNetModel": {
        "control_layers_places": [0], "control_refiner_layers_places": [0], "control_in_dim": 4, "dim": 32,
        "n_refiner_layers": 1, "n_heads": 2,
        "n_kv_heads": 2,
    },
    "QwenImage21Transformer2DModel": DIT | {
        "patch_size": 1, "in_channels": 16, "out_channels": 16, "context_in_dim": WIDTH, "axes_dims_rope": ROPE,
    },
    "GlmImageTransformer2DModel": DIT | {
        "patch_size": 2, "in_channels": 4, "out_channels": 4, "text_embed_dim": WIDTH, "time_embed_dim": 8,
        "condition_dim": 4,
        "prior_vq_quantizer_codebook_size": 64,
    },
    "DreamLiteUNetModel": {
        "block_out_channels": BLOCKS, "layers_per_block": 1, "norm_num_groups": 8, "cross_attention_dim": WIDTH,
        "attention_head_dim": 4,
        "down_block_types": ("DreamLiteCrossAttnNoSelfAttnDownBlock2D", "DreamLiteCrossAttnDownBlock2D"), "sample_size": 16,
        "up_block_types": ("DreamLiteCrossAttnUpBlock2D", "DreamLiteUpBlock2D"),
    },
    "JoyImageEditTransformer3DModel": {
        "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2, "text_dim": WIDTH, "num_layers": 1,
        "rope_dim_list": list(ROPE),
    },
    "JoyImageEditPlusTransformer3DModel": {
        "in_channels": 16, "hidden_size": 32, "num_attention_heads": 2, "text_dim": WIDTH, "num_layers": 1,
        "rope_dim_list": list(ROPE),
    },
    "ReduxImageEncoder": {"redux_dim": WIDTH, "txt_in_features": WIDTH},
    "StableUnCLIPImageNormalizer": {"embedding_dim": WIDTH},
    "UnCLIPTextProjModel": {"clip_embeddings_dim": WIDTH, "time_embed_dim": 64, "cross_attention_dim": WIDTH,
    "clip_extra_context_tokens": 4},
    "ShapERenderer": {
        "param_names": ("nerstf.mlp.0.weight",) , "param_shapes": ((8, 93),), "d_latent": 16, "d_hidden": 8,
        "n_output": 12, "background": (0.1, 0.1, 0.1),
    },
    "LearnedClassifierFreeSamplingEmbeddings": {"learnable": False},
    "CLIPImageProjection": {"hidden_size": WIDTH},
    "HunyuanImageTransformer2DModel": DIT | {
        "in_channels": 4, "out_channels": 4, "num_single_layers": 1, "num_refiner_layers": 1, "patch_size": (1, 1),
        "text_embed_dim": WIDTH,
        "text_embed_2_dim": WIDTH, "rope_axes_dim": (8, 8),
    },
    "PRXTransformer2DModel": {
        "in_channels": 4, "patch_size": 1, "context_in_dim": WIDTH, "hidden_size": 32, "mlp_ratio": 2.0,
        "num_heads": 2, "depth": 1,
        "axes_dim": [8, 8],
    },
    "Krea2Transformer2DModel": {
        "in_channels": 64, "num_layers": 1, "attention_head_dim": HEAD, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 32, "timestep_embed_dim": 32, "text_hidden_dim": WIDTH, "num_text_layers": 2,
        "text_num_attention_heads": 2,
        "text_num_key_value_heads": 2, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1,
        "num_refiner_text_blocks": 1,
        "axes_dims_rope": ROPE,
    },
    "ErnieImageTransformer2DModel": {
        "hidden_size": 32, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 32, "in_channels": 16,
        "out_channels": 16,
        "text_in_dim": WIDTH, "rope_axes_dim": ROPE,
    },
    "NucleusMoEImageTransformer2DModel": DIT | {
        "patch_size": 2, "in_channels": 64, "out_channels": 16, "num_key_value_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": ROPE,
        "moe_enabled": False,
    },
    "Kandinsky5Transformer3DModel": {
        "in_visual_dim": 4, "in_text_dim": WIDTH, "in_text_dim2": WIDTH, "time_dim": 32, "out_visual_dim": 4,
        "patch_size": (1, 2, 2),
        "model_dim": 32, "ff_dim": 64, "num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6),
    },
    "StableCascadeUNet": {
        "in_channels": 4, "out_channels": 4, "conditioning_dim": 16, "block_out_channels": (16, 16),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (1, 1), "up_num_layers_per_block": (1, 1), "clip_image_in_channels": WIDTH,
        "clip_text_in_channels": WIDTH,
        "clip_text_pooled_in_channels": WIDTH, "switch_level": (False,),
    },
    "WuerstchenPrior": {"c_in": 2, "c": 8, "depth": 2, "c_cond": WIDTH, "c_r": 8, "nhead": 2},
    "WuerstchenDiffNeXt": {
        "c_cond": WIDTH, "c_hidden": [16, 16, 32], "nhead": [-1, 2, 4], "blocks": [1, 1, 1], "level_config": ["CT",
        "CTA", "CTA"],
        "clip_embd": WIDTH, "inject_effnet": [False, True, True],
    },
    # video
    "WanTransformer3DModel": WAN,
    "WanVACETransformer3DModel": WAN | {"num_layers": 2, "vace_layers": [0], "vace_in_channels": 48},
    "AnyFlowTransformer3DModel": WAN,
    "ChronoEditTransformer3DModel": WAN | {"in_channels": 36, "image_dim": WIDTH},
    "WanAnimateTransformer3DModel": WAN | {
        "in_channels": 36, "latent_channels": 16, "image_dim": WIDTH, "num_layers": 2,
        "motion_encoder_channel_sizes": {"4": 16, "8": 16, "16": 16},
        "motion_encoder_size": 16, "motion_style_dim": 8, "motion_dim": 4, "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2,
    },
    "SkyReelsV2Transformer3DModel": WAN,
    "HeliosTransformer3DModel": {k: v for k, v in WAN.items() if k != "rope_max_seq_len"} | {"rope_dim": (4, 4, 4)},
    "CogVideoXTransformer3DModel": COGVIDEO,
    "LTXVideoTransformer3DModel": {
        "in_channels": 8, "out_channels": 8, "num_attention_heads": 4, "attention_head_dim": 8,
        "cross_attention_dim": 32, "num_layers": 1,
        "caption_channels": WIDTH,
    },
    "MochiTransformer3DModel": {
        "patch_size": 2, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2,
        "pooled_projection_dim": 16, "in_channels": 12,
        "text_embed_dim": WIDTH, "time_embed_dim": 4, "max_sequence_length": 16,
    },
    "HunyuanVideoTransformer3DModel": HUNYUAN,
    "HunyuanVideoFramepackTransformer3DModel": HUNYUAN | {
        "image_condition_type": None, "has_image_proj": True, "image_proj_dim": WIDTH, "has_clean_x_embedder": True,
        "patch_size": 1,
    },
    "HunyuanVideo15Transformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": HEAD, "num_layers": 1, "in_channels": 9, "out_channels": 4,
        "num_refiner_layers": 1,
        "text_embed_dim": WIDTH, "text_embed_2_dim": WIDTH, "image_embed_dim": WIDTH, "rope_axes_dim": ROPE,
        "target_size": 16,
    },
    "AllegroTransformer3DModel": {
        "num_attention_heads": 2, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4, "num_layers": 1,
        "cross_attention_dim": 24,
        "sample_width": 8, "sample_height": 8, "sample_frames": 8, "caption_channels": WIDTH,
    },
    "LatteTransformer3DModel": {
        "sample_size": 8, "num_layers": 1, "patch_size": 2, "attention_head_dim": 8, "num_attention_heads": 3,
        "caption_channels": WIDTH,
        "in_channels": 4, "cross_attention_dim": 24, "out_channels": 8, "attention_bias": True,
        "activation_fn": "gelu-approximate",
        "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single", "norm_elementwise_affine": False,
    },
    "CosmosTransformer3DModel": {
        "in_channels": 5, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 12, "num_layers": 2,
        "mlp_ratio": 2,
        "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32), "extra_pos_embed_type": None,
    },
    "EasyAnimateTransformer3DModel": DIT | {
        "in_channels": 4, "out_channels": 4, "patch_size": 2, "mmdit_layers": 1, "time_embed_dim": 8,
        "text_embed_dim": WIDTH,
        "time_position_encoding_type": "3d_rope",
    },
    "MotifVideoTransformer3DModel": DIT | {
        "in_channels": 33, "out_channels": 16, "num_single_layers": 1, "text_embed_dim": WIDTH, "rope_axes_dim": ROPE,
    },
    "AnimaTextConditioner": {
        "source_dim": WIDTH, "target_dim": WIDTH, "model_dim": WIDTH, "num_layers": 1, "num_attention_heads": 2,
        "target_vocab_size": 20000, "min_sequence_length": 16,
    },
    "MiniMaxMusic3RVQDepthDecoder": {
        "hidden_size": WIDTH, "num_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "num_codebooks": 3,
    },
    "MiniMaxMusic3ConditionEncoder": {"condition_hidden_dim": WIDTH, "num_condition_layers": 3, "out_dim": WIDTH},
    "MiniMaxMusic3Transformer1DModel": {
        "in_channels": 8, "condition_dim": WIDTH, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": HEAD,
        "ff_inner_dim": 32, "rotary_dim": 8, "fourier_embedding_dim": 16,
    },
    "MiniMaxMusic3Vocoder": {"latent_channels": 8, "decoder_input_dim": 16, "decoder_hidden_dim": 16},
    "Flux3Transformer2DModel": DIT | {
        "in_channels": 16, "cond_in_channels": 16, "num_single_layers": 1, "joint_attention_dim": 3 * WIDTH,
        "timestep_channels": 32, "axes_dims_rope": (4, 4, 4, 4),
    },
    "WanAnimate2Transformer3DModel": {
        "text_len": 64, "in_dim": 36, "dim": 24, "ffn_dim": 32, "freq_dim": 32, "text_dim": WIDTH, "num_heads": 2,
        "num_layers": 1,
    },
    "LTX2VideoTransformer3DModel": {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8,
        "cross_attention_dim": 16, "num_layers": 2,
        "audio_in_channels": 4, "audio_out_channels": 4, "audio_num_attention_heads": 2,
        "audio_attention_head_dim": 4, "audio_cross_attention_dim": 8,
        "caption_channels": WIDTH, "rope_double_precision": False, "rope_type": "split",
    },
    "LTX2TextConnectors": {
        "caption_channels": WIDTH, "text_proj_in_factor": 3, "video_connector_num_attention_heads": 4,
        "video_connector_attention_head_dim": 8,
        "video_connector_num_layers": 1, "video_connector_num_learnable_registers": None,
        "audio_connector_num_attention_heads": 4,
        "audio_connector_attention_head_dim": 8, "audio_connector_num_layers": 1,
        "audio_connector_num_learnable_registers": None,
        "connector_rope_base_seq_len": 32, "rope_theta": 10000.0, "rope_double_precision": False,
        "causal_temporal_positioning": False,
        "rope_type": "split",
    },
    "AutoencoderKLLTX2Video": {
        "latent_channels": 4, "block_out_channels": (8,), "decoder_block_out_channels": (8,),
        "layers_per_block": (1,), "decoder_layers_per_block": (1, 1),
        "spatio_temporal_scaling": (True,), "decoder_spatio_temporal_scaling": (True,),
        "decoder_inject_noise": (False, False),
        "downsample_type": ("spatial",), "upsample_type": ("spatial",), "upsample_residual": (False,),
        "upsample_factor": (1,), "patch_size": 1,
        "decoder_causal": False,
    },
    "AutoencoderKLLTX2Audio": {
        "base_channels": 4, "ch_mult": (1,), "num_res_blocks": 1, "resolution": 32, "latent_channels": 2, "mel_bins": 8,
    },
    "LTX2Vocoder": {
        "in_channels": 16, "hidden_channels": 32, "out_channels": 2, "upsample_kernel_sizes": [4, 4],
        "upsample_factors": [2, 2],
        "resnet_kernel_sizes": [3], "resnet_dilations": [[1, 3, 5]], "output_sampling_rate": 16000,
    },
    # audio
    "StableAudioDiTModel": {
        "sample_size": 16, "in_channels": 3, "num_layers": 1, "attention_head_dim": 4, "num_attention_heads": 2,
        "num_key_value_attention_heads": 2,
        "out_channels": 3, "cross_attention_dim": 4, "time_proj_dim": 8, "global_states_input_dim": 8,
        "cross_attention_input_dim": 4,
    },
    "StableAudioProjectionModel": {"text_encoder_dim": WIDTH, "conditioning_dim": 4, "min_value": 0, "max_value": 32},
    "AceStepTransformer1DModel": {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8,
        "in_channels": 24, "audio_acoustic_hidden_dim": 8, "sliding_window": 16,
    },
    "AceStepConditionEncoder": {
        "hidden_size": 32, "intermediate_size": 64, "text_hidden_dim": WIDTH, "timbre_hidden_dim": 8,
        "num_lyric_encoder_hidden_layers": 1,
        "num_timbre_encoder_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    },
    "ConsisIDTransformer3DModel": COGVIDEO | {
        "cross_attn_dim_head": 8, "cross_attn_num_heads": 2, "LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_depth": 5,
        "LFE_dim_head": 8, "LFE_num_heads": 2,
        "LFE_num_id_token": 1, "LFE_num_querie": 1, "LFE_output_dim": 10, "LFE_ff_mult": 1, "LFE_num_scale": 1,
    },
    "CosmosControlNetModel": {
        "n_controlnet_blocks": 2, "in_channels": 6, "latent_channels": 6, "model_channels": 24,
        "num_attention_heads": 2, "attention_head_dim": 12,
        "mlp_ratio": 2, "text_embed_dim": WIDTH, "adaln_lora_dim": 4, "max_size": (4, 32, 32),
    },
    "Ideogram4Transformer2DModel": {
        "in_channels": 16, "num_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "intermediate_size": 32, "adaln_dim": 16,
        "llm_features_dim": 13 * WIDTH, "mrope_section": (2, 3, 3),
    },
    "BriaFibo2Transformer2DModel": {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "cap_feat_dim": 3 * WIDTH,
        "injection_layer_ids": (0,),
        "perceiver_num_layers": 1, "min_num_gist_tokens": 4, "max_num_gist_tokens": 8, "gist_step": 4,
        "gist_min_text_len": 4, "gist_max_text_len": 64,
        "axes_dims": (4, 6, 6), "axes_lens": (512, 64, 64),
    },
    "AnyFlowFARTransformer3DModel": WAN | {"chunk_partition": (1, 2), "full_chunk_limit": 2},
    "AudioLDM2ProjectionModel": {"text_encoder_dim": WIDTH, "text_encoder_1_dim": WIDTH, "langauge_model_dim": WIDTH},
    "StableAudio3DiTModel": {
        "io_channels": 8, "embed_dim": 32, "depth": 2, "num_heads": 2, "cond_token_dim": WIDTH,
        "global_cond_dim": WIDTH, "local_add_cond_dim": 9,
        "timestep_features_dim": 16, "num_memory_tokens": 2,
    },
    "StableAudio3DurationEmbedder": {"output_dim": WIDTH, "fourier_dim": 16},
    "LongCatAudioDiTTransformer": {"dit_dim": 32, "dit_depth": 2, "dit_heads": 2, "dit_text_dim": WIDTH, "latent_dim": 8},
}  # fmt: skip


CONFIGS |= AUTOENCODERS


def build_model(cls: str, **kwargs: Any) -> Any:
    """A model of a diffusers class with tiny weights from a fixed seed."""
    torch.manual_seed(0)
    model_class = getattr(diffusers, cls, None)
    if model_class is None:
        model_class = UNEXPORTED[cls]()
    return model_class(**(CONFIGS.get(cls, {}) | kwargs)).eval()


def _import(module: str, name: str) -> Any:
    def load() -> Any:
        import importlib

        return getattr(importlib.import_module(module), name)

    return load


PIPELINES = "diffusers.pipelines"

UNEXPORTED = {  # classes that diffusers does not export
    "WuerstchenPrior": _import(f"{PIPELINES}.deprecated.wuerstchen.modeling_wuerstchen_prior", "WuerstchenPrior"),
    "WuerstchenDiffNeXt": _import(f"{PIPELINES}.deprecated.wuerstchen.modeling_wuerstchen_diffnext", "WuerstchenDiffNeXt"),
    "PaellaVQModel": _import(f"{PIPELINES}.deprecated.wuerstchen.modeling_paella_vq_model", "PaellaVQModel"),
    "ShapERenderer": _import(f"{PIPELINES}.shap_e.renderer", "ShapERenderer"),
    "AceStepConditionEncoder": _import(f"{PIPELINES}.ace_step.modeling_ace_step", "AceStepConditionEncoder"),
    "StableAudioProjectionModel": _import(f"{PIPELINES}.stable_audio.modeling_stable_audio", "StableAudioProjectionModel"),
    "MultilingualCLIP": _import(f"{PIPELINES}.kandinsky.text_encoder", "MultilingualCLIP"),
    "UnCLIPTextProjModel": _import(f"{PIPELINES}.deprecated.unclip.text_proj", "UnCLIPTextProjModel"),
    "CLIPImageProjection": _import(f"{PIPELINES}.stable_diffusion.clip_image_project_model", "CLIPImageProjection"),
    "ReduxImageEncoder": _import(f"{PIPELINES}.flux.modeling_flux", "ReduxImageEncoder"),
    "LTX2TextConnectors": _import(f"{PIPELINES}.ltx2.connectors", "LTX2TextConnectors"),
    "LTX2Vocoder": _import(f"{PIPELINES}.ltx2.vocoder", "LTX2Vocoder"),
    "StableUnCLIPImageNormalizer": _import(
        f"{PIPELINES}.stable_diffusion.stable_unclip_image_normalizer", "StableUnCLIPImageNormalizer"
    ),
}
