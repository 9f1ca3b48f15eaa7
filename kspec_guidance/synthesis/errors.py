"""Errors of a run; every message says what to do."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CheckpointError", "FolderError", "RunFailedError", "SettingsChangedError", "SynthesisError", "disk_errors"]


class SynthesisError(RuntimeError):
    """A run cannot start or continue. Finished images are never lost."""


class RunFailedError(SynthesisError):
    """The pipeline, the user's filter, the disk or another process failed; the same command continues the run."""


class FolderError(SynthesisError):
    """The folder cannot be continued as it is: it is in use, or holds other data, settings or damaged files."""


class CheckpointError(FolderError):
    """Finished images, their records or their settings were damaged or lost after they were written."""


class SettingsChangedError(FolderError):
    """The images of a folder were made with other settings.

    Attributes:
        differences: one line for each setting that differs.
    """

    def __init__(self, out: Path, differences: list[str], images: int | None):
        self.differences = differences
        lines = "\n  ".join(differences)
        if images is None:
            super().__init__(
                f"the run in {out} was begun with other settings:\n  {lines}\n"
                "give those of the other workers, the packages included, or another place for another run"
            )
            return
        super().__init__(
            f"{out} holds {images} images that were made with other settings:\n  {lines}\n"
            "give the old settings to continue, another folder to start anew, or force=True (--force), which keeps the "
            "finished images, counts them, and makes the rest with the new settings"
        )


@contextmanager
def disk_errors(out: Path | str) -> Iterator[None]:
    """Turn errors of the file system into a :class:`RunFailedError` that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise RunFailedError(
                f"no space left for {out} ({error.strerror}); finished images are safe: free some space and run the same "
                "command again, it continues where it stopped"
            ) from error
        raise RunFailedError(
            f"cannot write to {out} ({error.strerror or error}); choose another folder or change its permissions. Finished "
            "images are safe"
        ) from error
