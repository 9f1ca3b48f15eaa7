"""``python -m kspec_guidance``, for launchers of several processes that take a module."""

from kspec_guidance.cli import app

if __name__ == "__main__":
    app()
