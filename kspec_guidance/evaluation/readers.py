"""Readers of folders, WebDataset tar shards and Parquet files: each file is read, or left out with a reason."""

import lzma
import posixpath
import tarfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from kspec_guidance.evaluation.captions import (
    CAPTION_COLUMNS,
    CAPTION_FILES,
    SIDECAR_TYPES,
    Caption,
    NoCaptionColumn,
    caption_of,
    match_captions,
    match_sidecars,
    other_images,
    parse_captions,
    parse_sidecar,
)
from kspec_guidance.utils.folders import HIDDEN, is_hidden, list_files, printable
from kspec_guidance.utils.images import SourceError, image_types, not_an_image
from kspec_guidance.utils.standard_input import STANDARD_INPUT, read_standard_input, suffix_of

__all__ = ["Item", "SetReader"]

SHARD_TYPES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
IMAGE_COLUMNS = ("image", "img")  # that are preferred among several
PATH_COLUMNS = ("image", "img", "image_path", "file_name", "path")  # of strings, in tables without bytes
MAX_TEXT_BYTES = 2**20  # of a text beside an image
READ_ERRORS = (OSError, EOFError, tarfile.TarError, zlib.error, lzma.LZMAError, RecursionError, KeyError, ValueError)

Item = tuple[str, Callable[[], bytes], str | None]
"""Name of an image, a function that reads its content (raising SourceError), and the caption that comes with it."""


Read = Callable[[int], bytes]
"""Reads at most so many bytes of a file; all of them for -1."""


def _is_table(name: str) -> bool:
    return name.lower().endswith(".parquet") and posixpath.basename(name).lower() not in CAPTION_FILES


def _is_shard(name: str) -> bool:
    return name.lower().endswith(SHARD_TYPES)


