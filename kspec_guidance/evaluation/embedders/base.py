"""What an embedder is: a network, the pixels it wants, a name, and a fingerprint of its weights."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from kspec_guidance.utils.images import to_pixels
from kspec_guidance.utils.progress import progress as _progress

__all__ = ["ImageEmbedder", "Images", "TextEmbedder", "weights_fingerprint"]

Images = Sequence[Image.Image] | Tensor
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def weights_fingerprint(module: Any) -> str:
    """Twelve hexadecimal digits of all weights' names, shapes and values; other callables go by their name."""
    digest = hashlib.sha256(type(module).__qualname__.encode())
    if not isinstance(module, nn.Module):
        name = f"{getattr(module, '__module__', '')}.{getattr(module, '__qualname__', type(module).__qualname__)}"
        return hashlib.sha256(name.encode()).hexdigest()[:12]
    for name, value in module.state_dict().items():
        digest.update(f"{name}{list(value.shape)}{value.dtype}".encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


@dataclass
class ImageEmbedder:
    """Images to feature rows ``[n, d]`` float32, as the network gives them; scores with the cosine kernel scale them.

    Args:
        network: maps ``[n, 3, size, size]``, normalised, to ``[n, d]``; a module or any callable.
        size: input size in pixels.
        name: what a record calls it.
        mean, std: of the normalisation of pixels in 0..1.
        fit: see :func:`to_pixels`.
        device: where the network runs; modules are moved there.
        fingerprint: of the weights; computed for modules.
    """

    network: Callable[[Tensor], Tensor]
    size: int
    name: str
    mean: Sequence[float] = IMAGENET_MEAN
    std: Sequence[float] = IMAGENET_STD
    fit: str = "crop"
    device: str | torch.device = "cpu"
    fingerprint: str = field(default="")

    def __post_init__(self) -> None:
        if isinstance(self.network, nn.Module):
            self.network = self.network.eval().requires_grad_(False).to(self.device)
        self.fingerprint = self.fingerprint or weights_fingerprint(self.network)

    @torch.no_grad()
    def __call__(self, images: Images, batch_size: int = 32, progress: bool = False) -> Tensor:
        """``[n, d]`` on the CPU.

        Raises:
            ValueError: for pixels that are not as :func:`to_pixels` wants them, or features that are not finite.
        """
        mean, std = (torch.tensor(list(v)).view(1, 3, 1, 1) for v in (self.mean, self.std))
        rows = []
        with _progress(len(images), progress, f"embedding with {self.name}") as tick:
            for start in range(0, len(images), batch_size):
                pixels = to_pixels(images[start : start + batch_size], self.size, self.fit)
                found = self.network(((pixels - mean) / std).to(self.device))
                if not torch.isfinite(found).all():
                    raise ValueError(
                        f"{self.name} gave NaN or infinite features for images {start} to {start + len(found)}"
                    )
                rows.append(found.flatten(1).float().cpu())
                tick(len(found))
        return torch.cat(rows) if rows else torch.empty(0, 0)


@dataclass
class TextEmbedder:
    """Prompts to feature rows ``[n, p]`` float32; equal prompts are encoded once.

    Args:
        encode: maps a list of texts to ``[n, p]``.
        name: what a record calls it.
        fingerprint: of its weights.
    """

    encode: Callable[[list[str]], Tensor]
    name: str
    fingerprint: str

    @torch.no_grad()
    def __call__(self, texts: Sequence[str], batch_size: int = 64, progress: bool = False) -> Tensor:
        """``[n, p]`` on the CPU.

        Raises:
            TypeError: for a single text, or what is no text.
        """
        if isinstance(texts, str) or not all(isinstance(t, str) for t in texts):
            raise TypeError("texts must be a list of strings, e.g. ['a dog']")
        unique = list(dict.fromkeys(texts))
        rows = []
        with _progress(len(unique), progress, f"embedding with {self.name}") as tick:
            for start in range(0, len(unique), batch_size):
                part = unique[start : start + batch_size]
                rows.append(self.encode(part).float().cpu())
                tick(len(part))
        place = {t: i for i, t in enumerate(unique)}
        return torch.cat(rows)[[place[t] for t in texts]] if rows else torch.empty(0, 0)
