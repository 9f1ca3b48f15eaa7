"""What can go wrong, in words."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["CheckpointError", "SettingsChangedError", "SynthesisError", "explained"]


class SynthesisError(RuntimeError):
    """A run that cannot begin or go on, with what to do about it. Finished images are never lost."""


class CheckpointError(SynthesisError):
    """A record of finished images that was damaged after it was written."""


class SettingsChangedError(SynthesisError):
    """A folder whose images were made with other settings; ``differences`` lists them."""

    def __init__(self, out: Path, differences: list[str], images: int):
        self.differences = differences
        listed = "\n  ".join(differences)
        super().__init__(
            f"{out} holds {images} images that were made with other settings:\n  {listed}\n"
            "give the old settings to go on, another folder to begin anew, or force=True (--force), which keeps the "
            "finished images, counts them, and makes the rest with the new settings"
        )


@contextmanager
def explained(out: Path) -> Iterator[None]:
    """Errors of the file system, in words."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SynthesisError(
                f"no space left for {out} ({error.strerror}); finished images are safe: free some space and run the same "
                "command again, it goes on where it stopped"
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise SynthesisError(
                f"cannot write to {out} ({error.strerror}); choose another folder or change its rights"
            ) from error
        raise
