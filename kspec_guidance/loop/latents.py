"""Latents of images in the form of a pipeline's denoising loop, and the inverse: encoding, scaling and packing.

``from_loop`` is the inverse of ``to_loop``: ``from_loop(to_loop(z)) = z`` for latents ``z`` of the autoencoder.
"""

import inspect
import math
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.utils.arguments import is_integer
from kspec_guidance.utils.images import read_folder, to_pixels
from kspec_guidance.utils.placement import compute_dtype, diffusers_hooks, execution_device

__all__ = ["decode", "encode", "encode_reference", "from_loop", "overflow_message", "to_loop"]

PACKS = ["height", "width"]  # last arguments of a ``_pack_latents`` of 2 x 2 blocks to tokens: Flux, Qwen-Image


def _parameters(pipe: Any, name: str) -> list[str] | None:
    function = getattr(pipe, name, None)
    return None if function is None else list(inspect.signature(function).parameters)


def _statistics(vae: Any, x: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation of each channel, broadcastable to ``x``; None if the autoencoder has none."""
    view = (1, -1, *[1] * (x.ndim - 2))
    if getattr(vae, "bn", None) is not None:  # Flux 2, of 2 x 2 blocks
        mean, std = vae.bn.running_mean, (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
    else:
        known = dict(vae.named_buffers(recurse=False)) | dict(vae.config)  # LTX keeps them as buffers
        mean, std = known.get("latents_mean"), known.get("latents_std")
    if mean is None or std is None:
        return None
    return torch.as_tensor(mean).to(x).view(view), torch.as_tensor(std).to(x).view(view)


def _scaling(vae: Any) -> tuple[float, float]:
    config = vae.config
    return getattr(config, "scaling_factor", None) or 1.0, getattr(config, "shift_factor", None) or 0.0


@contextmanager
def _running(vae: Any, x: Tensor) -> Iterator[Tensor]:
    """An autoencoder's input on the device and in the dtype in which the autoencoder computes.

    If its config has ``force_upcast``, it runs in float32 in place of float16, in which it overflows, as in diffusers.

    Raises:
        ValueError: if its weights cannot be cast.
    """
    gradients = torch.is_grad_enabled()  # inference_mode(False) enables them
    with torch.inference_mode(False), torch.set_grad_enabled(gradients):  # weights that are cast here are normal tensors
        dtype = compute_dtype(vae, x.dtype)
        upcast = dtype == torch.float16 and bool(getattr(vae.config, "force_upcast", False))
        if upcast:
            if any(getattr(getattr(h, "group", None), "stream", None) for m in vae.modules() for h in diffusers_hooks(m)):
                raise ValueError(
                    f"{type(vae).__name__} must run in float32 (force_upcast in its config), but group offloading with "
                    "use_stream=True keeps copies of its weights in float16; load it in float32, or exclude it from "
                    "offloading"
                )
            vae.float()
        try:
            yield x.to(execution_device(vae, x.device), torch.float32 if upcast else dtype)
        finally:
            if upcast:
                vae.half()


def overflow_message(vae: Any) -> str:
    """Message of an error: NaN or infinite values of an autoencoder."""
    return (
        f"{type(vae).__name__} returned NaN or infinite values in {compute_dtype(vae, torch.float32)}: run it in float32, "
        "pipe.vae.to(torch.float32), or take weights that are made for half precision"
    )


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Images ``[m, c, h, w]`` or clips ``[m, c, f, h, w]`` of unscaled latents, on the device of the autoencoder."""
    with _running(vae, latents) as z:
        out = vae.decode(z)
    return getattr(out, "sample", out)


def encode(vae: Any, pixels: Tensor) -> Tensor:
    """Latents ``[m, c, ...]`` of images ``[m, 3, h, w]`` or clips ``[m, 3, f, h, w]`` in -1..1: the mode, unscaled.

    Video encoders receive images as clips of one frame. The result is on the device of the autoencoder.
    """
    with _running(vae, pixels) as x:
        if x.ndim == 4 and any(isinstance(m, torch.nn.Conv3d) for m in getattr(vae, "encoder", vae).modules()):
            x = x[:, :, None]
        out = vae.encode(x)
    if getattr(out, "latent_dist", None) is not None:
        return out.latent_dist.mode().float()
    found = next((getattr(out, k) for k in ("latents", "latent") if getattr(out, k, None) is not None), out)
    return found.float()


def to_loop(latents: Tensor, pipe: Any, vae: Any = None) -> Tensor:
    """Latents of the autoencoder ``[m, c, ...]`` in the form of the pipeline's loop: scaled, and packed if the loop packs.

    Raises:
        ValueError: for an unknown packing.
    """
    vae = autoencoder_of(pipe) if vae is None else vae
    packs = _parameters(pipe, "_pack_latents")
    if getattr(vae, "bn", None) is not None:
        latents = pipe._patchify_latents(latents)
    scaling, shift = _scaling(vae)
    found = _statistics(vae, latents)
    latents = (latents - shift) * scaling if found is None else (latents - found[0]) / found[1] * scaling
    if type(vae).__name__ == "AutoencoderKLCogVideoX":
        return latents.transpose(1, 2)  # its loop puts frames before channels
    if packs is None:
        return latents
    if packs == ["latents"]:
        return pipe._pack_latents(latents)
    if packs[-2:] == PACKS:
        return pipe._pack_latents(latents, len(latents), latents.shape[1], *latents.shape[-2:])
    if "patch_size_t" in packs:
        return pipe._pack_latents(latents, pipe.transformer_spatial_patch_size, pipe.transformer_temporal_patch_size)
    raise ValueError(
        f"the latents of {type(pipe).__name__} are packed by _pack_latents({', '.join(packs)}), which is not supported"
    )


def from_loop(x: Tensor, pipe: Any, vae: Any = None, size: tuple[int, int] | None = None) -> Tensor:
    """Samples of the loop ``[n, ...]`` in the form of the decoder: unpacked, unscaled.

    Args:
        x: samples of the loop.
        pipe: the pipeline.
        vae: replaces the pipeline's autoencoder.
        size: height and width in pixels, for packed latents that are not square.

    Raises:
        ValueError: for an unknown packing.
    """
    vae = autoencoder_of(pipe) if vae is None else vae
    if x.ndim == 3:
        x = _unpacked(x, pipe, vae, size)
    elif type(vae).__name__ == "AutoencoderKLCogVideoX":
        x = x.transpose(1, 2)
    scaling, shift = _scaling(vae)
    found = _statistics(vae, x)
    x = x / scaling + shift if found is None else x / scaling * found[1] + found[0]
    return pipe._unpatchify_latents(x) if getattr(vae, "bn", None) is not None else x


def _unpacked(x: Tensor, pipe: Any, vae: Any, size: tuple[int, int] | None) -> Tensor:
    factor, side = getattr(pipe, "vae_scale_factor", 8), math.isqrt(x.shape[1])
    known = _parameters(pipe, "_unpack_latents")
    blocks = getattr(vae, "bn", None) is not None
    by_size = blocks or (known is not None and known[1:4] == ["height", "width", "vae_scale_factor"])
    if not by_size or (size is None and side**2 != x.shape[1]):
        raise ValueError(
            f"the packed latents {list(x.shape)} of {type(pipe).__name__} cannot be unpacked; choose space='x0' or 'pooled'"
        )
    height, width = size or (side * 2 * factor, side * 2 * factor)
    if blocks:
        return x.mT.reshape(len(x), x.shape[2], height // (2 * factor), width // (2 * factor))
    return pipe._unpack_latents(x, height, width, factor)


def _batches(images: Iterable[Image.Image] | str | os.PathLike, n: int, size: int | tuple[int, int]) -> Iterator[Tensor]:
    """Batches ``[n, 3, h, w]`` in -1..1 of a folder or of PIL images, which are resized one by one."""
    source = iter(read_folder(images) if isinstance(images, str | os.PathLike) else images)
    while len(pixels := to_pixels(islice(source, n), size)):
        yield pixels * 2 - 1


def encode_reference(
    pipe: Any,
    images: Tensor | Iterable[Image.Image] | str | os.PathLike,
    batch_size: int = 32,
    size: int | tuple[int, int] | None = None,
) -> Tensor:
    """Encode reference images to latents of the pipeline's loop ``[m, ...]``, for :class:`MMDGuidance` and others.

    The images must have the height and width of the generated ones. The result is ``[m, c, h / 8, w / 8]`` for Stable
    Diffusion, and tokens ``[m, l, c]`` where the loop packs latents (Flux, Qwen-Image).

    Args:
        pipe: a pipeline with an autoencoder.
        images: a folder, PIL images (any iterable), or a tensor ``[m, 3, h, w]`` in -1..1 (clips ``[m, 3, f, h, w]`` for
            video pipelines), which is not resized. Images of a folder are read one by one.
        batch_size: number of images encoded at once.
        size: side, or height and width in pixels, to resize and crop to; None for the pipeline's default size.

    Raises:
        TypeError: for one image that is not in a list, or no images.
        ValueError: for a wrong shape, range, size or batch size, a folder without images or with an unreadable one, or a
            pipeline without an image autoencoder, or one that returns NaN or infinite values.
    """
    batches: Iterable[Tensor]
    if not is_integer(batch_size, 1):
        raise ValueError(f"batch_size must be an integer of at least 1, got {batch_size!r}")
    if size is not None:
        sides = tuple(size) if isinstance(size, list | tuple) else (size, size)
        if len(sides) != 2 or not all(is_integer(side, 1) for side in sides):
            raise ValueError(f"size must be a side, or (height, width), in pixels, got {size!r}")
        size = int(sides[0]), int(sides[1])
    if isinstance(images, Image.Image) or not isinstance(images, Iterable | os.PathLike):
        raise TypeError(f"images are a folder, a list of PIL images or a tensor, got {type(images).__name__}")
    if isinstance(images, Tensor):
        if size is not None:
            raise ValueError("a tensor is not resized; leave size out, or give PIL images")
        if images.ndim not in (4, 5) or images.shape[1] != 3:
            raise ValueError(f"images must have shape [m, 3, h, w] (clips [m, 3, f, h, w]), got {list(images.shape)}")
        if not torch.isfinite(images).all() or bool(((images < -1.001) | (images > 1.001)).any()):
            raise ValueError("images must lie in -1..1; divide 8-bit values by 127.5 and subtract 1")
        batches = images.split(batch_size) if len(images) else []
    else:
        size = image_size(pipe) if size is None else size
        if size is None:
            raise ValueError(f"{type(pipe).__name__} does not declare its image size; pass size=(height, width)")
        batches = _batches(images, batch_size, size)
    vae = autoencoder_of(pipe)
    if not callable(getattr(vae, "encode", None)):
        raise ValueError(
            f"{type(pipe).__name__} has no image autoencoder; pass a reference [m, ...] in the shape of its samples"
        )
    try:
        with torch.inference_mode(False), torch.no_grad():
            parts = [to_loop(encode(vae, part), pipe, vae) for part in batches]
            if not parts:
                raise ValueError("a reference needs one image or more, got none")
            latents = torch.cat(parts)
    finally:
        if hasattr(vae, "_hf_hook") and hasattr(type(pipe), "maybe_free_model_hooks"):
            type(pipe).maybe_free_model_hooks(pipe)  # as at the end of a call, but not observed as one
    if not bool(torch.isfinite(latents).all()):
        raise ValueError(overflow_message(vae))
    return latents
