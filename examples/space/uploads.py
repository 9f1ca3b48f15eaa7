"""What visitors upload, as pictures: checked before it is decoded, never written under its own name."""

import io
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

MOST_IMAGES = 256
MOST_BYTES = 8 * 2**20  # of one picture
MOST_PIXELS = 4096 * 4096
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class UploadError(ValueError):
    """An upload that is refused; the message says why, and what is taken."""


def picture(data: bytes, name: str) -> Image.Image:
    """One RGB picture. Its size is read from the header before anything is decoded.

    Raises:
        UploadError: for another format, a broken file, or one too large.
    """
    if len(data) > MOST_BYTES:
        raise UploadError(f"{name} is larger than {MOST_BYTES // 2**20} MB; shrink it first")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as file:
            if file.width * file.height > MOST_PIXELS:
                size = f"{file.width} x {file.height}"
                raise UploadError(f"{name} has {size} pixels; at most {MOST_PIXELS // 10**6} million are taken")
            shown = file.convert("RGBA")
    except UploadError:
        raise
    except Image.DecompressionBombError as error:
        raise UploadError(f"{name} has far more pixels than the {MOST_PIXELS // 10**6} million that are taken") from error
    except Exception as error:  # a decoder may raise anything on a broken file
        raise UploadError(f"{name} cannot be read as a picture; {', '.join(FORMATS)} are taken") from error
    return Image.alpha_composite(Image.new("RGBA", shown.size, "white"), shown).convert("RGB")


def members(data: Path) -> Iterator[tuple[bytes, str]]:
    """The pictures of a zip, one at a time in memory; its folders and names lead nowhere."""
    try:
        with zipfile.ZipFile(data) as archive:
            infos = [i for i in archive.infolist() if not (i.is_dir() or i.filename.startswith("__MACOSX"))]
            if len(infos) > MOST_IMAGES:
                raise UploadError(f"the zip holds {len(infos)} files; at most {MOST_IMAGES} are taken")
            for k, info in enumerate(infos):
                with archive.open(info) as file:
                    yield file.read(MOST_BYTES + 1), f"file {k + 1} of the zip"  # whatever its header says
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError) as error:
        raise UploadError("the zip cannot be read: it is broken, encrypted, or packed in an unusual way") from error


def read_uploads(paths: Sequence[str] | None) -> list[Image.Image]:
    """All pictures of the files, zips unpacked.

    Raises:
        UploadError: for the first that is refused, for too many, or for none.
    """
    found: list[Image.Image] = []
    for number, path in enumerate(map(Path, paths or []), 1):
        files = members(path) if path.suffix.lower() == ".zip" else [(path.read_bytes(), f"file {number}")]
        for data, name in files:
            if len(found) == MOST_IMAGES:
                raise UploadError(f"at most {MOST_IMAGES} pictures are taken at once")
            found.append(picture(data, name))
    if not found:
        raise UploadError("upload pictures, or a zip of pictures, first")
    return found
