"""Uploaded files as images: checked before they are decoded, and never written under their own names."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

MAX_IMAGES = 256
MAX_BYTES = 8 * 2**20  # of one file
MAX_PIXELS = 4096 * 4096
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class UploadError(ValueError):
    """A rejected upload; the message says why, and what is accepted."""


def decode_image(data: bytes, name: str) -> Image.Image:
    """Decode one file to RGB, over white; its size is read from the header before that.

    Raises:
        UploadError: for another format, a broken file, or one that is too large.
    """
    if len(data) > MAX_BYTES:
        raise UploadError(f"{name} is larger than {MAX_BYTES // 2**20} MB; reduce it first")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MAX_PIXELS:
                size = f"{file.width} x {file.height}"
                raise UploadError(f"{name} has {size} pixels; at most {MAX_PIXELS // 10**6} million are accepted")
            image = file.convert("RGBA")
    except UploadError:
        raise
    except Image.DecompressionBombError as error:
        raise UploadError(f"{name} has far more pixels than the {MAX_PIXELS // 10**6} million that are accepted") from error
    except Exception as error:  # a decoder may raise anything on a broken file
        raise UploadError(f"{name} cannot be read as an image; {', '.join(FORMATS)} are accepted") from error
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def zip_members(path: Path) -> Iterator[tuple[bytes, str]]:
    """Yield the content of each file of a zip, and a name to show; the paths inside the zip are not used.

    Raises:
        UploadError: for too many files, or a zip that cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if not (i.is_dir() or i.filename.startswith("__MACOSX"))]
            if len(infos) > MAX_IMAGES:
                raise UploadError(f"the zip has {len(infos)} files; at most {MAX_IMAGES} are accepted")
            for k, info in enumerate(infos):
                with archive.open(info) as file:
                    yield file.read(MAX_BYTES + 1), f"file {k + 1} of the zip"  # the header may give another size
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UploadError(
            "the zip cannot be read: it is broken, encrypted, or compressed by an unsupported method"
        ) from error


def read_uploads(paths: Sequence[str] | None) -> list[Image.Image]:
    """Decode all files, and those inside zips.

    Raises:
        UploadError: for the first file that is rejected, for too many, or for none.
    """
    images: list[Image.Image] = []
    for number, path in enumerate(map(Path, paths or []), 1):
        files = zip_members(path) if path.suffix.lower() == ".zip" else [(path.read_bytes(), f"file {number}")]
        for data, name in files:
            if len(images) == MAX_IMAGES:
                raise UploadError(f"at most {MAX_IMAGES} images are accepted at once")
            images.append(decode_image(data, name))
    if not images:
        raise UploadError("upload images, or a zip of images, first")
    return images
