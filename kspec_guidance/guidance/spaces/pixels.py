"""The decoded prediction and its embeddings: samples are compared as images, at the cost of the decoder."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as nnf

from kspec_guidance.guidance.spaces.base import FeatureSpace, Pullback, by_autograd
from kspec_guidance.loop.components import autoencoder_of
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.loop.latents import from_loop

__all__ = ["Embedder", "Pixels"]


@dataclass(frozen=True)
class Pixels(FeatureSpace):
    """The decoded prediction. The gradient goes through the decoder, one chunk at a time.

    Args:
        vae: replaces the pipeline's decoder, e.g. an ``AutoencoderTiny`` for the same latents (faster, smaller).
        size: side in pixels to which images are averaged before comparison; None keeps their size.
        chunk: number of samples decoded at once.
    """

    vae: Any = None
    size: int | None = 16
    chunk: int = 1
    name: ClassVar[str] = "pixels"

    def decoder(self, call: CallContext) -> Any:
        """The decoder to use.

        Raises:
            ValueError: if the pipeline has no decoder and ``vae`` is None.
        """
        vae = self.vae if self.vae is not None else autoencoder_of(call.pipe)
        if vae is None:
            raise ValueError(
                f"space={self.name!r} needs a decoder, and {type(call.pipe).__name__} has no vae; pass vae=, or "
                "use space='x0'"
            )
        return vae

    def decode(self, x: Tensor, call: CallContext) -> Tensor:
        """Images ``[n, c, h, w]`` or clips ``[n, c, f, h, w]`` of samples ``[n, ...]``, in about -1..1."""
        vae = self.decoder(call)
        dtype = next(vae.parameters()).dtype
        latents = x if getattr(vae.config, "latent_magnitude", None) else from_loop(x, call.pipe, vae, call.size)
        out = vae.decode(latents.to(dtype))
        return getattr(out, "sample", out)

    def _map(self, x: Tensor, call: CallContext) -> Tensor:
        y = self.decode(x, call)
        if self.size is None:
            return y
        if y.ndim == 5:  # a clip: frames are pooled one by one and compared together
            y = y.transpose(1, 2).flatten(1, 2)
        size: Any = tuple(min(self.size, s) for s in y.shape[2:])
        return nnf.adaptive_avg_pool2d(y, size) if y.ndim == 4 else y

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        return by_autograd(lambda p: self._map(p, call), x, self.chunk)

    def describe(self) -> dict[str, Any]:
        if self.vae is not None:
            raise TypeError("a guide with its own decoder cannot be saved as settings; build it in code: Pixels(vae=...)")
        return {"name": self.name, "size": self.size, "chunk": self.chunk}


@dataclass(frozen=True)
class Embedder(Pixels):
    """A semantic embedding of the decoded prediction, such as CLIP's.

    Args:
        embedder: a differentiable callable on ``[n, 3, size, size]`` in 0..1 returning ``[n, d]``, or an
            :class:`~kspec_guidance.evaluation.embedders.ImageEmbedder`, whose network and normalisation are used.
        size: side in pixels of the embedder's input.
        vae, chunk: see :class:`Pixels`.
    """

    embedder: Any = None
    size: int | None = 224
    name: ClassVar[str] = "embedder"

    def __post_init__(self) -> None:
        if not callable(self.embedder) and not hasattr(self.embedder, "network"):
            raise ValueError("space Embedder needs embedder=, a differentiable callable on [n, 3, h, w] in 0..1")

    def _map(self, x: Tensor, call: CallContext) -> Tensor:
        y = (self.decode(x, call).float() / 2 + 0.5).clamp(0, 1)
        frames = 1
        if y.ndim == 5:
            frames = y.shape[2]
            y = y.transpose(1, 2).flatten(0, 1)
        size = self.size or y.shape[-1]
        if tuple(y.shape[2:]) != (size, size):
            y = nnf.interpolate(y, (size, size), mode="bilinear", antialias=True, align_corners=False)
        network = getattr(self.embedder, "network", self.embedder)
        if hasattr(self.embedder, "mean"):
            view = (1, 3, 1, 1)
            y = (y - torch.tensor(self.embedder.mean).to(y).view(view)) / torch.tensor(self.embedder.std).to(y).view(view)
        rows = network(y).flatten(1)
        return rows if frames == 1 else rows.unflatten(0, (-1, frames)).flatten(1)

    def describe(self) -> dict[str, Any]:
        raise TypeError("a guide with an embedder cannot be saved as settings; build it in code: Embedder(embedder=...)")
