"""Images, and prompts where there are any, from a folder, WebDataset tar shards, or Parquet files."""

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
from kspec_guidance.utils.images import IMAGE_TYPES, SourceError, _image_files, _picture

__all__ = ["ImageSet", "load_images", "read_prompts"]

PROMPT_NAMES = ("prompt", "caption", "text")
THUMB = 96
BATCH = 64


@dataclass
class ImageSet:
    """Features ``[n, d]`` of the images that could be read, with their names, prompts and small pictures (JPEG bytes)."""

    path: Path
    names: list[str] = field(default_factory=list)
    prompts: list[str] | None = None
    thumbs: list[bytes] = field(default_factory=list)
    features: Tensor = field(default_factory=lambda: torch.empty(0, 0))
    skipped: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)


Item = tuple[str, Callable[[], bytes], str | None]


def read_prompts(path: Path) -> dict[str, str]:
    """File name to prompt, from ``metadata.jsonl`` or a CSV with a header: ``file_name`` and ``prompt`` (or
    ``caption``, ``text``).

    Raises:
        SourceError: naming the line that cannot be read.
    """
    if not path.is_file():
        raise SourceError(f"no prompts file at {path}")
    found = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            rows: list[Any] = list(csv.DictReader(file) if path.suffix.lower() == ".csv" else map(_json_row, file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise SourceError(f"{path} cannot be read as UTF-8 text: {error}") from error
    for number, row in enumerate(rows, 1):
        if row is None:
            raise SourceError(f"{path} line {number} is no JSON object")
        name = row.get("file_name")
        prompt = next((row[k] for k in PROMPT_NAMES if row.get(k) is not None), None)
        if not name or prompt is None:
            raise SourceError(
                f"{path} entry {number} needs file_name and one of {', '.join(PROMPT_NAMES)}, has {list(row)}"
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
    for file in _image_files(path):
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
            prompt = next((str(row[k]) for k in PROMPT_NAMES if row.get(k) is not None), None)
        yield f"{sample['__key__']}.{kinds[0]}", _constant(sample[kinds[0]]), prompt


def _tables(files: list[Path]) -> Iterator[Item]:
    try:
        import datasets
    except ImportError as error:
        raise SourceError("Parquet files need: pip install 'kspec-guidance[data]'") from error
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        table = datasets.Dataset.from_parquet([str(f) for f in files], cache_dir=scratch)
        pictures = [n for n, f in table.features.items() if isinstance(f, datasets.Image) or _is_picture(f)]
        if not pictures:
            raise SourceError(f"{files[0]} has no image column (bytes and path); its columns are {list(table.features)}")
        column = pictures[0]
        if isinstance(table.features[column], datasets.Image):
            table = table.cast_column(column, datasets.Image(decode=False))
        for number, row in enumerate(table):
            cell = row[column]
            prompt = next((str(row[k]) for k in PROMPT_NAMES if row.get(k) is not None), None)
            name = row.get("file_name") or (cell.get("path") if isinstance(cell, dict) else None) or f"row {number}"
            data = cell["bytes"] if isinstance(cell, dict) else cell
            yield str(name), _constant(data or b""), prompt


def _is_picture(feature: Any) -> bool:
    """A struct of bytes and path, as image columns are written, or plain bytes."""
    if isinstance(feature, dict):
        return "bytes" in feature
    return getattr(feature, "dtype", None) in ("binary", "large_binary")


def _items(path: Path, prompts: Path | None) -> Iterator[Item]:
    if not path.exists():
        raise SourceError(f"{path} does not exist; give a folder of images, a .tar shard or a .parquet file")
    files = [path] if path.is_file() else sorted(p for p in path.iterdir() if p.suffix.lower() in (".tar", ".parquet"))
    kind = files[0].suffix.lower() if files else ""
    if path.is_file() and kind not in (".tar", ".parquet"):
        raise SourceError(f"{path} is no folder, .tar shard or .parquet file")
    if prompts is None and path.is_dir():
        prompts = next((path / n for n in ("metadata.jsonl", "captions.csv") if (path / n).is_file()), None)
    said = {} if prompts is None else read_prompts(prompts)
    if len({f.suffix.lower() for f in files}) > 1:
        raise SourceError(f"{path} holds both .tar and .parquet files; name one of them, or sort them into folders")
    if kind == ".tar":
        source: Iterator[Item] = _shards(files)
    elif kind == ".parquet":
        source = _tables(files)
    else:
        source = _folder(path, said)
    for name, read, prompt in source:
        yield name, read, said.get(name, prompt)


def _thumb(image: Image.Image) -> bytes:
    flat = Image.alpha_composite(Image.new("RGBA", image.size, (255,) * 4), image).convert("RGB")
    flat.thumbnail((THUMB, THUMB))
    out = io.BytesIO()
    flat.save(out, "JPEG", quality=85)
    return out.getvalue()


def load_images(
    path: str | Path,
    embedder: ImageEmbedder,
    prompts: str | Path | None = None,
    cache: str | Path | None = None,
    tick: Callable[[int], None] = lambda n: None,
    only: set[str] | None = None,
) -> ImageSet:
    """Read, shrink and embed all images of a folder (with its subfolders), tar shards, or Parquet files.

    What cannot be read as an image is left out and named in ``skipped``. Prompts come from ``prompts``, from
    ``metadata.jsonl`` or ``captions.csv`` in the folder, from ``.txt`` and ``.json`` members of shards, or from a column.

    Args:
        cache: a folder for features, by content and embedder.
        tick: called with the number of images of each batch.
        only: names of the images to read; all by default.

    Raises:
        SourceError: if there are no readable images, or the prompts cannot be read.
    """
    path = Path(path)
    known = None if cache is None else FeatureCache(cache, embedder)
    found, said = ImageSet(path), []
    waiting: list[tuple[str, Image.Image]] = []
    fresh: dict[str, Tensor] = {}

    def embed() -> None:
        if waiting:
            fresh.update(zip((d for d, _ in waiting), embedder([i for _, i in waiting], BATCH), strict=True))
            waiting.clear()

    digests: list[str] = []
    seen: set[str] = set()
    for name, read, prompt in _items(path, None if prompts is None else Path(prompts)):
        if only is not None and name not in only:
            continue
        try:
            data = read()
            image = _picture(data)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):
            found.skipped.append(name)
            continue
        digest = hashlib.sha256(data).hexdigest()
        found.names.append(name)
        found.thumbs.append(_thumb(image))
        said.append(prompt)
        digests.append(digest)
        if digest not in seen and (known is None or digest not in known.rows):
            waiting.append((digest, image))
        seen.add(digest)
        if len(waiting) == BATCH:
            embed()
        tick(1)
    embed()
    if not digests:
        broken = f"; {len(found.skipped)} files could not be read" if found.skipped else ""
        raise SourceError(f"{path} holds no readable image ({', '.join(sorted(IMAGE_TYPES))}){broken}")
    if known is not None and fresh:
        known.rows |= fresh
        known.save()
    rows = [fresh[d] if d in fresh else known.rows[d] for d in digests]  # type: ignore[union-attr]
    found.features = torch.stack(rows)
    found.prompts = [p or "" for p in said] if any(p is not None for p in said) else None
    return found
