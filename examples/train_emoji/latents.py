"""The latent space that the denoiser is trained in: the autoencoder's living channels, each of mean 0 and variance 1."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor
from train_vae import to_model


@torch.no_grad()
def posteriors(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Means and deviations ``[n, c, 8, 8]`` of uint8 images ``[n, 3, 64, 64]``."""
    found = [vae.encode(to_model(chunk)).latent_dist for chunk in images.split(64)]
    return torch.cat([p.mean for p in found]), torch.cat([p.std for p in found])


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """The same autoencoder with latents ``(z - shift) / scale`` and without the channels that the KL term switched off.

    A channel whose posterior is wider than the spread of its means says nothing about the picture: the decoder has learnt
    to ignore it, and a denoiser would spend its effort on predicting noise. Shift and scale are folded into the
    neighbouring convolutions, so the pipeline's ``scaling_factor`` is 1 and nothing downstream has to know.
    """
    mean, std = posteriors(vae, images)
    variance = mean.var(dim=(0, 2, 3))
    alive = (std.square().mean(dim=(0, 2, 3)) < variance).nonzero()[:, 0]
    shift, scale = mean.mean(dim=(0, 2, 3)), variance.sqrt()
    slim = AutoencoderKL.from_config(vae.config, latent_channels=len(alive), scaling_factor=1.0)
    weights = dict(vae.state_dict())

    # The encoder ends in means and log variances, which quant_conv maps to the same again: fold it into the layer before.
    out = torch.cat([alive, alive + len(shift)])
    gain = torch.cat([1 / scale, torch.ones_like(scale)])
    offset = torch.cat([-shift / scale, -2 * scale.log()])
    quant = (vae.quant_conv.weight[:, :, 0, 0] * gain[:, None])[out]
    bias = (vae.quant_conv.bias * gain + offset)[out]
    last = vae.encoder.conv_out
    weights["encoder.conv_out.weight"] = torch.einsum("oi,ihwk->ohwk", quant, last.weight)
    weights["encoder.conv_out.bias"] = quant @ last.bias + bias
    weights["quant_conv.weight"] = torch.eye(len(out))[:, :, None, None]
    weights["quant_conv.bias"] = torch.zeros(len(out))

    # Likewise the way back, dead channels at their mean. What that adds goes, as far as their span reaches, into the living
    # channels' bias, which like them is padded with zeros; the rest into the next layer's bias, where at the border it is
    # not exact: 28.01 dB becomes 28.00.
    post = vae.post_quant_conv.weight[:, :, 0, 0]
    living = post[:, alive] * scale[alive]
    constant = post @ shift + vae.post_quant_conv.bias
    within = torch.linalg.lstsq(living, constant[:, None]).solution[:, 0]
    first = vae.decoder.conv_in
    weights["decoder.conv_in.weight"] = torch.einsum("oihw,ic->ochw", first.weight, living)
    weights["decoder.conv_in.bias"] = first.bias + first.weight.sum((2, 3)) @ (constant - living @ within)
    weights["post_quant_conv.weight"] = torch.eye(len(alive))[:, :, None, None]
    weights["post_quant_conv.bias"] = within
    slim.load_state_dict(weights)
    return slim


def kept_vae(folder: Path, source: Path, images: Tensor) -> AutoencoderKL:
    """The autoencoder of a run, standardised once and kept in its folder."""
    if not folder.exists():
        standardise(AutoencoderKL.from_pretrained(source), images).save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)
