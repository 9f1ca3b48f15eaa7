"""Uploaded files as images: checked before they are decoded, and never written under their own names."""

import re
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from PIL import Image

from kspec_guidance.utils.folders import HIDDEN, is_hidden
from kspec_guidance.utils.images import SourceError, decode_image

MAX_IMAGES = 256
MAX_BYTES = 8 * 2**20  # of one file
MAX_PIXELS = 4096 * 4096
MAX_SIDE = 1024  # to which images are reduced, since all are held in memory
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class UploadError(ValueError):
    """A rejected upload; the message says why, and what is accepted."""


class Uploads(list[Image.Image]):
    """The images of an upload, RGB over white, and what was left out.

    Attributes:
        skipped: the reason for each file that is no image that can be read.
        first_frame_only: animations, of which the first frame was read.
    """

    def __init__(self) -> None:
        super().__init__()
        self.skipped: dict[str, str] = {}
        self.first_frame_only: list[str] = []

    def notes(self) -> list[str]:
        """Lines that say what was left out, with the first names."""
        lines = []
        if self.skipped:
            first = "; ".join(f"{n} {r}" for n, r in list(self.skipped.items())[:3])
            more = f"; and {len(self.skipped) - 3} more" if len(self.skipped) > 3 else ""
            lines.append(f"{len(self.skipped)} files are left out: {first}{more}")
        if self.first_frame_only:
            lines.append(f"only the first frame is read of {len(self.first_frame_only)} animations")
        return lines


def zip_members(path: Path) -> Iterator[tuple[bytes, str, str | None]]:
    """Yield the content of each file of a zip, a name to show, and the reason if it is not read.

    The paths inside the zip are not used.

    Raises:
        UploadError: for too many files, or a zip that cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            infos = [i for i in archive.infolist() if not i.is_dir()]
            visible = [i for i in infos if not any(is_hidden(p) for p in i.filename.split("/") if p != "..")]
            if len(visible) > MAX_IMAGES:
                raise UploadError(f"the zip has {len(visible)} files; at most {MAX_IMAGES} are accepted")
            known = set(map(id, visible))
            for k, info in enumerate(infos):
                name = re.sub(r"[^\w. -]", "_", info.filename.rpartition("/")[2])[-40:]
                data, reason = b"", None if id(info) in known else f"is {HIDDEN}"
                try:
                    if reason is None:
                        with archive.open(info) as file:
                            data = file.read(MAX_BYTES + 1)  # the header may give another size
                except Exception:  # of a damaged or encrypted file, or an unknown compression
                    reason = "is damaged, encrypted, or compressed by an unsupported method"
                yield data, f"file {k + 1} of the zip ({name})", reason
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, EOFError) as error:
        if isinstance(error, UploadError):
            raise
        raise UploadError("the zip cannot be read: it is broken, or of an unsupported kind") from error


def read_uploads(paths: Sequence[str] | None) -> Uploads:
    """Decode all files, and those inside zips; what is not an image that can be read is skipped.

    Raises:
        UploadError: for too many files, or if none can be read.
    """
    found, count = Uploads(), 0
    for number, path in enumerate(map(Path, paths or []), 1):
        is_zip = path.suffix.lower() == ".zip"
        for data, label, reason in zip_members(path) if is_zip else [(path.read_bytes(), f"file {number}", None)]:
            name = f"{label}, upload {number}" if is_zip and len(paths or []) > 1 else label
            if reason is not None:
                found.skipped[name] = reason
                continue
            if count == MAX_IMAGES:
                raise UploadError(f"at most {MAX_IMAGES} images are accepted at once")
            count += 1
            _read(data, name, found)
    if not found:
        message = next(
            (f"{name} {reason}" for name, reason in found.skipped.items()), "upload images, or a zip of images, first"
        )
        others = f"; nor can {len(found.skipped) - 1} other files be read" if len(found.skipped) > 1 else ""
        raise UploadError(message + others)
    return found


def _read(data: bytes, name: str, found: Uploads) -> None:
    """Add a file to the images, or to those that are skipped."""
    if len(data) > MAX_BYTES:
        found.skipped[name] = f"is larger than {MAX_BYTES // 2**20} MB; reduce it first"
        return
    try:
        image, more = decode_image(data, FORMATS, MAX_PIXELS)
    except SourceError as error:
        found.skipped[name] = f"cannot be read as an image: {error}; {', '.join(FORMATS)} are accepted"
        return
    image.thumbnail((MAX_SIDE, MAX_SIDE))
    found.append(image)
    found.first_frame_only += [name] if more else []
