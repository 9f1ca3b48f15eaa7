"""Image files and images as tensors of pixels."""

import importlib
import io
import math
import mimetypes
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as nnf

from kspec_guidance.utils.folders import HIDDEN, list_files, printable
from kspec_guidance.utils.messages import warn_user

__all__ = [
    "Images",
    "SourceError",
    "decode_image",
    "folder_images",
    "image_types",
    "not_an_image",
    "read_folder",
    "to_frames",
    "to_pixels",
    "to_rgb",
]

Images = Sequence[Image.Image] | Tensor
PLUGINS = ("pillow_heif", "pillow_avif", "pillow_jxl")  # decoders that are used where they are installed
# Ghostscript and Windows would draw the first two. Pillow reads numbers of FITS in the wrong byte order, and recognises the
# others without decoding them.
EXCLUDED_FORMATS = ("EPS", "WMF", "FITS", "BUFR", "GRIB", "HDF5", "MPEG")
UNREAD_TYPES = (".heic", ".heif", ".jxl")  # images that mimetypes may not know
TEXT_TYPES = (".txt", ".caption", ".json", ".jsonl", ".csv", ".parquet")  # captions beside images
NO_IMAGES = "{} contains no images (PNG, JPEG, WebP and others that Pillow decodes)"
OPAQUE_MODES = ("1", "L", "RGB", "RGBX", "CMYK", "YCbCr", "HSV")
ORIENTATION, BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 274, 258, 262, 339  # tags of EXIF and TIFF


class SourceError(ValueError):
    """A folder, shard or table without images, or a captions file or image that cannot be read."""


@cache
def _register_plugins() -> None:
    Image.init()
    for name in PLUGINS:
        with suppress(ImportError):
            getattr(importlib.import_module(name), "register_heif_opener", lambda: None)()


def _formats() -> list[str]:
    """Formats that are decoded, in the order in which Pillow tries them."""
    _register_plugins()
    return [name for name in Image.ID if name not in EXCLUDED_FORMATS]


def image_types() -> set[str]:
    """Extensions of the images that the installed Pillow decodes, in lower case, e.g. ``.png``."""
    formats = set(_formats())
    return {extension for extension, name in Image.registered_extensions().items() if name in formats}


def not_an_image(name: str) -> str:
    """Why a file without one of the :func:`image_types` is not read."""
    extension = os.path.splitext(name)[1].lower()
    if extension in UNREAD_TYPES or (mimetypes.guess_type(name)[0] or "").startswith("image/"):
        plugin = "; pip install pillow-heif" if extension in (".heic", ".heif") else ""
        return f"of a type that Pillow does not decode here: {extension}{plugin}"
    return "not an image"


def read_folder(folder: str | os.PathLike) -> Iterator[Image.Image]:
    """The images of a folder and its subfolders as RGB, one by one, ordered by name.

    Hidden files and texts (captions) are left out; at the end a warning names other files that are not read, and
    animations, of which the first frame is read.

    Raises:
        SourceError: if the folder does not exist or contains no images, or if an image cannot be read.
    """
    folder = _as_folder(folder)
    count, unread, types = 0, [], image_types()
    files, left_out = list_files(folder)
    for path in files:
        name = printable(path.relative_to(folder).as_posix())
        if path.suffix.lower() not in types:
            unread += [] if path.suffix.lower() in TEXT_TYPES else [f"{name} ({not_an_image(name)})"]
            continue
        try:
            image, more = decode_image(path)
        except SourceError as error:
            raise SourceError(f"{path} cannot be read as an image: {error}") from error
        unread += [f"{name} (all frames but the first)"] if more else []
        count += 1
        yield image
    if not count:
        raise SourceError(NO_IMAGES.format(folder))
    unread += [f"{name} ({reason})" for name, reason in left_out.items() if reason != HIDDEN]
    if unread:
        more_names = f" and {len(unread) - 5} more" if len(unread) > 5 else ""
        warn_user(f"not read from {folder}: {', '.join(unread[:5])}{more_names}")


def folder_images(folder: str | os.PathLike) -> list[str]:
    """Names, relative to the folder, of the images that :func:`read_folder` reads, in its order.

    Raises:
        SourceError: if the folder does not exist or contains no images.
    """
    folder, types = _as_folder(folder), image_types()
    found = [path for path in list_files(folder)[0] if path.suffix.lower() in types]
    if not found:
        raise SourceError(NO_IMAGES.format(folder))
    return [printable(path.relative_to(folder).as_posix()) for path in found]


