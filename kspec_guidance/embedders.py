"""Images as feature rows for scores."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = ["Embedder", "open_clip_embedder", "pipeline_embedder", "to_tensor"]

Embedder = Callable[[Sequence[Image.Image]], Tensor]


def to_tensor(images: Sequence[Image.Image], size: int) -> Tensor:
    """``[n, 3, size, size]`` in -1..1, alpha over white, resized with antialiasing."""
    rows = []
    for image in images:
        rgba = image.convert("RGBA")
        flat = Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba).convert("RGB")
        rows.append(np.asarray(flat.resize((size, size), Image.Resampling.LANCZOS), dtype=np.float32))
    return torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2) / 127.5 - 1


def pipeline_embedder(pipe: Any, size: int = 64) -> Embedder:
    """Unit-norm latents of a pipeline's own autoencoder, ``[n, d]``: shapes and colours, no semantics."""
    from kspec_guidance.demo import encode_reference

    def embed(images: Sequence[Image.Image]) -> Tensor:
        rows = encode_reference(pipe, to_tensor(images, size)).flatten(1)
        return rows / rows.norm(dim=1, keepdim=True)

    return embed


def open_clip_embedder(name: str, weights: str) -> Embedder:
    """Unit-norm image features of an open_clip model.

    Args:
        name: e.g. ``ViT-B-32``.
        weights: a local file, or a tag that open_clip may download because you named it.
    """
    import open_clip

    model, _, preprocess = open_clip.create_model_and_transforms(name, pretrained=weights)
    model.eval()

    @torch.no_grad()
    def embed(images: Sequence[Image.Image]) -> Tensor:
        batch = torch.stack([preprocess(image.convert("RGB")) for image in images])
        return torch.cat([model.encode_image(part, normalize=True) for part in batch.split(32)])

    return embed
