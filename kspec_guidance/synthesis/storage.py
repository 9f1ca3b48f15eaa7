"""Storage: files that several machines share, on a file system or an object store, through fsspec.

What leases need of it is one operation: create a file as a whole, if there is none of this name. On local and network file
systems that is a hard link to a finished temporary file; on S3 and Google Cloud Storage, a conditional put. Nothing else
stands in for it: without it two machines could both believe to own the same thing.
"""

import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kspec_guidance.synthesis.errors import FolderError, RunFailedError, SynthesisError, disk_errors

__all__ = ["Storage"]

CONDITIONAL = ("file", "local", "s3", "s3a", "gs", "gcs")  # whose create of fsspec is one atomic operation
ONE_GET = {"max_concurrency": 1}  # of s3fs, which asks for the size of a file before each read otherwise
LATE = (TimeoutError, ConnectionError)  # after which an operation may have taken place
TRIES = 4
WAIT = 0.5  # seconds before the second try, doubled from then on
PART = ".part"  # suffix of temporary files, each of which has one writer


class Storage:
    """A folder of immutable files, and of a few that one owner replaces.

    Args:
        place: a folder, or a URL such as ``s3://bucket/run``.
        sleep: waits before an operation is tried again.

    Raises:
        SynthesisError: for storage that cannot create a file on condition that there is none, or whose package is missing.
    """

    def __init__(self, place: str | os.PathLike, sleep: Callable[[float], None] = time.sleep):
        import fsspec

        self.place, self.sleep = str(place), sleep
        kind = fsspec.utils.get_protocol(self.place)
        if kind not in CONDITIONAL:
            raise SynthesisError(
                f"{self.place}: leases need storage that creates a file only if there is none of its name, in one "
                "operation: a file system that all machines share, s3:// or gs://. Give one of them; the finished set "
                "may then be copied to any other"
            )
        try:
            self.fs, self.root = fsspec.core.url_to_fs(self.place, **(ONE_GET if kind in ("s3", "s3a") else {}))
        except Exception as error:  # of the client of an object store, or its package is missing
            raise SynthesisError(f"cannot use the storage {self.place}: {' '.join(str(error).split())}") from error
        self.folder = Path(self.root) if kind in ("file", "local") else None

    def check(self) -> None:
        """Try whether a file is created only once.

        Raises:
            FolderError: if it is created twice, as by servers that ignore the condition.
            RunFailedError: if it cannot be written to.
        """
        name = f"probe-{uuid.uuid4().hex}"
        try:
            if not self.create(name, b"first") or self.create(name, b"second"):
                raise FolderError(
                    f"{self.place} created a file of a name that was there already. It ignores the condition (of S3: "
                    "If-None-Match) without which two workers may own one group; use a server that keeps it"
                )
        finally:
            with suppress(OSError, RunFailedError):
                self.delete(name)

    def _path(self, name: str) -> str:
        return f"{self.root.rstrip('/')}/{name}"

    def _repeated(self, operation: Callable[[], Any]) -> Any:
        """The result of an operation that may be repeated, tried again after late answers."""
        for attempt in range(TRIES):
            try:
                with disk_errors(self.place):
                    return operation()
            except SynthesisError as error:
                if attempt == TRIES - 1 or not isinstance(error.__cause__, LATE):
                    raise
            except Exception as error:  # of the client of an object store
                if attempt == TRIES - 1:
                    what = f"{type(error).__name__}: {' '.join(str(error).split())}"
                    raise RunFailedError(f"{self.place} does not answer ({what}); finished images are safe") from error
            self.sleep(WAIT * 2**attempt)

    # -- writing -------------------------------------------------------------------------------------------------------

    def create(self, name: str, data: bytes) -> bool:
        """Create a file as a whole, unless there is one of this name.

        After an answer that is late, or lost, the file is read: if it has these bytes, it was created here. Files that
        two writers could create must therefore differ in their bytes, by the name of the writer, or not matter.

        Returns:
            Whether it was created here.

        Raises:
            RunFailedError: if the storage is full, read-only or does not answer.
        """
        late = False

        def once() -> bool:
            nonlocal late
            try:
                self._create_once(name, data)
                return True
            except FileExistsError:
                return late and self.read(name) == data
            except Exception:
                late = True  # it may have been created
                raise

        return bool(self._repeated(once))

    def _create_once(self, name: str, data: bytes) -> None:
        if self.folder is None:
            self.fs.pipe_file(self._path(name), data, mode="create")
            return
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
        try:
            with part.open("xb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            try:
                os.link(part, path)
            except FileExistsError:
                if os.stat(part).st_nlink == 1:  # on network file systems a link may be made, and reported as an error
                    raise
            except OSError as error:
                if path.parent.is_dir() and not isinstance(error, PermissionError):
                    raise
                raise OSError(
                    error.errno, f"{error.strerror}; leases need a file system with hard links, or one that can be written"
                ) from error
        finally:
            part.unlink(missing_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Replace a file that has one owner."""

        def once() -> None:
            if self.folder is None:
                self.fs.pipe_file(self._path(name), data)
                return
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f".{path.name}.{uuid.uuid4().hex}{PART}")
            try:
                part.write_bytes(data)
                os.replace(part, path)
            finally:
                part.unlink(missing_ok=True)

        self._repeated(once)

    def delete(self, name: str) -> None:
        """Delete a file, or a folder with all files in it, if there is one."""

        def once() -> None:
            with suppress(FileNotFoundError):
                self.fs.rm(self._path(name), recursive=True)

        self._repeated(once)

    # -- reading -------------------------------------------------------------------------------------------------------

    def read(self, name: str) -> bytes | None:
        """The bytes of a file; None if there is none."""

        def once() -> bytes | None:
            try:
                return self.fs.cat_file(self._path(name))
            except FileNotFoundError:
                return None

        return self._repeated(once)

    def exists(self, name: str) -> bool:
        """Whether there is a file; by reading it: clients of object stores also list the folder of a missing one."""
        return self.read(name) is not None

    def names(self, folder: str = "") -> list[str]:
        """Names of the files in a folder, by default that of the storage, sorted; none if there is no such folder."""

        def once() -> list[str]:
            try:
                if self.folder is not None:
                    found = os.listdir(self.folder / folder)
                else:
                    self.fs.invalidate_cache()
                    found = [path.rsplit("/", 1)[-1] for path in self.fs.ls(self._path(folder), detail=False)]
            except FileNotFoundError:
                return []
            return sorted(name for name in found if name and not name.startswith("."))

        return self._repeated(once)

    @contextmanager
    def local(self, name: str) -> Iterator[Path]:
        """A file as one of this machine: itself, or a copy.

        Raises:
            FileNotFoundError: if there is none.
        """
        if self.folder is not None:
            yield self.folder / name
            return
        data = self.read(name)
        if data is None:
            raise FileNotFoundError(f"no {name} in {self.place}")
        with TemporaryDirectory() as folder:
            path = Path(folder, name.rsplit("/", 1)[-1])
            path.write_bytes(data)
            yield path
