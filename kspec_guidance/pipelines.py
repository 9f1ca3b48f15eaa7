"""Pipeline subclasses whose call takes ``kspec_guidance=``: one factory, no copied pipeline code."""

import functools
from typing import Any, TypeVar

from kspec_guidance.guidance import KernelGuidance

__all__ = ["guided"]

P = TypeVar("P", bound=type)


@functools.cache
def guided(pipeline_class: P) -> P:
    """A subclass of ``pipeline_class`` whose ``__call__`` takes ``kspec_guidance=guide``; all else is the parent's.

    ``guided(StableDiffusionXLPipeline).from_pretrained(...)("a dog", kspec_guidance=SPARKE())``. Without the argument, or
    with None, the call is the parent's own. Saved pipelines name the parent class, so they load without this package.

    Raises:
        TypeError: if ``pipeline_class`` is no class with a ``__call__``, or the guide is no KernelGuidance.
    """
    if not isinstance(pipeline_class, type) or not callable(getattr(pipeline_class, "__call__", None)):  # noqa: B004
        raise TypeError(f"guided() takes a pipeline class such as StableDiffusionPipeline, got {pipeline_class!r}")

    @functools.wraps(pipeline_class.__call__)
    def call(self: Any, *args: Any, kspec_guidance: KernelGuidance | None = None, **kwargs: Any) -> Any:
        if kspec_guidance is None:
            return pipeline_class.__call__(self, *args, **kwargs)
        if not isinstance(kspec_guidance, KernelGuidance):
            raise TypeError(f"kspec_guidance must be a guide such as SPARKE(), got {type(kspec_guidance).__name__}")
        with kspec_guidance.attach(self):
            return pipeline_class.__call__(self, *args, **kwargs)

    # The parent's name and module: diffusers writes them into model_index.json and compares them when loading.
    body = {"__call__": call, "__module__": pipeline_class.__module__, "__doc__": pipeline_class.__doc__}
    return type(pipeline_class.__name__, (pipeline_class,), body)  # type: ignore[return-value]
