"""Warnings that point to the user's code, and numbers as people read them."""

import sys
import warnings
from datetime import timedelta

__all__ = ["readable_size", "readable_time", "warn_user"]

LIBRARIES = ("kspec_guidance", "diffusers", "torch", "accelerate", "contextlib")


def warn_user(message: str) -> None:
    """Issue a ``UserWarning`` at the innermost caller outside of this package and the libraries that call it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def readable_time(seconds: float) -> str:
    """A span of time in hours, minutes and seconds.

    >>> readable_time(3661.2)
    '1:01:01'
    """
    return str(timedelta(seconds=round(seconds)))


def readable_size(size: float) -> str:
    """A number of bytes with three digits.

    >>> readable_size(1_234_567)
    '1.23 MB'
    """
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB"
