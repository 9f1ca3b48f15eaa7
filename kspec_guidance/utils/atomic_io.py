"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replace_all", "replacing"]


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


@contextmanager
def replacing(path: str | os.PathLike, durable: bool = False) -> Iterator[Path]:
    """A fresh file beside ``path`` to write to; it takes its place when the block ends, and is gone if the block fails.

    Args:
        durable: wait until the disk has it, so that it outlives a power failure too.

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
    """Write several files durably: each appears whole, and all are on the disk when this returns."""
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
        return  # Windows has no such call for folders
    handle = os.open(path, os.O_RDONLY if os.name != "nt" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
