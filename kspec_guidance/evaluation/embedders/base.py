"""Embedders: a network with its preprocessing, a name, and a fingerprint of its weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.comparison import ProductEmbedder, product_embedder
from kspec_guidance.kernels import SAME_DISTANCE
from kspec_guidance.utils.hashing import weights_fingerprint
from kspec_guidance.utils.images import Images, to_pixels
from kspec_guidance.utils.placement import compute_dtype, execution_device
from kspec_guidance.utils.progress import progress as _progress

__all__ = ["ImageEmbedder", "TextEmbedder"]

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass
class ImageEmbedder:
    """Maps images to feature rows ``[n, d]`` float32, the unscaled output of a network.

    Args:
        network: maps ``[n, 3, size, size]``, normalised, to ``[n, d]``; a module or any callable.
        size: input size in pixels.
        name: name in records of scores.
        mean, std: normalisation of pixels in 0..1.
        fit: see :func:`to_pixels`.
        device: device of the network; modules are moved to it.
        fingerprint: fingerprint of the weights; computed if empty.
        same_distance: mean distance, at most, between images of one kind by features of norm 1; see
            :func:`~kspec_guidance.functional.kinds`.
        measured: whether ``same_distance`` was measured with this network, on sets of known kinds.
    """

    network: Callable[[Tensor], Tensor]
    size: int
    name: str
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    fit: str = "crop"
    device: str | torch.device = "cpu"
    fingerprint: str = field(default="")
    same_distance: float = SAME_DISTANCE
    measured: bool = False
    _statistics: dict[Any, tuple[Tensor, Tensor]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if isinstance(self.network, nn.Module):
            self.network = self.network.eval().requires_grad_(False).to(self.device)
        self.fingerprint = self.fingerprint or weights_fingerprint(self.network)

    def normalize(self, pixels: Tensor) -> Tensor:
        """Pixels ``[n, 3, h, w]`` in 0..1 with ``mean`` and ``std`` removed, on their device and in their dtype."""
        key = pixels.device, pixels.dtype
        if key not in self._statistics:  # copied once to each device
            with torch.inference_mode(False):
                mean, std = (torch.tensor(list(v)).to(*key).view(1, 3, 1, 1) for v in (self.mean, self.std))
                self._statistics[key] = mean, std
        mean, std = self._statistics[key]
        return (pixels - mean) / std

    def __mul__(self, other: Callable[..., Tensor]) -> ProductEmbedder:
        """The embedder whose kernel is the product of both; see :func:`~kspec_guidance.comparison.product_embedder`."""
        return product_embedder(self, other)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, images: Images, batch_size: int | None = None, progress: bool = False) -> Tensor:
        """Features ``[n, d]`` of images, on the CPU.

        Args:
            images: as :func:`to_pixels` takes them.
            batch_size: images at once. By default 32, and on a CPU at most 4 for each thread: the activations of more do
                not stay in its caches, and convolutions take up to three times as long.
            progress: show a progress bar.

        Raises:
            ValueError: for images that :func:`to_pixels` rejects, or features that are not finite.
        """
        rows = []
        device = execution_device(self.network, torch.device(self.device))
        if batch_size is None:
            batch_size = min(32, 4 * torch.get_num_threads()) if device.type == "cpu" else 32
        with _progress(len(images), progress, f"embedding with {self.name}") as advance:
            for start in range(0, len(images), batch_size):
                pixels = to_pixels(images[start : start + batch_size], self.size, self.fit)
                x = self.normalize(pixels.to(device))
                found = self.network(x.to(compute_dtype(self.network, x.dtype)))
                if not torch.isfinite(found).all():
                    raise ValueError(
                        f"{self.name} returned NaN or infinite features for images {start} to {start + len(found)}"
                    )
                rows.append(found.flatten(1).float().cpu())
                advance(len(found))
        return torch.cat(rows) if rows else torch.empty(0, 0)


@dataclass
class TextEmbedder:
    """Maps prompts to feature rows ``[n, p]`` float32; equal prompts are encoded once.

    Args:
        encode: maps a list of texts to ``[n, p]``.
        name: name in records of scores.
        fingerprint: fingerprint of the weights.
    """

    encode: Callable[[list[str]], Tensor]
    name: str
    fingerprint: str

    def __mul__(self, other: Callable[..., Tensor]) -> ProductEmbedder:
        """The embedder whose kernel is the product of both; see :func:`~kspec_guidance.comparison.product_embedder`."""
        return product_embedder(self, other)

    @torch.inference_mode(False)
    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> Tensor:
        """Features ``[n, p]`` of texts, on the CPU.

        Raises:
            TypeError: for a single string, or values that are not strings.
        """
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise TypeError("texts must be a list of strings, e.g. ['a dog']")
        unique = list(dict.fromkeys(texts))
        rows = []
        with _progress(len(unique), progress, f"embedding with {self.name}") as advance:
            for start in range(0, len(unique), batch_size):
                part = unique[start : start + batch_size]
                rows.append(self.encode(part).float().cpu())
                advance(len(part))
        index = {t: i for i, t in enumerate(unique)}
        return torch.cat(rows)[[index[t] for t in texts]] if rows else torch.empty(0, 0)
