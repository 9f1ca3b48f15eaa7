"""Inputs whose scores are known in closed form: the package's own, for third parties too."""

from kspec_guidance.testing import clusters, two_points

__all__ = ["clusters", "two_points"]
