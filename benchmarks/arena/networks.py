"""The small networks of the arena: the digits' denoiser and judge, the emoji's transformer and its pipeline."""

import copy

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)  # fmt: skip
from torch import Tensor, nn
from transformers import CLIPTextModelWithProjection

from kspec_guidance import load_demo_pipeline

from .stored import weights

DIGITS = {"width": 32}


def digit_unet() -> UNet2DConditionModel:
    """Velocities of digits whose 28 x 28 pixels are folded to 4 x 14 x 14; the class is one token."""
    return UNet2DConditionModel(
        sample_size=14, in_channels=4, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=DIGITS["width"], attention_head_dim=32, norm_num_groups=16,
    )  # fmt: skip


def block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1, groups=b),
                         nn.Conv2d(b, b, 1), nn.BatchNorm2d(b), nn.SiLU())  # fmt: skip


class DigitJudge(nn.Module):
    """Classifier of digits; its features ``[n, 64]`` separate writing styles."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(block(1, 24), block(24, 48), block(48, 96), nn.Flatten(), nn.Linear(96 * 16, 64))
        self.head = nn.Sequential(nn.SiLU(), nn.Linear(64, 10))

    def features(self, x: Tensor) -> Tensor:
        return self.body(x)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))


def emoji_transformer(width: int = 160, layers: int = 6) -> SD3Transformer2DModel:
    """Velocities of the embedded emoji autoencoder's latents, 8 x 8 x 9, in 16 patches; the text has 16 tokens.

    Patches of one pixel took 4 to 6 times as long to train on a processor.
    """
    return SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=9, out_channels=9, num_layers=layers,
        num_attention_heads=4, attention_head_dim=width // 4, caption_projection_dim=width,
        joint_attention_dim=320, pooled_projection_dim=320, pos_embed_max_size=4, qk_norm="rms_norm",
    )  # fmt: skip


def emoji_pipeline() -> StableDiffusionPipeline:
    """The embedded pipeline with the denoiser and the decoder of 1.0.0rc1, on which the arena's figures were measured."""
    pipe = load_demo_pipeline()
    pipe.unet.load_state_dict(weights("emoji_unet"))
    pipe.vae.load_state_dict(weights("emoji_vae"))
    return pipe


def emoji_transformer_pipeline(transformer: SD3Transformer2DModel) -> StableDiffusion3Pipeline:
    """Stable Diffusion 3's pipeline with the embedded emoji pipeline's autoencoder, tokenizer and text encoder.

    The text encoder stands in for both CLIP models; there is no T5 model. Call it with ``max_sequence_length=0``: else 256
    tokens of zeros follow the text, in place of T5's, which the transformer was not trained with.
    """
    demo = emoji_pipeline()
    demo.vae.register_to_config(shift_factor=0.0)  # absent in the file; Stable Diffusion 3's pipeline adds it
    config = copy.deepcopy(demo.text_encoder.config)
    config.layer_norm_eps /= 8**2
    encoder = CLIPTextModelWithProjection(config).float().eval().requires_grad_(False)
    body = {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in demo.text_encoder.state_dict().items()}
    # The transformer reads what the layers add up before the last norm, here of standard deviation 11. An eighth of every
    # summand (and of the norms' root of epsilon) makes it about 1 and keeps the output.
    summands = ("embedding.weight", "out_proj.weight", "out_proj.bias", "fc2.weight", "fc2.bias")
    body = {k: v / 8 if k.endswith(summands) else v for k, v in body.items()}
    encoder.load_state_dict({**body, "text_projection.weight": torch.eye(encoder.config.projection_dim)})
    pipe = StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.5), vae=demo.vae,
        text_encoder=encoder, tokenizer=demo.tokenizer, text_encoder_2=encoder, tokenizer_2=demo.tokenizer,
        text_encoder_3=None, tokenizer_3=None,
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    return pipe
