"""Images, and captions if available, from a folder, WebDataset tar shards, or Parquet files."""

import hashlib
import io
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.evaluation.captions import match_captions, read_captions
from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.evaluation.embedders.cache import FeatureCache
from kspec_guidance.evaluation.judges import PromptJudge
from kspec_guidance.evaluation.readers import READ_ERRORS, SetReader
from kspec_guidance.utils.images import SourceError, decode_image, folder_images, to_pixels

__all__ = ["ImageSet", "by_prompt", "folder_captions", "load_images", "read_captions", "read_names", "thumbnail"]

THUMBNAIL_SIZE = 96
BATCH_SIZE = 64
DROPPED = "on the list of names to drop"
NAMES_SHOWN = 5  # in each line of a summary


@dataclass
class ImageSet:
    """The readable images of a set, and an account of all its other files and captions.

    Each file is in one of ``names``, ``skipped``, ``caption_files`` and ``unmatched``; each entry of a captions file
    belongs to an image or is in ``unmatched``.

    Attributes:
        path: path of the set.
        names: names of the images; unprintable characters are escaped.
        prompts: captions of the images, None for an image without one; None if no image has one.
        thumbnails: small JPEG files.
        features: ``[n, d]``.
        digests: SHA-256 of the images' files.
        judge: the judge of ``agreement``; None without one.
        agreement: how well each image shows its prompt ``[n]`` in 0..100, NaN where that is unknown; None without a judge
            or prompts.
        skipped: files that were not read, with the reason.
        unmatched: captions that belong to no image, by the file name in their list or by their own file, with the reason.
        num_captions: number of captions, matched or not.
        caption_files: files with captions, and texts beside images.
        first_frame_only: images that are animated or have several pages, of which the first was read.
        notes: remarks on how the set was read, e.g. from which column of a table.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    prompts: list[str | None] | None = None
    thumbnails: list[bytes] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    digests: list[str] = field(default_factory=list)
    judge: PromptJudge | None = None
    agreement: Tensor | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    num_captions: int = 0
    caption_files: list[str] = field(default_factory=list)
    first_frame_only: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def without_caption(self) -> list[str]:
        """Names of images without a caption; empty if no image has one."""
        return [n for n, p in zip(self.names, self.prompts or [], strict=False) if p is None]

    def account(self) -> dict[str, Any]:
        """Plain values, ready for JSON: how many images were read, and all that was left out."""
        return {
            "path": str(self.path),
            "images": len(self),
            "skipped": self.skipped,
            "captions": self.num_captions,
            "unmatched": self.unmatched,
            "without_caption": self.without_caption,
            "caption_files": self.caption_files,
            "first_frame_only": self.first_frame_only,
            "notes": self.notes,
        }

    def summary(self) -> list[str]:
        """One line for each kind of thing that was left out, with the first names."""
        groups: dict[str, list[str]] = {}
        for name, reason in self.skipped.items():
            kind, _, detail = reason.partition(": ")
            groups.setdefault(kind, []).append(f"{name} ({detail})" if detail else name)
        lines = [f"skipped {len(names)} {kind}: {_first(names)}" for kind, names in groups.items()]
        if self.unmatched:
            names = [f"{n} ({r})" if r != "no such image" else n for n, r in self.unmatched.items()]
            lines.append(f"{len(names)} of {self.num_captions} captions matched no image: {_first(names)}")
        if self.without_caption:
            lines.append(
                f"{len(self.without_caption)} of {len(self)} images have no caption; scores given prompts leave them out: "
                f"{_first(self.without_caption)}"
            )
        if self.first_frame_only:
            names = self.first_frame_only
            lines.append(f"{len(names)} animated or of several pages, first frame only: {_first(names)}")
        return lines + self.notes


def by_prompt(prompts: Sequence[str | None] | None) -> dict[str, list[int]]:
    """Indices of the images of each prompt that has at least two; images without one (None) are left out."""
    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts or []):
        if prompt is not None:
            groups.setdefault(prompt, []).append(i)
    return {p: indices for p, indices in groups.items() if len(indices) > 1}


def _first(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:NAMES_SHOWN]) + (" ..." if len(names) > NAMES_SHOWN else "")


def thumbnail(image: Image.Image, size: int = THUMBNAIL_SIZE) -> bytes:
    """A small JPEG file; the image is altered."""
    image.thumbnail((size, size))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


class _Features:
    """Collects the features of images by the digests of their files, in batches, with a cache.

    Args:
        embedder: of the features.
        cache: folder of cached features.
    """

    def __init__(self, embedder: ImageEmbedder, cache: str | Path | None):
        self.embedder = embedder
        self.cached = None if cache is None else FeatureCache(cache, embedder)
        self.rows: dict[str, Tensor] = {} if self.cached is None else self.cached.rows
        self.waiting: dict[str, Tensor] = {}
        self.changed = False

    def add(self, digest: str, image: Image.Image) -> None:
        if digest not in self.rows and digest not in self.waiting:
            self.waiting[digest] = to_pixels([image], self.embedder.size, self.embedder.fit)[0]
            if len(self.waiting) == BATCH_SIZE:
                self.embed()

    def embed(self) -> None:
        if self.waiting:
            found = self.embedder(torch.stack(list(self.waiting.values())), BATCH_SIZE)
            self.rows.update(zip(self.waiting, found, strict=True))
            self.waiting.clear()
            self.changed = True

    def save(self) -> None:
        if self.cached is not None and self.changed:
            self.cached.save()

    def of(self, digests: list[str]) -> Tensor:
        """``[n, d]``."""
        return torch.stack([self.rows[d] for d in digests])


def load_images(
    path: str | Path,
    embedder: ImageEmbedder,
    prompts: str | Path | None = None,
    cache: str | Path | None = None,
    progress_callback: Callable[[int], None] = lambda n: None,
    only: set[str] | None = None,
    drop: Collection[str] = (),
    judge: PromptJudge | None = None,
) -> ImageSet:
    """Read and embed all images of a folder (with its subfolders), tar shards, or Parquet files.

    Images of all types that the installed Pillow decodes are read as :func:`~kspec_guidance.utils.images.to_rgb` says. All
    other files are listed with the reason: what is no image or cannot be read in ``skipped``, captions without an image in
    ``unmatched``. Captions come from ``prompts``; from ``metadata.jsonl``, ``.csv`` or ``.parquet`` or ``captions.csv`` in
    any folder of the set, with names relative to it; from texts beside images (``0.txt``, ``0.png.txt``, ``.caption``,
    ``.json``), also in shards; or from a column. A blank caption counts as none.

    Args:
        path: path of the folder, shard or table.
        embedder: computes the features.
        prompts: captions file, used instead of those in the folder; ``-`` for standard input.
        cache: folder of cached features, by content and embedder.
        progress_callback: called with the number of images read since the last call.
        only: names of the images to read; all by default.
        drop: names of images to leave out, as :func:`read_names` returns them; they are listed in ``skipped``.
        judge: judges whether images show their prompts.

    Raises:
        SourceError: if there are no readable images, or the prompts cannot be read.
    """
    path = Path(path)
    reader = SetReader(path, None if prompts is None else Path(prompts))
    features = _Features(embedder, cache)
    judged = None if judge is None or judge.images.fingerprint == embedder.fingerprint else _Features(judge.images, cache)
    both = [f for f in (features, judged) if f is not None]
    found, captions = ImageSet(path), []
    names: list[str] = []
    digests, drop, dropped = found.digests, set(drop), 0
    try:
        for name, read, caption in reader.items():
            names.append(name)
            if only is not None and name not in only:
                continue
            if name in drop:
                found.skipped[name], dropped = DROPPED, dropped + 1
                continue
            try:
                data = read()
                image, more = decode_image(data)
            except READ_ERRORS as error:
                found.skipped[name] = f"unreadable: {error}"
                continue
            digest = hashlib.sha256(data).hexdigest()
            for part in both:
                part.add(digest, image)
            found.names.append(name)
            found.thumbnails.append(thumbnail(image))
            found.first_frame_only += [name] if more else []
            captions.append(caption)
            digests.append(digest)
            progress_callback(1)
        for part in both:
            part.embed()
    finally:  # also after Ctrl-C, so that the next call continues
        for part in both:
            part.save()
    found.skipped |= reader.skipped if only is None else {}
    found.notes, found.caption_files = reader.notes, reader.caption_files
    if dropped < len(drop):
        absent = sorted(drop.difference(names))
        found.notes.append(f"{len(absent)} of {len(drop)} names to drop are not in the set: {_first(absent)}")
    if not digests:
        left_out = "".join(f"; {line}" for line in found.summary())
        raise SourceError(f"{path} contains no readable images (PNG, JPEG, WebP and others that Pillow decodes){left_out}")
    found.features = features.of(digests)
    _assign_captions(found, captions, names, reader)
    if judge is not None and found.prompts is not None:
        known = [i for i, p in enumerate(found.prompts) if p is not None]
        rows, texts = (features if judged is None else judged).of(digests), [p for p in found.prompts if p is not None]
        found.judge, found.agreement = judge, torch.full((len(found),), torch.nan)
        found.agreement[known] = judge.agreement(rows[known], texts).float()
    return found


def folder_captions(folder: str | Path) -> list[str]:
    """The captions of a folder's images, in the order in which :func:`~kspec_guidance.utils.images.read_folder` has them.

    They come from lists in the folder or texts beside the images, as :func:`load_images` says.

    Args:
        folder: path of the images.

    Raises:
        SourceError: for a path that is no folder, a folder without images, a list that cannot be read, or an image without
            a caption; the message names the first ones.
    """
    names = folder_images(folder)
    found, reader = ImageSet(Path(folder)), SetReader(Path(folder))
    own: list[str | None] = []
    for name, _, caption in reader.items():
        found.names.append(name)
        own.append(caption)
    _assign_captions(found, own, found.names, reader)
    texts = dict(zip(found.names, found.prompts or [], strict=False))
    missing = [name for name in names if texts.get(name) is None]
    if missing:
        number = "none" if len(missing) == len(names) else f"{len(names) - len(missing)}"
        unused = [f"{name} ({reason})" for name, reason in found.unmatched.items()]
        raise SourceError(
            f"each image needs a caption, and {number} of the {len(names)} in {folder} has one: put metadata.jsonl or .csv "
            "with file_name and prompt (or caption, text) into the folder, or a text beside each image (0.txt for 0.png); "
            f"without a caption: {_first(missing)}" + (f"; captions of no image: {_first(unused)}" if unused else "")
        )
    return [str(texts[name]) for name in names]


def read_names(path: str | Path) -> set[str]:
    """Names of images from a text file, one a line, as reports write them for near-duplicates.

    Raises:
        SourceError: if the file cannot be read.
    """
    try:
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SourceError(f"{path} cannot be read as a list of names: {error}") from error
    return {line.rstrip("\r") for line in lines if line.strip()}


def _without_prefix(name: str, prefixes: Iterable[str]) -> str:
    return next((name.removeprefix(p) for p in prefixes if name.startswith(p)), name)


def _assign_captions(found: ImageSet, own: list[str | None], names: list[str], reader: SetReader) -> None:
    """Set the captions of the images that were read: those of captions files, else their own.

    Args:
        found: the images.
        own: the caption that came with each image.
        names: of all images, also those that were not read.
        reader: of the set, which has the captions files.

    Raises:
        SourceError: if no entry of the given captions file belongs to an image.
    """
    roots = {f"{folder.as_posix()}/" for folder in (reader.path.absolute(), reader.path.resolve())}
    entries = [replace(c, name=_without_prefix(c.name, roots)) for c in reader.captions]
    matched, unmatched, loose = match_captions(entries, names, reader.repeated)
    if reader.captions_file is not None and not entries:
        raise SourceError(f"{reader.captions_file} has no captions")
    if reader.captions_file is not None and not matched:
        raise SourceError(
            f"none of the {len(entries)} captions in {reader.captions_file} belongs to an image: it lists "
            f"{_first(c.name for c in entries)}, and the images are {_first(names)}"
        )
    unmatched |= {
        c.name: "its image was skipped" for name, c in matched.items() if found.skipped.get(name, DROPPED) != DROPPED
    }
    found.unmatched = reader.unmatched | unmatched
    listed = {name: c.text for name, c in matched.items()}
    prompts = [listed[name] if listed.get(name) is not None else p for name, p in zip(found.names, own, strict=True)]
    found.prompts = prompts if any(p is not None for p in prompts) else None
    found.num_captions = len(found.unmatched) + sum(p is not None for p in prompts)
    alone = {name for name, p in zip(found.names, own, strict=True) if p is None}
    loose = [f"{matched[name].name} to {name}" for name in loose if name in alone]
    if loose:
        found.notes.append(f"{len(loose)} captions matched by the end of their path only: {_first(loose)}")