def _as_folder(folder: str | os.PathLike) -> Path:
    if not str(folder).strip():
        raise SourceError("the name of the folder is empty")
    if not Path(folder).is_dir():
        raise SourceError(f"{folder} is not a folder of images")
    return Path(folder)


def decode_image(
    source: bytes | os.PathLike, formats: Sequence[str] | None = None, max_pixels: int | None = None
) -> tuple[Image.Image, bool]:
    """Decode the first frame of an image as :func:`to_rgb` does, and tell whether there are more frames or pages.

    Args:
        source: the content of a file, or its path.
        formats: Pillow's names of the formats that are accepted; by default all that it decodes without other programs.
        max_pixels: largest number of pixels, besides Pillow's own limit.

    Raises:
        SourceError: with the reason, if it cannot be decoded.
    """
    data = None
    try:
        accepted = _formats() if formats is None else list(formats)
        data = source if isinstance(source, bytes) else Path(source).read_bytes()
        with Image.open(io.BytesIO(data), formats=accepted) as file:
            if max_pixels is not None and file.width * file.height > max_pixels:
                raise SourceError(f"{file.width} x {file.height} pixels, more than {max_pixels // 10**6} million")
            image = to_rgb(file)
            image = image.copy() if image is file else image
            image.info = {}
            return image, _has_more_frames(file)
    except Exception as error:  # a decoder may raise anything on a damaged file
        raise SourceError(_reason(error, data)) from error


def _reason(error: Exception, data: bytes | None) -> str:
    if data == b"":
        return "an empty file"
    if data is not None and data.startswith(b"version https://git-lfs"):
        return "a pointer of Git LFS; run git lfs pull"
    if isinstance(error, UnidentifiedImageError):
        return "an unknown or damaged format"
    if isinstance(error, Image.DecompressionBombError):
        return f"far more pixels than Pillow accepts: {error}"
    return printable(str(error)) or type(error).__name__


def _has_more_frames(file: Image.Image) -> bool:
    if file.format == "PSD":  # its frames are layers of one picture
        return False
    try:
        return bool(getattr(file, "is_animated", False))
    except Exception:  # of a damaged second frame
        return True


def to_rgb(image: Image.Image) -> Image.Image:
    """An image of any mode as 8-bit RGB: turned upright by its EXIF orientation, transparency over white.

    16-bit grey is divided by 257. Floating point in 0..1 is multiplied by 255, and floating point and 32-bit integers in
    0..255 are kept; those of another range, or within a sixteenth of these, are mapped from their smallest and largest
    value to 0 and 255.

    Args:
        image: an image; it is not altered, and returned itself if it is RGB and upright.

    Raises:
        SourceError: for an image without pixels or without finite values.
    """
    if 0 in image.size:
        raise SourceError("an image without pixels")
    found = _upright(image)
    if found.mode.startswith("I") or found.mode == "F":
        return _grey(found, image).convert("RGB")
    opaque = found.mode in OPAQUE_MODES and "transparency" not in found.info
    if opaque:
        return found if found.mode == "RGB" else found.convert("RGB")
    rgba = (found.convert("LA") if found.mode == "La" else found).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", rgba.size, (255,) * 4), rgba).convert("RGB")


def _upright(image: Image.Image) -> Image.Image:
    try:
        return image if image.getexif().get(ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    except Exception:  # damaged EXIF data
        return image


def _grey(image: Image.Image, file: Image.Image) -> Image.Image:
    """8-bit grey of 16-bit or 32-bit integers, or floating point; ``file`` has the format and the tags."""
    values, tags = np.asarray(image).astype(np.float64), getattr(file, "tag_v2", {})
    if file.mode == "I" and file.format == "TIFF" and tags.get(SAMPLE_FORMAT, (1,))[0] == 1:
        values %= 2**32  # unsigned, in Pillow's signed mode
    finite = values[np.isfinite(values)]
    if not finite.size:
        raise SourceError("an image without finite values")
    low, high = float(finite.min()), float(finite.max())
    if file.mode.startswith("I;16"):
        low, high = 0.0, 2.0 ** tags.get(BITS_PER_SAMPLE, (16,))[0] - 1
    elif file.mode == "I" and file.format in ("PNG", "PPM"):  # 16 bits in Pillow's older mode
        low, high = 0.0, 65535.0
    elif low >= 0:
        usual = next((top for top in (1.0, 255.0) if top / 16 < high <= top and (top > 1 or file.mode == "F")), None)
        low, high = (low, high) if usual is None else (0.0, usual)
    grey = np.nan_to_num((values - low) * (255 / max(high - low, 1e-300)), nan=0.0, posinf=255.0, neginf=0.0)
    if tags.get(PHOTOMETRIC) == 0:  # white is zero
        grey = 255 - grey
    if isinstance(file.info.get("transparency"), int):
        grey = np.where(values == file.info["transparency"], 255, grey)
    return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8))


