"""An image embedder from a pipeline's own autoencoder."""

from typing import Any

from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.loop.components import autoencoder_of, image_size
from kspec_guidance.loop.latents import encode, to_loop
from kspec_guidance.utils.hashing import weights_fingerprint

__all__ = ["pipeline_embedder"]


def pipeline_embedder(pipe: Any, size: int | None = None) -> ImageEmbedder:
    """Latents of a pipeline's own autoencoder: shapes and colours, no semantics.

    Args:
        pipe: a pipeline with an autoencoder.
        size: side of the input in pixels; by default that of the pipeline's own images, at most 256.

    Raises:
        ValueError: for a pipeline without an autoencoder.
    """
    vae = autoencoder_of(pipe)
    if vae is None:
        raise ValueError(f"{type(pipe).__name__} has no autoencoder; choose an image embedder")

    size = min(256, *(image_size(pipe) or (256,))) if size is None else size
    half = (0.5, 0.5, 0.5)
    name = f"{type(vae).__name__} of {type(pipe).__name__}"

    def network(x: Tensor) -> Tensor:
        return to_loop(encode(vae, x), pipe, vae).flatten(1)

    return ImageEmbedder(network, size, name, half, half, "squash", fingerprint=weights_fingerprint(vae))
