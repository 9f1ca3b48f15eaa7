"""The decoded prediction and its embeddings: samples are compared as images, at the cost of the decoder."""

import warnings
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kspec_guidance.guidance.spaces.base import FeatureSpace, Pullback, by_autograd, evaluate
from kspec_guidance.guidance.spaces.resampling import bilinear_matrix, block_mean_matrix, resample
from kspec_guidance.loop.components import autoencoder_of
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.loop.latents import decode, from_loop, overflow_message
from kspec_guidance.loop.observer import network_fingerprint
from kspec_guidance.utils.placement import compute_dtype, execution_device

__all__ = ["Embedder", "Pixels"]


@dataclass(frozen=True)
class Pixels(FeatureSpace):
    """The decoded prediction. The gradient goes through the decoder, one chunk at a time.

    Args:
        vae: replaces the pipeline's decoder, e.g. an ``AutoencoderTiny`` for the same latents (faster, smaller). It
            computes on its own device: move it to the pipeline's.
        size: side in pixels to which images are averaged before comparison; None keeps their size.
        chunk: number of samples decoded at once.
    """

    vae: Any = None
    size: int | None = 16
    chunk: int = 1
    _checked: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
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
        """Images ``[n, c, h, w]`` or clips ``[n, c, f, h, w]`` of samples ``[n, ...]``, in about -1..1.

        They are on the decoder's device and in its dtype.
        """
        vae = self.decoder(call)
        latents = x if getattr(vae.config, "latent_magnitude", None) else from_loop(x, call.pipe, vae, call.size)
        return decode(vae, latents)

    def _networks(self, call: CallContext) -> list[Any]:
        return [self.decoder(call)]

    def _head(self, y: Tensor) -> Tensor:
        """Features of the decoded samples, in float32."""
        if self.size is None:
            return y
        if y.ndim == 5:  # a clip: frames are pooled one by one and compared together
            y = y.transpose(1, 2).flatten(1, 2)
        if y.ndim != 4:
            return y
        return resample(y, [block_mean_matrix(s, min(self.size, s), y.device) for s in y.shape[2:]])

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        self._warn_of_offloading(call)
        rows, pullback = by_autograd(*self._evaluation(x, call))
        if self._checked != [id(call)]:  # once a call: the check waits for the device
            self._checked[:] = [id(call)]
            self._check(rows, x, call)
        return rows, pullback

    def final(self, x: Tensor, call: CallContext) -> Tensor:
        self._warn_of_offloading(call)
        rows = evaluate(*self._evaluation(x, call))
        self._check(rows, x, call)
        return rows

    def _evaluation(self, x: Tensor, call: CallContext) -> tuple[Any, ...]:
        """The arguments of :func:`by_autograd`."""
        return lambda p: self.decode(p, call), x, self._head, self.chunk, self._networks(call)

    def _check(self, rows: Tensor, x: Tensor, call: CallContext) -> None:
        """Check features of finite samples.

        Raises:
            ValueError: if the decoder returned NaN or infinite values.
        """
        if not bool(torch.isfinite(rows).all()) and bool(torch.isfinite(x).all()):
            raise ValueError(overflow_message(self.decoder(call)))

    def _warn_of_offloading(self, call: CallContext) -> None:
        hook = getattr(self.decoder(call), "_hf_hook", None)
        if getattr(hook, "prev_module_hook", None) is not None:  # of enable_model_cpu_offload
            warnings.warn(
                f"space={self.name!r} with enable_model_cpu_offload: at each guided step the denoiser is moved to the CPU "
                "while the VAE decodes, and back. This is slow; keep the pipeline on the device, use "
                "enable_group_offload, or give a small decoder of its own: Pixels(vae=AutoencoderTiny...)",
                stacklevel=2,
            )

    def describe(self) -> dict[str, Any]:
        if self.vae is not None:
            raise TypeError("a guide with its own decoder cannot be saved as settings; build it in code: Pixels(vae=...)")
        return {"name": self.name, "size": self.size, "chunk": self.chunk}


@dataclass(frozen=True)
class Embedder(Pixels):
    """A semantic embedding of the decoded prediction, such as CLIP's.

    Args:
        embedder: a differentiable callable on ``[n, 3, size, size]`` in 0..1 returning ``[n, d]``, or an
            :class:`~kspec_guidance.evaluation.embedders.ImageEmbedder`, whose network and normalisation are used. A module
            computes on its own device and in its own dtype.
        size: side in pixels of the embedder's input.
        vae, chunk: see :class:`Pixels`.
    """

    embedder: Any = None
    size: int | None = 224
    name: ClassVar[str] = "embedder"

    def __post_init__(self) -> None:
        if not callable(self.embedder) and not hasattr(self.embedder, "network"):
            raise ValueError("space Embedder needs embedder=, a differentiable callable on [n, 3, h, w] in 0..1")

    @property
    def label(self) -> str:
        network = self._network
        return f"{self.name}({network_fingerprint(network)})" if isinstance(network, nn.Module) else self.name

    @property
    def _network(self) -> Any:
        return getattr(self.embedder, "network", self.embedder)

    def _networks(self, call: CallContext) -> list[Any]:
        return [self.decoder(call), self._network]

    def _head(self, y: Tensor) -> Tensor:
        y = (y / 2 + 0.5).clamp(0, 1)
        frames = 1
        if y.ndim == 5:
            frames = y.shape[2]
            y = y.transpose(1, 2).flatten(0, 1)
        size = self.size or y.shape[-1]
        if tuple(y.shape[2:]) != (size, size):
            y = resample(y, [bilinear_matrix(s, size, y.device) for s in y.shape[2:]])
        y = y.to(execution_device(self._network, y.device))
        if hasattr(self.embedder, "normalize"):
            y = self.embedder.normalize(y)
        rows = self._network(y.to(compute_dtype(self._network, y.dtype))).flatten(1)
        return rows if frames == 1 else rows.unflatten(0, (-1, frames)).flatten(1)

    def describe(self) -> dict[str, Any]:
        raise TypeError("a guide with an embedder cannot be saved as settings; build it in code: Embedder(embedder=...)")
