"""Images, and prompts if available, from a folder, WebDataset tar shards, or Parquet files."""

import csv
import hashlib
import io
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.evaluation.embedders.cache import FeatureCache
from kspec_guidance.utils.images import IMAGE_TYPES, SourceError, decode_image, image_files

__all__ = ["ImageSet", "load_images", "read_captions"]

CAPTION_COLUMNS = ("prompt", "caption", "text")
THUMBNAIL_SIZE = 96
BATCH_SIZE = 64


@dataclass
class ImageSet:
    """The readable images of a set.

    Attributes:
        path: path of the set.
        names: names of the images.
        prompts: prompts of the images, or None.
        thumbnails: small JPEG files.
        features: ``[n, d]``.
        skipped: names of files that could not be read.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    prompts: list[str] | None = None
    thumbnails: list[bytes] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


Item = tuple[str, Callable[[], bytes], str | None]


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, from ``metadata.jsonl`` or a CSV file with a header.

    The columns are ``file_name`` and ``prompt`` (or ``caption``, ``text``).

    Raises:
        SourceError: if the file does not exist, or a line cannot be read.
    """
    if not path.is_file():
        raise SourceError(f"no captions file at {path}")
    found = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[Any] = list(csv.DictReader(file) if path.suffix.lower() == ".csv" else map(_json_row, file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, row in enumerate(rows, 1):
        if row is None:
            raise SourceError(f"{path} line {number} is not a JSON object")
        name = row.get("file_name")
        prompt = next((row[k] for k in CAPTION_COLUMNS if row.get(k) is not None), None)
        if not name or prompt is None:
            raise SourceError(
                f"{path} entry {number} needs file_name and one of {', '.join(CAPTION_COLUMNS)}, has {list(row)}"
            )
        found[str(name)] = str(prompt)
    return found


def _json_row(line: str) -> dict | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _constant(data: bytes) -> Callable[[], bytes]:
    return lambda: data


def _folder(path: Path, prompts: dict[str, str]) -> Iterator[Item]:
    for file in image_files(path):
        name = file.relative_to(path).as_posix()
        yield name, file.read_bytes, prompts.get(name, prompts.get(file.name))


def _shards(files: list[Path]) -> Iterator[Item]:
    try:
        import webdataset
    except ImportError as error:
        raise SourceError("tar shards need: pip install 'kspec-guidance[data]'") from error
    for sample in webdataset.WebDataset([str(f) for f in files], shardshuffle=False):
        kinds = [k for k in sample if f".{k.rsplit('.', 1)[-1].lower()}" in IMAGE_TYPES]
        if not kinds:
            continue
        prompt = sample["txt"].decode("utf-8", "replace").strip() if "txt" in sample else None
        if prompt is None and "json" in sample:
            row = _json_row(sample["json"].decode("utf-8", "replace")) or {}
            prompt = next((str(row[k]) for k in CAPTION_COLUMNS if row.get(k) is not None), None)
        yield f"{sample['__key__']}.{kinds[0]}", _constant(sample[kinds[0]]), prompt


def _tables(files: list[Path]) -> Iterator[Item]:
    try:
        import datasets
    except ImportError as error:
        raise SourceError("Parquet files need: pip install 'kspec-guidance[data]'") from error
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        table = datasets.Dataset.from_parquet([str(f) for f in files], cache_dir=scratch)
        columns = [n for n, f in table.features.items() if isinstance(f, datasets.Image) or _holds_images(f)]
        if not columns:
            raise SourceError(f"{files[0]} has no image column (bytes and path); its columns are {list(table.features)}")
        column = columns[0]
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        for number, row in enumerate(table):
            cell = row[column]
            prompt = next((str(row[k]) for k in CAPTION_COLUMNS if row.get(k) is not None), None)
            name = row.get("file_name") or (cell.get("path") if isinstance(cell, dict) else None) or f"row {number}"
            data = cell["bytes"] if isinstance(cell, dict) else cell
            yield str(name), _constant(data or b""), prompt


def _holds_images(feature: Any) -> bool:
    """Whether a column contains structs of bytes and path, as image columns do, or plain bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _items(path: Path, prompts: Path | None) -> Iterator[Item]:
    if not path.exists():
        raise SourceError(f"{path} does not exist; give a folder of images, a .tar shard or a .parquet file")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in (".tar", ".parquet"))
    kind = files[0].suffix.lower() if files else ""
    if path.is_file() and kind not in (".tar", ".parquet"):
        raise SourceError(f"{path} is not a folder, a .tar shard or a .parquet file")
    if prompts is None and path.is_dir():
        prompts = next((path / n for n in ("metadata.jsonl", "captions.csv") if (path / n).is_file()), None)
    captions = {} if prompts is None else read_captions(prompts)
    if len({f.suffix.lower() for f in files}) > 1:
        raise SourceError(f"{path} contains both .tar and .parquet files; pass one of them, or move them to two folders")
    if kind == ".tar":
        source: Iterator[Item] = _shards(files)
    elif kind == ".parquet":
        source = _tables(files)
    else:
        source = _folder(path, captions)
    for name, read, prompt in source:
        yield name, read, captions.get(name, prompt)


def _thumbnail(image: Image.Image) -> bytes:
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB")
    flat.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    out = io.BytesIO()
    flat.save(out, "JPEG", quality=85)
    return out.getvalue()


def load_images(
    path: str | Path,
    embedder: ImageEmbedder,
    prompts: str | Path | None = None,
    cache: str | Path | None = None,
    progress_callback: Callable[[int], None] = lambda n: None,
    only: set[str] | None = None,
) -> ImageSet:
    """Read and embed all images of a folder (with its subfolders), tar shards, or Parquet files.

    Files that cannot be read as images are skipped and listed in ``skipped``. Prompts come from ``prompts``, from
    ``metadata.jsonl`` or ``captions.csv`` in the folder, from ``.txt`` and ``.json`` members of shards, or from a column.

    Args:
        path: path of the folder, shard or table.
        embedder: computes the features.
        prompts: captions file; by default that of the folder.
        cache: folder of cached features, by content and embedder.
        progress_callback: called with the number of images read since the last call.
        only: names of the images to read; all by default.

    Raises:
        SourceError: if there are no readable images, or the prompts cannot be read.
    """
    path = Path(path)
    cached = None if cache is None else FeatureCache(cache, embedder)
    found, captions = ImageSet(path), []
    waiting: list[tuple[str, Image.Image]] = []
    fresh: dict[str, Tensor] = {}

    def embed() -> None:
        if waiting:
            fresh.update(zip((d for d, _ in waiting), embedder([i for _, i in waiting], BATCH_SIZE), strict=True))
            waiting.clear()

    digests: list[str] = []
    queued: set[str] = set()
    for name, read, prompt in _items(path, None if prompts is None else Path(prompts)):
        if only is not None and name not in only:
            continue
        try:
            data = read()
            image = decode_image(data)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            found.skipped.append(name)
            continue
        digest = hashlib.sha256(data).hexdigest()
        found.names.append(name)
        found.thumbnails.append(_thumbnail(image))
        captions.append(prompt)
        digests.append(digest)
        if digest not in queued and (cached is None or digest not in cached.rows):
            waiting.append((digest, image))
        queued.add(digest)
        if len(waiting) == BATCH_SIZE:
            embed()
        progress_callback(1)
    embed()
    if not digests:
        broken = f"; {len(found.skipped)} files could not be read" if found.skipped else ""
        raise SourceError(f"{path} contains no readable images ({', '.join(sorted(IMAGE_TYPES))}){broken}")
    if cached is not None and fresh:
        cached.rows |= fresh
        cached.save()
    rows = [fresh[d] if d in fresh else cached.rows[d] for d in digests]  # type: ignore[union-attr]
    found.features = torch.stack(rows)
    found.prompts = [p or "" for p in captions] if any(p is not None for p in captions) else None
    return found
