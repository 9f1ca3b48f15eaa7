"""Plain sampling."""

from .base import Method


class Plain(Method):
    """Different seeds, nothing else."""

    name = "plain"
