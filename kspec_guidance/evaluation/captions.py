"""Captions of images: lists of them in the layouts of `datasets`' imagefolder, texts beside images, and their matching."""

import csv
import io
import json
import math
import posixpath
import unicodedata
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kspec_guidance.utils.images import SourceError

__all__ = [
    "Caption",
    "caption_of",
    "match_captions",
    "match_sidecars",
    "other_images",
    "parse_captions",
    "parse_sidecar",
    "read_captions",
]

CAPTION_COLUMNS = ("prompt", "caption", "text")
CAPTION_FILES = ("metadata.jsonl", "metadata.csv", "metadata.parquet", "captions.jsonl", "captions.csv")  # first come first
SIDECAR_TYPES = (".txt", ".caption", ".json")
QUOTE_ADVICE = "put captions that contain a comma, a quote or a line break in quotes, with quotes in them doubled"


class NoCaptionColumn(SourceError):
    """A list of files without a column of captions."""


@dataclass(frozen=True)
class Caption:
    """One entry of a captions file.

    Attributes:
        name: file name of the image, as listed.
        text: the caption; None if the entry has none.
        place: file and line, for messages.
    """

    name: str
    text: str | None
    place: str


def read_captions(path: Path) -> dict[str, str]:
    """Captions by file name, from a ``.jsonl``, ``.csv``, ``.tsv`` or ``.parquet`` file; the first of each file name.

    The columns are ``file_name`` (or ``*_file_name``) and ``prompt`` (or ``caption``, ``text``).

    Raises:
        SourceError: if the file does not exist, or a line cannot be read.
    """
    if not path.is_file():
        raise SourceError(f"no captions file at {path}")
    found: dict[str, str] = {}
    for caption in parse_captions(str(path), path.read_bytes()):
        if caption.text is not None:
            found.setdefault(caption.name, caption.text)
    return found


def parse_captions(name: str, data: bytes) -> list[Caption]:
    """Entries of a captions file, in order.

    Args:
        name: name of the file, whose suffix tells the format.
        data: its content.

    Raises:
        NoCaptionColumn: if no entry has a column of captions.
        SourceError: if a line cannot be read, or has no file name.
    """
    suffix = posixpath.splitext(name)[1].lower()
    if suffix not in READERS:
        raise SourceError(f"captions are read from {', '.join(READERS)} files, not from {name}")
    rows = list(READERS[suffix](name, data))
    found = []
    for place, row in rows:
        listed = _file_names(row)
        if not listed:
            raise SourceError(f"{place} needs file_name and one of {', '.join(CAPTION_COLUMNS)}, has {list(row)}")
        found += [Caption(n, caption_of(row, place), place) for n in listed]
    if rows and not any(column in row for _, row in rows for column in CAPTION_COLUMNS):
        place, row = rows[0]
        raise NoCaptionColumn(f"{place} needs file_name and one of {', '.join(CAPTION_COLUMNS)}, has {list(row)}")
    return found


def other_images(name: str, data: bytes) -> dict[str, str]:
    """Files that a list has in a further column of images, such as ``mask_file_name``: the column by file name.

    Args:
        name: name of the file, whose suffix tells the format.
        data: its content.
    """
    found: dict[str, str] = {}
    main: set[str] = set()
    for _, row in READERS[posixpath.splitext(name)[1].lower()](name, data):
        main.update(_file_names(row))
        found |= {v: k for k, v in row.items() if k.endswith("_file_name") and isinstance(v, str)}
    return {file: column for file, column in found.items() if file not in main}


def _file_names(row: dict[str, Any]) -> list[str]:
    """File names of an entry: ``file_name``, ``image_file_name``, other ``*_file_name``, or a list ``file_names``."""
    keys = [k for k in row if k.endswith("_file_name")]
    keys = ["file_name", "image_file_name", *keys, "file_names", "image_file_names"]
    value = next((row[k] for k in keys if not _missing(row.get(k))), None)
    names = value if isinstance(value, list) else [] if value is None else [value]
    return [str(name) for name in names if str(name).strip()]


def caption_of(row: dict[str, Any], place: str) -> str | None:
    """The caption in a row, the first if it has a list of them; None if it is missing or blank.

    Raises:
        SourceError: for a caption that is not text.
    """
    value = next((row[k] for k in CAPTION_COLUMNS if not _missing(row.get(k))), None)
    if isinstance(value, list):
        value = next((v for v in value if not _missing(v)), None)
    if isinstance(value, dict | list):
        raise SourceError(f"{place} has a caption of type {type(value).__name__}; expected text")
    return None if value is None else _clean(str(value))