def _fit_box(height: int, width: int, size: tuple[int, int], fit: str) -> tuple[int, int]:
    """Height and width to which an image is resized before it is cropped."""
    if fit == "squash":
        return size
    scale = max(size[0] / height, size[1] / width)
    return max(size[0], round(height * scale)), max(size[1], round(width * scale))


def _from_pil(image: Image.Image, size: tuple[int, int], fit: str) -> Tensor:
    if not isinstance(image, Image.Image):
        raise TypeError(f"images must be PIL images or one tensor [n, 3, h, w], got {type(image).__name__}")
    rgb = to_rgb(image)
    h, w = _fit_box(rgb.height, rgb.width, size, fit)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    y, x = rgb.height / h, rgb.width / w  # only the part that remains after the crop is resized
    box = (left * x, top * y, min((left + size[1]) * x, rgb.width), min((top + size[0]) * y, rgb.height))
    rgb = rgb.resize(size[::-1], Image.Resampling.BICUBIC, box)  # Pillow scales the filter with the reduction: no aliasing
    return torch.from_numpy(np.asarray(rgb, dtype=np.float32)).permute(2, 0, 1) / 255


def to_pixels(images: Iterable[Image.Image] | Tensor, size: int | tuple[int, int], fit: str = "crop") -> Tensor:
    """Images as ``[n, 3, height, width]`` float32 in 0..1: resized with antialiasing, alpha over white.

    Args:
        images: PIL images of any mode and size, taken one by one and read as :func:`to_rgb` says, or a tensor
            ``[n, 3, h, w]`` (or ``[n, 1, h, w]``, grey): uint8 in 0..255 or floating point in 0..1.
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
    pixels = [_from_pil(i, size, fit) for i in images]
    return torch.stack(pixels) if pixels else torch.empty(0, 3, *size)


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
    x = _crop_long_side(x, size) if fit == "crop" else x
    h, w = _fit_box(x.shape[2], x.shape[3], size, fit)
    if (h, w) != tuple(x.shape[2:]):
        x = nnf.interpolate(x, size=(h, w), mode="bicubic", antialias=True, align_corners=False)
    top, left = (h - size[0]) // 2, (w - size[1]) // 2
    return x[:, :, top : top + size[0], left : left + size[1]].clamp(0, 1).expand(-1, 3, -1, -1)


def _crop_long_side(x: Tensor, size: tuple[int, int]) -> Tensor:
    """The middle of images ``[n, c, h, w]`` that are over four times as long as needed, so that less is resized."""
    height, width = x.shape[2:]
    scale = max(size[0] / height, size[1] / width)
    for dim, length in ((2, height), (3, width)):
        needed = math.ceil(4 * size[dim - 2] / scale)
        if length > needed:
            needed += (length - needed) % 2  # the middle stays the middle
            x = x.narrow(dim, (length - needed) // 2, needed)
    return x


def to_frames(sample: Any) -> list[Image.Image]:
    """A sample as PIL images.

    Args:
        sample: an image, a list of frames, an array ``[h, w, c]`` or ``[f, h, w, c]``, or a tensor ``[c, h, w]`` or
            ``[f, c, h, w]``, with values in 0..1 or 8 bits.

    Raises:
        ValueError: for another shape, or values outside 0..1.
    """
    if isinstance(sample, Image.Image):
        return [sample]
    if isinstance(sample, list | tuple):
        return [frame for part in sample for frame in to_frames(part)]
    if isinstance(sample, Tensor):
        sample = sample.detach().float().cpu().numpy()
        sample = np.moveaxis(sample, -3, -1) if sample.ndim >= 3 else sample
    array = np.asarray(sample)
    if array.ndim not in (3, 4) or array.shape[-1] not in (1, 3, 4):
        raise ValueError(f"samples of shape {list(array.shape)} are sound or latents")
    if array.dtype != np.uint8:
        if not (np.isfinite(array).all() and array.min() >= -1e-3 and array.max() <= 1.001):
            raise ValueError(f"values must lie in 0..1, got {array.min():.3g}..{array.max():.3g}")
        array = (array * 255).round().clip(0, 255).astype(np.uint8)
    frames = array if array.ndim == 4 else array[None]
    return [Image.fromarray(frame[..., 0] if frame.shape[-1] == 1 else frame) for frame in frames]
