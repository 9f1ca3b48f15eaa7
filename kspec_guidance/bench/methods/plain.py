"""Plain sampling."""

from kspec_guidance.bench.methods.base import Method


class Plain(Method):
    """Different seeds, nothing else."""

    name = "plain"
    single = True
    code = "plain"