def _missing(value: Any) -> bool:
    """Whether a value is None or NaN, which tables have for missing texts."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _clean(text: str) -> str | None:
    """A text that can be written as UTF-8; None if it is blank."""
    return text.encode("utf-8", "replace").decode() if text.strip() else None


def _text(name: str, data: bytes) -> str:
    """Text of a file in UTF-8, or in UTF-16 with a byte order mark.

    Raises:
        SourceError: for other encodings, with the line.
    """
    try:
        return data.decode("utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise SourceError(f"{name} cannot be read as UTF-8 text (line {line}: {error.reason}); save it as UTF-8") from error


def _csv_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    text, delimiter = io.StringIO(_text(name, data), newline=""), "\t" if name.lower().endswith(".tsv") else ","
    reader = csv.reader(text, strict=True, skipinitialspace=True, delimiter=delimiter)
    header: list[str] = []
    try:
        for fields in reader:
            place = f"{name} line {reader.line_num}"
            if not any(field.strip() for field in fields):
                continue
            if not header:
                header = [field.strip() for field in fields]
                twice = sorted({h for h in header if h and header.count(h) > 1})
                if twice:
                    raise SourceError(f"{place} has several columns named {', '.join(twice)}")
                continue
            if len(fields) > len(header):
                raise SourceError(f"{place} has {len(fields)} fields, but the header has {len(header)}; {QUOTE_ADVICE}")
            yield place, dict.fromkeys(header) | dict(zip(header, fields, strict=False))
    except csv.Error as error:
        raise SourceError(f"{name} line {reader.line_num} cannot be read as CSV: {error}; {QUOTE_ADVICE}") from error


def _jsonl_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, line in enumerate(_text(name, data).split("\n"), 1):
        if line.strip():
            row = _json_row(line)
            if row is None:
                raise SourceError(f"{name} line {number} is not a JSON object")
            yield f"{name} line {number}", row


def _json_row(text: str) -> dict[str, Any] | None:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _parquet_rows(name: str, data: bytes) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise SourceError("Parquet files need: pip install 'kspec-guidance[data]'") from error
    try:
        with parquet.ParquetFile(io.BytesIO(data)) as file:
            names = file.schema_arrow.names
            columns = [n for n in names if n in CAPTION_COLUMNS or n.endswith(("file_name", "file_names"))]
            rows = file.read(columns or names[:1]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise SourceError(f"{name} is not a Parquet file: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"{name} row {number}", row


READERS = {".jsonl": _jsonl_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows}


def parse_sidecar(name: str, data: bytes) -> str | None:
    """The caption in a text or JSON file that belongs to an image; None if it has none.

    Raises:
        SourceError: for text that is not UTF-8, or not JSON.
    """
    text = _text(name, data)
    if name.lower().endswith(".json"):
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise SourceError(f"not JSON: {error}") from error
        return caption_of(row, name) if isinstance(row, dict) else None
    return _clean(text.strip())


Key = Callable[[str], str]


def _normal(name: str) -> str:
    """A path with slashes, without ``.``, and with composed Unicode characters."""
    return posixpath.normpath(unicodedata.normalize("NFC", name).replace("\\", "/"))


def _folded(name: str) -> str:
    return _normal(name).casefold()


def _same(name: str) -> str:
    return name


KEYS: tuple[Key, ...] = (_same, _normal, _folded)  # from the exact name to names that differ in case


def _groups(names: Iterable[str], key: Key) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(key(name), []).append(name)
    return found


def _several(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (" ..." if len(names) > 3 else "")


def match_captions(
    captions: Sequence[Caption], images: Sequence[str], repeated: Container[str] = ()
) -> tuple[dict[str, Caption], dict[str, str], list[str]]:
    """Match the entries of captions files with images.

    Exact names come first, then those that differ in ``./``, backslashes or the form of Unicode, then in case, then those
    of which one is the end of the other (``0.png`` and ``sub/0.png``, or an absolute path). A caption that fits several
    images, or an image that several captions fit, is not matched.

    Args:
        captions: entries; of those with one name, the first is used.
        images: distinct names.
        repeated: those of them that further images had, which were renamed: no caption is matched by such a name alone.

    Returns:
        Captions by image; the reasons why other captions have no image, by their name; and images matched by the end of
        the path only.
    """
    found: dict[str, Caption] = {}
    unmatched: dict[str, str] = {}
    waiting: dict[str, Caption] = {}
    for caption in captions:
        if waiting.setdefault(caption.name, caption) is not caption:
            unmatched[f"{caption.name} ({caption.place})"] = "listed more than once; the first caption is used"
    reasons, free = dict.fromkeys(waiting, "no such image"), dict.fromkeys(images)

    def take(listed: str, image: str) -> None:
        found[image] = waiting.pop(listed)
        del free[image], reasons[listed]

    for key in KEYS:
        named = _groups(free, key) if waiting else {}
        for name, entries in _groups(waiting, key).items():
            fitting = named.get(name, [])
            if len(fitting) == 1 and len(entries) == 1 and fitting[0] not in repeated:
                take(entries[0], fitting[0])
            elif fitting:
                reasons |= dict.fromkeys(entries, f"ambiguous: {_several(entries)} for {_several(fitting)}")
    loose: list[str] = []
    for key in KEYS[1:] if waiting else ():
        wanted: dict[str, list[str]] = {}
        by_name, by_end = _groups(free, key), _ends(free, key)
        for listed in waiting:
            fitting = _fitting(key(listed), by_name, by_end)
            if len(fitting) == 1:
                wanted.setdefault(fitting[0], []).append(listed)
            elif fitting:
                reasons[listed] = f"ambiguous: {_several(fitting)}"
        for image, names in wanted.items():
            if len(names) == 1:
                loose.append(image)
                take(names[0], image)
            else:
                reasons |= dict.fromkeys(names, f"ambiguous: {_several(names)} for {image}")
    return found, unmatched | reasons, loose


def _ends(names: Iterable[str], key: Key) -> dict[str, list[str]]:
    """Names by each end of their path, of whole parts."""
    found: dict[str, list[str]] = {}
    for name in names:
        parts = key(name).split("/")
        for k in range(len(parts)):
            found.setdefault("/".join(parts[k:]), []).append(name)
    return found


def _fitting(listed: str, by_name: dict[str, list[str]], by_end: dict[str, list[str]]) -> list[str]:
    """Images whose path ends like the listed one; else those of the longest path that is the end of the listed one."""
    if listed in by_end:
        return by_end[listed]
    parts = listed.split("/")
    return next((by_name[e] for k in range(1, len(parts)) if (e := "/".join(parts[k:])) in by_name), [])


def match_sidecars(images: Sequence[str], texts: Sequence[str], first_dot: bool) -> dict[str, list[str]]:
    """Texts that belong to images: ``0.png.txt`` or ``0.txt`` to ``0.png``, in order of precedence.

    Args:
        images: names.
        texts: names of text and JSON files.
        first_dot: whether the name up to its first dot counts as well, as in WebDataset: ``0.txt`` to ``0.left.png``.

    Returns:
        Names of texts by image.
    """
    found: dict[str, list[str]] = {}
    order = {suffix: k for k, suffix in enumerate(SIDECAR_TYPES)}
    free_images, free_texts = list(images), list(texts)
    for key in KEYS:
        if not free_texts:
            break
        index = _groups(free_texts, lambda text, key=key: key(posixpath.splitext(text)[0]))  # type: ignore[misc]
        stems: dict[str, set[str]] = {}
        for image in free_images:
            for target in _targets(image, first_dot):
                stems.setdefault(key(target), set()).add(target)
        for image in free_images:
            own: list[str] = []
            for target in _targets(image, first_dot):
                fitting = index.get(key(target), [])
                suffixes = {posixpath.splitext(text)[1].lower() for text in fitting}
                if len(suffixes) == len(fitting) and len(stems[key(target)]) == 1:  # not ambiguous
                    own += sorted(set(fitting) - set(own), key=lambda t: order[posixpath.splitext(t)[1].lower()])
            if own:
                found[image] = own
        taken = {text for own in found.values() for text in own}
        free_images = [image for image in free_images if image not in found]
        free_texts = [text for text in free_texts if text not in taken]
    return found


def _targets(image: str, first_dot: bool) -> list[str]:
    """Names that a text of an image has without its suffix."""
    folder, name = posixpath.split(image)
    targets = [image, posixpath.splitext(image)[0]]
    return [*targets, posixpath.join(folder, name.split(".")[0])] if first_dot else targets
