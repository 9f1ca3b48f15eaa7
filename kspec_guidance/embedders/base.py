"""What an embedder is: a network, the pixels it wants, a name, and a fingerprint of its weights."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as nnf

__all__ = ["ImageEmbedder", "Images", "TextEmbedder", "to_pixels", "weights_fingerprint"]

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


def _fit_box(height: int, width: int, size: tuple[int, int], fit: str) -> tuple[int, int]:
    if fit == "squash":
        return size
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def _from_pil(image: Image.Image, size: tuple[int, int], fit: str) -> Tensor:
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba).convert("RGB")
    h, w = _fit_box(flat.height, flat.width, size, fit)
    flat = flat.resize((w, h), Image.Resampling.BICUBIC)  # Pillow's filters grow with the reduction: no aliasing
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    flat = flat.crop((left, top, left + size[1], top + size[0]))
    return torch.from_numpy(np.asarray(flat, dtype=np.float32)).permute(2, 0, 1) / 255


def to_pixels(images: Images, size: int | tuple[int, int], fit: str = "crop") -> Tensor:
    """``[n, 3, height, width]`` float32 in 0..1: resized with antialiasing, alpha over white.

    Args:
        images: PIL images of any mode and size, or a tensor ``[n, 3, h, w]`` (or ``[n, 1, h, w]``, grey): uint8 in
            0..255 or floating point in 0..1.
        size: side of a square, or height and width, in pixels.
        fit: ``crop`` scales until both sides are covered and takes the middle; ``squash`` changes the aspect ratio.

    Raises:
        TypeError: for other types.
        ValueError: for other layouts or ranges.
    """
    if fit not in ("crop", "squash"):
        raise ValueError(f"fit must be 'crop' or 'squash', got {fit!r}")
    size = (size, size) if isinstance(size, int) else size
    if isinstance(images, Tensor):
        return _from_tensor(images, size, fit)
    images = list(images)
    bad = [type(i).__name__ for i in images if not isinstance(i, Image.Image)]
    if bad:
        raise TypeError(f"images must be PIL images or one tensor [n, 3, h, w], got {bad[0]}")
    return torch.stack([_from_pil(i, size, fit) for i in images]) if images else torch.empty(0, 3, *size)


def _from_tensor(x: Tensor, size: tuple[int, int], fit: str) -> Tensor:
    if x.ndim != 4 or x.shape[1] not in (1, 3):
        cure = "; move the channels: images.permute(0, 3, 1, 2)" if x.ndim == 4 and x.shape[-1] in (1, 3) else ""
        raise ValueError(f"images must have shape [n, 3, h, w], got {list(x.shape)}{cure}")
    if not x.is_floating_point():
        if x.dtype != torch.uint8:
            raise ValueError(f"whole-number images must be uint8 in 0..255, got {x.dtype}")
        x = x.float() / 255
    x = x.float()
    if x.numel() and not (torch.isfinite(x).all() and float(x.min()) >= -1e-3 and float(x.max()) <= 1.001):
        low, high = float(x.min()), float(x.max())
        cure = "divide by 255" if high > 1.5 else "map -1..1 to 0..1 by images / 2 + 0.5"
        raise ValueError(f"floating-point images must lie in 0..1, got {low:.3g}..{high:.3g}; {cure}")
    h, w = _fit_box(x.shape[2], x.shape[3], size, fit)
    if (h, w) != tuple(x.shape[2:]):
        x = nnf.interpolate(x, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]].clamp(0, 1).expand(-1, 3, -1, -1)


@contextmanager
def quiet_loading() -> Iterator[None]:
    """No progress bars of diffusers and transformers inside: loading from disk takes a second."""
    from diffusers.utils import logging as a
    from transformers.utils import logging as b

    shown = [m for m in (a, b) if m.is_progress_bar_enabled()]
    try:
        for m in shown:
            m.disable_progress_bar()
        yield
    finally:
        for m in shown:
            m.enable_progress_bar()


@contextmanager
def _progress(total: int, shown: bool, what: str) -> Iterator[Callable[[int], None]]:
    if not shown:
        yield lambda n: None
        return
    from rich.progress import Progress

    with Progress(transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda n: bar.advance(task, n)


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
