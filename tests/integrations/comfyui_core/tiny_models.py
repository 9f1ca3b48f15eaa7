"""A custom node for the tests against ComfyUI: models of its own classes with tiny random weights."""

import comfy.conds
import comfy.model_management
import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher

CPU = torch.device("cpu")
UNET = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
    "channel_mult": (1, 2), "transformer_depth": [1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1], "context_dim": 32, "num_heads": 4, "use_spatial_transformer": True,
    "legacy": False, "adm_in_channels": None, "use_linear_in_transformer": False, "use_temporal_attention": False,
}  # fmt: skip
FLUX = {
    "image_model": "flux", "in_channels": 16, "out_channels": 16, "vec_in_dim": 32, "context_in_dim": 32,
    "hidden_size": 64, "mlp_ratio": 2.0, "num_heads": 4, "depth": 1, "depth_single_blocks": 1, "axes_dim": [4, 6, 6],
    "theta": 10000, "patch_size": 2, "qkv_bias": True, "guidance_embed": False, "txt_ids_dims": [],
}  # fmt: skip
WAN = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 48, "ffn_dim": 64, "freq_dim": 32, "num_heads": 2,
    "num_layers": 1, "in_dim": 16, "out_dim": 16, "text_dim": 32, "text_len": 7, "patch_size": (1, 2, 2),
    "window_size": (-1, -1), "qk_norm": True, "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
KINDS = {
    "SD15": (comfy.supported_models.SD15, UNET, [4, 8, 8]),
    "SD15 v": (comfy.supported_models.SD15, UNET, [4, 8, 8]),
    "Flux": (comfy.supported_models.FluxSchnell, FLUX, [16, 8, 8]),
    "Wan": (comfy.supported_models.WAN21_T2V, WAN, [16, 3, 8, 8]),
}


def seeded(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * (0.5 / max(p[0].numel(), 1) ** 0.5 if p.ndim > 1 else 0.1))
    return module


def build_model(kind):
    cls, config, _ = KINDS[kind]
    found = cls(dict(config))
    found.set_inference_dtype(torch.float32, None)
    state = {"v_pred": torch.zeros(1)} if kind == "SD15 v" else {}
    model = found.get_model(state, "", device=CPU)
    if kind == "SD15 v":
        from comfy.model_base import ModelType, model_sampling

        model.model_sampling = model_sampling(found, ModelType.V_PREDICTION)
    seeded(model.diffusion_model)
    return ModelPatcher(model.eval(), load_device=CPU, offload_device=CPU)


class TwoLatents(torch.nn.Module):
    """A denoiser of two latents at once, as for video with sound."""

    dtype = torch.float32

    def forward(self, x, timesteps, **kwargs):
        return [0.5 * part + 0.1 * other.mean() for part, other in zip(x, reversed(x), strict=True)]


def build_model_of_two_latents():
    patcher = build_model("SD15 v")
    model, plain = patcher.model, patcher.model.extra_conds
    model.diffusion_model = TwoLatents()

    def extra_conds(**kwargs):
        return plain(**kwargs) | {"latent_shapes": comfy.conds.CONDConstant(kwargs["latent_shapes"])}

    model.extra_conds = extra_conds
    return patcher


def build_vae(channels=4):
    config = {
        "double_z": True, "z_channels": channels, "resolution": 64, "in_channels": 3, "out_ch": 3, "ch": 32,
        "ch_mult": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
    }  # fmt: skip
    vae = comfy.sd.VAE(
        sd={}, device=CPU, dtype=torch.float32, config={"params": {"ddconfig": config, "embed_dim": channels}}
    )
    seeded(vae.first_stage_model)
    return vae


def conditioning(text):
    generator = torch.Generator().manual_seed(sum(map(ord, text)))
    tokens = torch.randn(1, 7, 32, generator=generator)
    return [[tokens, {"pooled_output": torch.randn(1, 32, generator=generator)}]]


class TinyModel:
    @classmethod
    def INPUT_TYPES(cls):
        return {"required": {"kind": (list(KINDS),), "positive": ("STRING", {}), "negative": ("STRING", {})}}

    RETURN_TYPES = ("MODEL", "VAE", "CONDITIONING", "CONDITIONING")
    FUNCTION, CATEGORY = "build", "tests"

    def build(self, kind, positive, negative):
        channels = KINDS[kind][2][0]
        return build_model(kind), build_vae(channels), conditioning(positive), conditioning(negative)


NODE_CLASS_MAPPINGS = {"TinyModel": TinyModel}
