"""Writing files so that a crash leaves the old one or the new one, never half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["replacing"]


@contextmanager
def replacing(path: str | os.PathLike) -> Iterator[Path]:
    """A fresh file beside ``path`` to write to; it takes its place when the block ends, and is gone if the block fails.

    >>> import tempfile
    >>> target = Path(tempfile.mkdtemp(), "settings.json")
    >>> with replacing(target) as fresh:
    ...     _ = fresh.write_text("{}")
    >>> target.read_text(), len(list(target.parent.iterdir()))
    ('{}', 1)
    """
    path = Path(path)
    fresh = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield fresh
        os.replace(fresh, path)
    finally:
        fresh.unlink(missing_ok=True)
