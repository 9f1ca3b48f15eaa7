"""Warnings that point to the user's code."""

import sys
import warnings

__all__ = ["warn_user"]

LIBRARIES = ("kspec_guidance", "diffusers", "torch", "accelerate", "contextlib")


def warn_user(message: str) -> None:
    """Issue a ``UserWarning`` at the innermost caller outside of this package and the libraries that call it."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in LIBRARIES:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)
