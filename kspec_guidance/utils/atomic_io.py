"""Atomic writing of files: a crash leaves either the old or the new file."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_all", "replacing"]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """A temporary file next to ``path``, which replaces ``path`` when the block ends, and is deleted on an error.

    Args:
        path: path of the final file.
        durable: flush to disk before replacing, so that the file survives a power failure.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp(), "settings.json")
    >>> with replacing(target) as fresh:
    ...     _ = fresh.write_text("{}")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('{}', 1)
    """
    path = Path(path)
    fresh = _beside(path)
    try:
        yield fresh
        if durable:
            _sync(fresh)
        os.replace(fresh, path)
        if durable:
            _sync(path.parent)
    finally:
        fresh.unlink(missing_ok=True)


def replace_all(files: Mapping[Path, bytes]) -> None:
    """Write several files, each atomically, and flush all of them to disk."""
    fresh = {path: _beside(path) for path in files}
    try:
        for path, data in files.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            fresh[path].write_bytes(data)
        for path in files:
            _sync(fresh[path])
        for path in files:
            os.replace(fresh[path], path)
        for folder in {path.parent for path in files}:
            _sync(folder)
    finally:
        for path in fresh.values():
            path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows cannot flush folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
