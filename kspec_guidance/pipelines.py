"""Pipeline subclasses whose call takes ``kspec_guidance=``: see :mod:`kspec_guidance.integrations.pipelines`."""

from typing import Any

from kspec_guidance.integrations import pipelines as _pipelines
from kspec_guidance.integrations.pipelines import FAMILIES, guided, sparke_pipeline

__all__ = ["FAMILIES", "guided", "sparke_pipeline"]


def __getattr__(name: str) -> Any:
    return getattr(_pipelines, name)


def __dir__() -> list[str]:
    return dir(_pipelines)
