"""The latent space of the denoiser: the active channels of the autoencoder, each of mean 0 and variance 1."""

from pathlib import Path

import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor
from train_vae import to_model


@torch.no_grad()
def posteriors(vae: AutoencoderKL, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return means and standard deviations ``[n, c, 8, 8]`` of uint8 images ``[n, 3, 64, 64]``."""
    parts = [vae.encode(to_model(chunk)).latent_dist for chunk in images.split(64)]
    return torch.cat([p.mean for p in parts]), torch.cat([p.std for p in parts])


def cached_posteriors(path: Path, vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Return the means of images, read from ``path``; on the first call compute and save them."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({"means": posteriors(vae, images)[0].contiguous()}, path)
    return load_file(path)["means"]


@torch.no_grad()
def standardise(vae: AutoencoderKL, images: Tensor) -> AutoencoderKL:
    """Return the autoencoder with latents ``(z - shift) / scale`` and without the channels that the KL term switched off.

    A channel whose posterior is wider than the spread of its means has no information about the image: the decoder ignores
    it, and the denoiser's capacity would go into predicting noise. Shift and scale are folded into the neighbouring
    convolutions, so the pipeline's ``scaling_factor`` is 1.
    """
    mean, std = posteriors(vae, images)
    variance = mean.var(dim=(0, 2, 3))
    active = (std.square().mean(dim=(0, 2, 3)) < variance).nonzero()[:, 0]
    shift, scale = mean.mean(dim=(0, 2, 3)), variance.sqrt()
    standardised = AutoencoderKL.from_config(vae.config, latent_channels=len(active), scaling_factor=1.0)
    weights = dict(vae.state_dict())

    # The encoder ends in means and log variances, on which quant_conv acts pointwise: fold it into the layer before.
    out = torch.cat([active, active + len(shift)])
    gain = torch.cat([1 / scale, torch.ones_like(scale)])
    offset = torch.cat([-shift / scale, -2 * scale.log()])
    quant = (vae.quant_conv.weight[:, :, 0, 0] * gain[:, None])[out]
    bias = (vae.quant_conv.bias * gain + offset)[out]
    last = vae.encoder.conv_out
    weights["encoder.conv_out.weight"] = torch.einsum("oi,ihwk->ohwk", quant, last.weight)
    weights["encoder.conv_out.bias"] = quant @ last.bias + bias
    weights["quant_conv.weight"] = torch.eye(len(out))[:, :, None, None]
    weights["quant_conv.bias"] = torch.zeros(len(out))

    # Likewise for the decoder, with the inactive channels fixed at their means. The part of their contribution in the span
    # of the active channels goes into the bias of these, which is zero-padded as they are; the rest into the next layer's
    # bias, which is not exact at the border: 28.01 dB becomes 28.00.
    post = vae.post_quant_conv.weight[:, :, 0, 0]
    active_post = post[:, active] * scale[active]
    constant = post @ shift + vae.post_quant_conv.bias
    within = torch.linalg.lstsq(active_post, constant[:, None]).solution[:, 0]
    first = vae.decoder.conv_in
    weights["decoder.conv_in.weight"] = torch.einsum("oihw,ic->ochw", first.weight, active_post)
    weights["decoder.conv_in.bias"] = first.bias + first.weight.sum((2, 3)) @ (constant - active_post @ within)
    weights["post_quant_conv.weight"] = torch.eye(len(active))[:, :, None, None]
    weights["post_quant_conv.bias"] = within
    standardised.load_state_dict(weights)
    return standardised


def cached_vae(folder: Path, source: Path, images: Tensor) -> AutoencoderKL:
    """Load the standardised autoencoder of a run from ``folder``; on the first call make it and save it there."""
    if not folder.exists():
        standardise(AutoencoderKL.from_pretrained(source), images).save_pretrained(folder)
    return AutoencoderKL.from_pretrained(folder).to(memory_format=torch.channels_last)