@dataclass
class SetReader:
    """Reads one set: iterate over :meth:`items`, after which the attributes are complete.

    Attributes:
        path: folder, shard or table.
        captions_file: list of captions, ``-`` for standard input; by default those in the folder.
        skipped: files that were not read, with the reason.
        unmatched: texts beside no image, with the reason.
        captions: entries of the captions files.
        caption_files: captions files and texts that were read.
        notes: remarks, e.g. which column was read.
        repeated: names of images that other images, or files, have in another shard or further on in the same one.
    """

    path: Path
    captions_file: Path | None = None
    skipped: dict[str, str] = field(default_factory=dict)
    unmatched: dict[str, str] = field(default_factory=dict)
    captions: list[Caption] = field(default_factory=list)
    caption_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    repeated: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self._names: set[str] = set()
        self._types = image_types()
        self._others: dict[str, str] = {}  # files that the given captions file has in a further column of images

    def items(self) -> Iterator[Item]:
        """The images, one by one; in each item, a name that no other has.

        Raises:
            SourceError: for a path that is no set of images, or captions that cannot be read.
        """
        if not self.path.exists():
            raise SourceError(f"{self.path} does not exist; give a folder of images, a .tar shard or a .parquet file")
        if self.captions_file is not None:
            self._read_given_captions(self.captions_file)
        if self.path.is_dir():
            yield from self._folder()
        elif _is_shard(self.path.name):
            yield from self._shard(self.path.name, self.path)
        elif self.path.suffix.lower() == ".parquet":
            yield from self._table(self.path.name, self.path)
        else:
            raise SourceError(f"{self.path} is not a folder, a .tar shard or a .parquet file")

    def _unique(self, name: str, container: str) -> str:
        """The name, with that of its container or a number if another image has it."""
        found, number = name, 1
        if name in self._names:
            self.repeated.add(name)
        while found in self._names:
            found = f"{container}/{name}" if number == 1 else f"{container}/{name} ({number})"
            number += 1
        self._names.add(found)
        return found

    def _read_given_captions(self, path: Path) -> None:
        if str(path) == STANDARD_INPUT:
            self._read_piped_captions()
            return
        if not path.is_file():
            raise SourceError(f"no captions file at {path}")
        data, base = path.read_bytes(), _inside(path.parent, self.path)
        captions = parse_captions(str(path), data)
        self._others = {posixpath.join(base, n): column for n, column in other_images(str(path), data).items()}
        self.captions += [_based(c, base) for c in captions]
        self.caption_files.append(str(path))

    def _read_piped_captions(self) -> None:
        try:
            data = read_standard_input()
        except ValueError as error:
            raise SourceError(str(error)) from error
        self.captions_file = Path(f"standard input{suffix_of(data)}")  # for messages
        self.captions += parse_captions(str(self.captions_file), data)
        self.caption_files.append("standard input")

    def _folder(self) -> Iterator[Item]:
        files, left_out = list_files(self.path)
        self.skipped |= left_out
        paths = {printable(p.relative_to(self.path).as_posix()): p for p in files}
        if self.captions_file is not None:
            given = self.captions_file
            paths = {n: p for n, p in paths.items() if not (given.is_file() and p.samefile(given))}
        containers = self._containers(list(paths))
        if not containers:
            yield from self._tree({n: partial(_read_file, p) for n, p in paths.items()})
            return
        rest: dict[str, Read] = {n: partial(_read_file, p) for n, p in paths.items() if n not in containers}
        self._list_captions(rest)
        for name in rest:
            self.skipped[name] = "beside shards or tables, which are read instead"
        for name in containers:
            yield from (self._table if _is_table(name) else self._shard)(name, paths[name])

    def _containers(self, names: Sequence[str]) -> list[str]:
        """The shards or tables of a folder; none if it holds images, and no shard or table beside its subfolders."""
        top = [n for n in names if "/" not in n]
        if not any(_is_shard(n) or _is_table(n) for n in top):
            top = [] if any(self._is_image(n) for n in names) else list(names)
        shards, tables = any(map(_is_shard, top)), any(map(_is_table, top))
        if shards and tables:
            raise SourceError(
                f"{self.path} contains both .tar and .parquet files; pass one of them, or move them to two folders"
            )
        return [n for n in names if (_is_shard(n) if shards else tables and _is_table(n))]

    def _is_image(self, name: str) -> bool:
        return posixpath.splitext(name)[1].lower() in self._types

    def _list_captions(self, files: dict[str, Read], shard: str = "") -> dict[str, str]:
        """Read the captions file of each folder, and remove it and its rivals from the files.

        Returns:
            Files that they have in a further column of images, with the column.
        """
        others: dict[str, str] = {}
        by_folder: dict[str, list[str]] = {}
        for name in files:
            if posixpath.basename(name).lower() in CAPTION_FILES:
                by_folder.setdefault(posixpath.dirname(name), []).append(name)
        for folder, names in sorted(by_folder.items(), key=lambda entry: -entry[0].count("/") - bool(entry[0])):
            names.sort(key=lambda n: CAPTION_FILES.index(posixpath.basename(n).lower()))
            for name in names[1:] if self.captions_file is None else names:
                self.skipped[self._unique(name, shard)] = f"captions are read from {self.captions_file or names[0]} instead"
            before = len(self.captions)
            if self.captions_file is None:
                data = files[names[0]](-1)
                others |= {posixpath.join(folder, n): column for n, column in other_images(names[0], data).items()}
                try:
                    self.captions += [_based(c, folder) for c in parse_captions(names[0], data)]
                except NoCaptionColumn:
                    if posixpath.basename(names[0]).lower().startswith("captions"):
                        raise
                self.caption_files.append(names[0])
                if len(self.captions) == before:
                    self.notes.append(f"{names[0]} has no captions")
            for name in names:
                del files[name]
        return others

    def _tree(self, files: dict[str, Read], shard: str = "") -> Iterator[Item]:
        """Images among the files of a folder or shard, with the captions beside them."""
        start = len(self.captions)
        others = self._others | self._list_captions(files, shard)
        images = [n for n in files if self._is_image(n)]
        further = match_captions([Caption(n, None, "") for n in others], images)[0]
        images = [n for n in images if n not in further]
        for name, entry in further.items():
            self.skipped[self._unique(name, shard)] = f"listed in another column of images: {others[entry.name]}"
        listed: dict[str, Caption] = {}
        if shard:  # captions in a shard are those of its own images
            listed, unmatched, _ = match_captions(self.captions[start:], images)
            self.unmatched |= {self._unique(name, shard): reason for name, reason in unmatched.items()}
            del self.captions[start:]
        texts = [n for n in files if n.lower().endswith(SIDECAR_TYPES)]
        texts = [n for n in texts if not self._is_image(n)]
        sidecars = match_sidecars(images, texts, first_dot=bool(shard))
        used = {t: None for own in sidecars.values() for t in own}
        self.caption_files += used
        for name in files:
            if self._is_image(name) or name in used:
                continue
            if used and name in texts and not name.lower().endswith(".json"):
                self.unmatched[self._unique(name, shard)] = "no such image"
            else:
                self.skipped[self._unique(name, shard)] = not_an_image(name)
        if shard:
            images = self._of_each_key(images, shard)
        for name in images:
            caption = listed[name].text if name in listed else None
            for text in sidecars.get(name, []):
                caption = caption or self._sidecar(text, files[text], shard)
            yield self._unique(name, shard), partial(files[name], -1), caption

    def _sidecar(self, name: str, read: Read, shard: str) -> str | None:
        try:
            data = read(MAX_TEXT_BYTES + 1)
            if len(data) > MAX_TEXT_BYTES:
                raise SourceError(f"larger than {MAX_TEXT_BYTES // 2**20} MiB")
            return parse_sidecar(name, data)
        except SourceError as error:
            self.unmatched[self._unique(name, shard)] = f"unreadable: {error}"
            self.caption_files = [n for n in self.caption_files if n != name]
            return None

    def _of_each_key(self, images: Sequence[str], shard: str) -> list[str]:
        """Images of a shard; where a key has ``0.png``, others such as ``0.mask.png`` are left out."""
        main: dict[str, str] = {}
        for name in images:
            key, _, rest = _key(name)
            if "." not in rest:
                main.setdefault(key, name)
        found = []
        for name in images:
            chosen = main.get(_key(name)[0], name)
            if chosen == name:
                found.append(name)
            else:
                self.skipped[self._unique(name, shard)] = f"another image of the sample is read: {chosen}"
        return found

    def _shard(self, name: str, path: Path) -> Iterator[Item]:
        try:
            tar = tarfile.open(path, "r:*")  # noqa: SIM115 (closed below)
        except tarfile.ReadError:
            self.skipped[name] = "unreadable: not a tar archive, or damaged at its start"
            return
        except READ_ERRORS as error:
            self.skipped[name] = f"unreadable: {_line(error)}"
            return
        with tar:
            files: dict[str, Read] = {}
            for member in self._members(name, tar):
                inside = printable(posixpath.normpath(member.name))
                if any(is_hidden(part) for part in inside.split("/") if part != ".."):
                    self.skipped[self._unique(inside, name)] = HIDDEN
                elif not (member.isfile() or member.islnk() or member.issym()):
                    self.skipped[self._unique(inside, name)] = "not a regular file"
                else:
                    if inside in files:  # the name comes again: the samples before it are complete
                        yield from self._tree(files, name)
                        files = {}
                    files[inside] = _member(tar, member, inside.lower().endswith(SIDECAR_TYPES))
            yield from self._tree(files, name)

    def _members(self, name: str, tar: tarfile.TarFile) -> Iterator[tarfile.TarInfo]:
        """Members of a shard but for folders; notes where it is damaged."""
        count = 0
        stream: Any = tar.fileobj
        try:
            for member in tar:
                if not member.isdir():
                    count += 1
                    yield member
            stream.seek(tar.offset)
            block = stream.read(tarfile.RECORDSIZE)
            if not block:
                self.notes.append(f"{name} has no end mark after {count} files; it may be cut off")
            while block and not block.strip(b"\0"):
                block = stream.read(2**20)
            if block:
                self.skipped[name] = f"unreadable: after {count} files, cut off, damaged, or joined with another archive"
        except READ_ERRORS as error:
            self.skipped[name] = f"unreadable: after {count} files, {_line(error)}"

    def _table(self, name: str, path: Path) -> Iterator[Item]:
        try:
            import pyarrow
            import pyarrow.parquet as parquet
        except ImportError as error:
            raise SourceError("Parquet files need: pip install 'kspec-guidance[data]'") from error
        number = total = 0
        try:
            # one group of rows is read at a time; by default pyarrow prefetches all of them
            with parquet.ParquetFile(path, buffer_size=2**20, pre_buffer=False) as file:
                total = file.metadata.num_rows
                column = self._column(name, file.schema_arrow)
                if column is None:
                    return
                wanted = (column, "file_name", *CAPTION_COLUMNS)
                columns = [c for c in file.schema_arrow.names if c in wanted]
                for batch in file.iter_batches(32, columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield self._row(name, path, number, row, column)
        except (pyarrow.ArrowException, OSError) as error:
            self.skipped[name] = f"unreadable: after {number} of {total} rows, {_line(error)}"
        if not number and name not in self.skipped:
            self.skipped[name] = "a table without rows"

    def _column(self, name: str, schema: Any) -> str | None:
        """The column of images: of bytes, or paths; one named ``image`` or ``img``, else the first."""
        from pyarrow import types

        def holds_bytes(kind: Any) -> bool:
            return types.is_binary(kind) or types.is_large_binary(kind) or types.is_fixed_size_binary(kind)

        columns = [f.name for f in schema if types.is_struct(f.type) and {"bytes", "path"} & {c.name for c in f.type}]
        columns += [f.name for f in schema if holds_bytes(f.type)]
        if not columns:
            strings = [f.name for f in schema if types.is_string(f.type) or types.is_large_string(f.type)]
            columns = [c for c in PATH_COLUMNS if c in strings][:1]
        if not columns:
            self.skipped[name] = f"a table without a column of images; its columns are {', '.join(schema.names)}"
            return None
        column = next((c for p in IMAGE_COLUMNS for c in columns if c.lower() == p), columns[0])
        if schema.names.count(column) > 1:
            self.skipped[name] = f"a table with several columns named {column}"
            return None
        if len(columns) > 1:
            others = ", ".join(c for c in columns if c != column)
            note = f"images are read from column {column!r}, not from {others}"
            self.notes += [] if note in self.notes else [note]
        return column

    def _row(self, table: str, path: Path, number: int, row: dict[str, Any], column: str) -> Item:
        cell = row[column]
        listed = cell.get("path") if isinstance(cell, dict) else cell if isinstance(cell, str) else None
        name = printable(str(row.get("file_name") or listed or f"row {number - 1}"))
        data = cell.get("bytes") if isinstance(cell, dict) else cell if isinstance(cell, bytes) else None
        if name in self._names:
            name = f"row {number - 1}"
        name = self._unique(name, table)
        caption = caption_of(row, f"{table} row {number}")
        return name, (lambda: data) if data is not None else (lambda: self._file_of_row(listed, path)), caption

    def _file_of_row(self, listed: str | None, table: Path) -> bytes:
        """The file of a row that holds a path only, relative to the table or the set."""
        if not listed:
            raise SourceError("the row has neither bytes nor a path")
        if "://" in listed:
            raise SourceError(f"the row has no bytes, and URLs are not followed: {listed}")
        for folder in (table.parent, self.path):
            path = folder / listed
            if path.is_file():
                self.skipped.pop(printable(_inside(path, self.path)), None)  # it is read, by way of the table
                return path.read_bytes()
        raise SourceError(f"the row has no bytes, and there is no file {listed}")


def _line(error: Exception) -> str:
    """The message of an error of a library, in one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _read_file(path: Path, size: int) -> bytes:
    with path.open("rb") as file:
        return file.read(size)


def _member(tar: tarfile.TarFile, member: tarfile.TarInfo, now: bool) -> Read:
    """Reads a file of an archive; a small text is read at once, since an archive is read fastest in order."""

    def read(size: int) -> bytes:
        try:
            stream = tar.extractfile(member)
            data = b"" if stream is None else stream.read(size)
        except READ_ERRORS as error:
            raise SourceError(f"its archive is damaged: {_line(error)}") from error
        if size < 0 and member.isfile() and len(data) != member.size:
            raise SourceError("its archive is cut off")
        return data

    if now and member.isfile() and member.size <= MAX_TEXT_BYTES:
        with suppress(SourceError):
            data = read(-1)
            return lambda size: data
    return read


def _key(name: str) -> tuple[str, str, str]:
    """Key of a file in WebDataset, up to the first dot of its name; the dot, and what follows."""
    folder, base = posixpath.split(name)
    key, dot, rest = base.partition(".")
    return posixpath.join(folder, key), dot, rest


def _inside(path: Path, root: Path) -> str:
    """A path relative to the root that contains it, else the empty string."""
    path, root = path.resolve(), root.resolve()
    return path.relative_to(root).as_posix() if path.is_relative_to(root) else ""


def _based(caption: Caption, folder: str) -> Caption:
    """A caption whose relative name is relative to the set, not to the folder of its file."""
    return Caption(posixpath.join(folder, caption.name) if folder else caption.name, caption.text, caption.place)
