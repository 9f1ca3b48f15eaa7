"""Image files and images as tensors of pixels."""

import io
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as nnf

__all__ = ["IMAGE_TYPES", "Images", "SourceError", "decode_image", "image_files", "load_folder", "to_pixels"]

Images = Sequence[Image.Image] | Tensor
IMAGE_TYPES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


class SourceError(ValueError):
    """A folder, shard or table without images, or a captions file that cannot be read."""


def image_files(folder: Path) -> list[Path]:
    """Image files of a folder and its subfolders, by name; hidden files (unfinished files, caches) are skipped."""
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in IMAGE_TYPES and p.is_file())
    return [p for p in found if not any(part.startswith(".") for part in p.relative_to(folder).parts)]


def load_folder(folder: str | os.PathLike) -> list[Image.Image]:
    """All images of a folder and its subfolders as RGBA, ordered by name; for sets that fit into memory.

    Raises:
        SourceError: if the folder does not exist or contains no images, or if an image cannot be read.
    """
    if not Path(folder).is_dir():
        raise SourceError(f"{folder} is not a folder of images")
    found = []
    for path in image_files(Path(folder)):
        try:
            with Image.open(path) as file:
                found.append(file.convert("RGBA"))
        except OSError as error:
            raise SourceError(f"{path} cannot be read as an image: {error}") from error
    if not found:
        raise SourceError(f"{folder} contains no images ({', '.join(sorted(IMAGE_TYPES))})")
    return found


def decode_image(data: bytes) -> Image.Image:
    """Decode an image to RGBA."""
    with Image.open(io.BytesIO(data)) as file:
        return file.convert("RGBA")


def _fit_box(height: int, width: int, size: tuple[int, int], fit: str) -> tuple[int, int]:
    """Height and width to which an image is resized before it is cropped."""
    if fit == "squash":
        return size
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def _from_pil(image: Image.Image, size: tuple[int, int], fit: str) -> Tensor:
    rgba = image.convert("RGBA")
    flat = Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba).convert("RGB")
    h, w = _fit_box(flat.height, flat.width, size, fit)
    flat = flat.resize((w, h), Image.Resampling.BICUBIC)  # Pillow scales the filter with the reduction: no aliasing
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    flat = flat.crop((left, top, left + size[1], top + size[0]))
    return torch.from_numpy(np.asarray(flat, dtype=np.float32)).permute(2, 0, 1) / 255


def to_pixels(images: Images, size: int | tuple[int, int], fit: str = "crop") -> Tensor:
    """Images as ``[n, 3, height, width]`` float32 in 0..1: resized with antialiasing, alpha over white.

    Args:
        images: PIL images of any mode and size, or a tensor ``[n, 3, h, w]`` (or ``[n, 1, h, w]``, grey): uint8 in
            0..255 or floating point in 0..1.
        size: side of a square, or height and width, in pixels.
        fit: ``crop`` resizes to cover both sides and crops the centre; ``squash`` changes the aspect ratio.

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
        advice = "; move the channels: images.permute(0, 3, 1, 2)" if x.ndim == 4 and x.shape[-1] in (1, 3) else ""
        raise ValueError(f"images must have shape [n, 3, h, w], got {list(x.shape)}{advice}")
    if not x.is_floating_point():
        if x.dtype != torch.uint8:
            raise ValueError(f"integer images must be uint8 in 0..255, got {x.dtype}")
        x = x.float() / 255
    x = x.float()
    if x.numel() and not (torch.isfinite(x).all() and float(x.min()) >= -1e-3 and float(x.max()) <= 1.001):
        low, high = float(x.min()), float(x.max())
        advice = "divide by 255" if high > 1.5 else "map -1..1 to 0..1 by images / 2 + 0.5"
        raise ValueError(f"floating-point images must lie in 0..1, got {low:.3g}..{high:.3g}; {advice}")
    h, w = _fit_box(x.shape[2], x.shape[3], size, fit)
    if (h, w) != tuple(x.shape[2:]):
        x = nnf.interpolate(x, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]].clamp(0, 1).expand(-1, 3, -1, -1)
