"""Tiny autoencoders: the smallest configuration that keeps each class's structure."""

from typing import Any

VAE = {
    "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1, "sample_size": 32,
    "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
}  # fmt: skip
KL = VAE | {"shift_factor": 0.1}
KL8 = {
    "block_out_channels": (8, 8, 8, 8),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
}
WAN_VAE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1}
AUTOENCODERS: dict[str, dict[str, Any]] = {
    "AutoencoderSAME": {
        "patch_size": 4, "encoder_channels": 8, "encoder_c_mults": (1,), "encoder_strides": (2,),
        "encoder_transformer_depths": (1,), "latent_dim": 8,
        "dim_heads": 4, "sliding_window": 1, "sampling_rate": 64,
    },
    "LongCatAudioDiTVae": {
        "channels": 8, "c_mults": [1, 2], "strides": [2], "latent_dim": 8, "encoder_latent_dim": 16,
        "downsampling_ratio": 4, "sample_rate": 64,
    },
    "AutoencoderKLQwenImage21": WAN_VAE | {
        "decoder_base_dim": 4, "temperal_downsample": [False, True, True], "latents_mean": [0.0] * 16,
        "latents_std": [1.0] * 16,
    },
    "AutoencoderKLHunyuanImageRefiner": {
        "latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1, "spatial_compression_ratio": 2,
        "temporal_compression_ratio": 2,
    },
    "AutoencoderKL": KL,
    "AutoencoderTiny": {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8),
    "num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)},
    "AsymmetricAutoencoderKL": {},
    "VQModel": VAE | {"num_vq_embeddings": 12, "vq_embed_dim": 4},
    "PaellaVQModel": {"bottleneck_blocks": 1, "num_vq_embeddings": 16, "levels": 2, "embed_dim": 16, "latent_channels": 4},
    "AutoencoderDC": {
        "latent_channels": 4, "attention_head_dim": 2, "encoder_block_types": ("ResBlock", "EfficientViTBlock"),
        "decoder_block_types": ("ResBlock", "EfficientViTBlock"), "encoder_block_out_channels": (8, 8),
        "decoder_block_out_channels": (8, 8),
        "encoder_qkv_multiscales": ((), (5,)), "decoder_qkv_multiscales": ((), (5,)), "encoder_layers_per_block": (1, 1),
        "decoder_layers_per_block": (1, 1), "downsample_block_type": "conv", "upsample_block_type": "interpolate",
        "decoder_norm_types": "rms_norm", "decoder_act_fns": "silu", "scaling_factor": 0.41407,
    },
    "AutoencoderKLFlux2": {
        "block_out_channels": (8, 16), "norm_num_groups": 4, "latent_channels": 4, "layers_per_block": 1, "sample_size": 32,
        "down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2,
    },
    "AutoencoderKLWan": WAN_VAE,
    "AutoencoderKLQwenImage": {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 1, 1, 1], "num_res_blocks": 1},
    "AutoencoderKLTemporalDecoder": {
        "block_out_channels": (32, 64), "latent_channels": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
    },
    "AutoencoderKLCogVideoX": {
        "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
        "temporal_compression_ratio": 4,
        "down_block_types": ("CogVideoXDownBlock3D",) * 4, "up_block_types": ("CogVideoXUpBlock3D",) * 4,
    },
    "AutoencoderKLLTXVideo": {
        "latent_channels": 8, "block_out_channels": (8, 8, 8, 8), "decoder_block_out_channels": (8, 8, 8, 8),
        "layers_per_block": (1,) * 5,
        "decoder_layers_per_block": (1,) * 5, "patch_size": 1, "spatio_temporal_scaling": (True, True, False, False),
        "decoder_spatio_temporal_scaling": (True, True, False, False),
    },
    "AutoencoderKLMochi": {
        "encoder_block_out_channels": (32, 32, 32, 32), "decoder_block_out_channels": (32, 32, 32, 32),
        "layers_per_block": (1,) * 5,
    },
    "AutoencoderKLHunyuanVideo": {
        "latent_channels": 4, "block_out_channels": (8, 8, 8, 8), "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("HunyuanVideoDownBlock3D",) * 4, "up_block_types": ("HunyuanVideoUpBlock3D",) * 4,
    },
    "AutoencoderKLHunyuanVideo15": {
        "latent_channels": 4, "block_out_channels": (16, 16), "layers_per_block": 1, "spatial_compression_ratio": 2,
        "temporal_compression_ratio": 2,
    },
    "AutoencoderKLHunyuanImage": {
        "in_channels": 3, "out_channels": 3, "latent_channels": 4, "block_out_channels": (32, 64), "layers_per_block": 1,
        "spatial_compression_ratio": 2, "sample_size": 32, "scaling_factor": 1.0,
    },
    "AutoencoderKLAllegro": {
        "block_out_channels": (8, 8, 8, 8), "latent_channels": 4, "layers_per_block": 1, "norm_num_groups": 2,
    },
    "AutoencoderKLCosmos": {
        "latent_channels": 4, "encoder_block_out_channels": (8, 8, 8, 8), "decode_block_out_channels": (8, 8, 8, 8),
        "attention_resolutions": (8,), "resolution": 64, "num_layers": 1, "patch_size": 4, "spatial_compression_ratio": 4,
        "temporal_compression_ratio": 4,
    },
    "AutoencoderKLMagvit": {
        "latent_channels": 4, "block_out_channels": [8, 8, 8, 8], "layers_per_block": 1, "norm_num_groups": 2,
        "down_block_types": ["SpatialDownBlock3D", *["SpatialTemporalDownBlock3D"] * 3],
        "up_block_types": ["SpatialUpBlock3D", *["SpatialTemporalUpBlock3D"] * 3],
    },
    "AutoencoderOobleck": {
        "encoder_hidden_size": 6, "downsampling_ratios": [1, 2], "channel_multiples": [1, 2], "decoder_channels": 3,
        "decoder_input_channels": 3,
        "audio_channels": 2, "sampling_rate": 4,
    },
}  # fmt: skip
