"""``python -m kspec_guidance``, for multi-process launchers that run a module."""

from kspec_guidance.cli import app

if __name__ == "__main__":
    app()
