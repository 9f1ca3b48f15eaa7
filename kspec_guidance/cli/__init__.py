"""The command line: ``kspec-guidance demo | generate | tune | evaluate | compare``."""

from kspec_guidance.cli.app import app

__all__ = ["app"]
