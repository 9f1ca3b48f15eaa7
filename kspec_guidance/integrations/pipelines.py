"""Pipeline subclasses whose call takes ``kspec_guidance=``, without copied pipeline code.

``guided(AnyPipeline)`` adds the argument. Named subclasses have a guide of their own:
``SPARKE<name>``, such as ``SPARKEFluxPipeline``, exists for every pipeline class ``<name>`` of the installed diffusers.
"""

import functools
from typing import Any, TypeVar

from kspec_guidance.guidance import KernelGuidance

__all__ = ["FAMILIES", "guided", "sparke_pipeline"]

P = TypeVar("P", bound=type)
OWN = object()  # sentinel: the guide of a named pipeline

# The pipeline class behind each folder of ``pipelines/``, for diffusers' ``custom_pipeline=``.
FAMILIES = {
    "stable_diffusion": "StableDiffusionPipeline",
    "stable_diffusion_xl": "StableDiffusionXLPipeline",
    "stable_diffusion_3": "StableDiffusion3Pipeline",
    "flux": "FluxPipeline",
    "flux_2": "Flux2Pipeline",
    "pixart_sigma": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "lumina_2": "Lumina2Pipeline",
    "qwen_image": "QwenImagePipeline",
    "z_image": "ZImagePipeline",
    "wan": "WanPipeline",
    "ltx": "LTXPipeline",
    "cogvideox": "CogVideoXPipeline",
    "stable_audio": "StableAudioPipeline",
}


def _call(parent: Any, default: Any) -> Any:
    """``parent.__call__`` with an additional argument ``kspec_guidance``."""

    @functools.wraps(parent.__call__)
    def call(self: Any, *args: Any, kspec_guidance: Any = default, **kwargs: Any) -> Any:
        guide = self.guide if kspec_guidance is OWN else kspec_guidance
        if guide is None:
            return parent.__call__(self, *args, **kwargs)
        if not isinstance(guide, KernelGuidance):
            raise TypeError(f"kspec_guidance must be a guide such as SPARKE(), got {type(guide).__name__}")
        with guide.attach(self):
            return parent.__call__(self, *args, **kwargs)

    return call


@functools.cache
def guided(pipeline_class: P) -> P:
    """A subclass of ``pipeline_class`` whose ``__call__`` also takes ``kspec_guidance=guide``.

    ``guided(StableDiffusionXLPipeline).from_pretrained(...)("a dog", kspec_guidance=SPARKE())``. Without the argument, or
    with None, the call is the parent's. ``from_pretrained`` and ``from_pipe`` work as on the parent, and so do
    ``guided(AutoPipelineForText2Image)`` and the other automatic classes, which return a guided pipeline.
    Saved pipelines name the parent class, so they load without this package.

    Raises:
        TypeError: if ``pipeline_class`` is not a class with a ``__call__``, or the guide is not a KernelGuidance.
    """
    if isinstance(pipeline_class, type) and pipeline_class.__name__.startswith("AutoPipelineFor"):
        return _automatic(pipeline_class)
    if not isinstance(pipeline_class, type) or "__call__" not in dir(pipeline_class):
        raise TypeError(f"guided() takes a pipeline class such as StableDiffusionPipeline, got {pipeline_class!r}")
    # The parent's name and module: diffusers writes them into model_index.json and compares them when loading.
    body = {
        "__call__": _call(pipeline_class, None),
        "__module__": pipeline_class.__module__,
        "__doc__": pipeline_class.__doc__,
        "__reduce__": lambda self: (_blank, (pipeline_class,), self.__dict__),  # pickle would find the parent by name
    }
    return type(pipeline_class.__name__, (pipeline_class,), body)  # type: ignore[return-value]


def _blank(pipeline_class: Any) -> Any:
    """An empty guided pipeline, to be filled by pickle or copy."""
    cls = guided(pipeline_class)
    return cls.__new__(cls)


def _automatic(auto: Any) -> Any:
    def wrapped(name: str) -> Any:
        method = getattr(auto, name)

        @functools.wraps(method)
        def make(cls: Any, *args: Any, **kwargs: Any) -> Any:
            pipe: Any = method(*args, **kwargs)
            pipe.__class__ = guided(pipe.__class__)  # only __call__ differs, so the components stay
            return pipe

        return classmethod(make)

    body = {name: wrapped(name) for name in ("from_pretrained", "from_pipe")}
    return type(auto.__name__, (auto,), body | {"__module__": auto.__module__, "__doc__": auto.__doc__})


def named(guide_class: type[KernelGuidance], pipeline_class: Any, name: str, module: str = __name__) -> Any:
    """A subclass with its own guide ``pipe.guide``, created by ``guide_class()`` and used by every call.

    The guide's memory is kept between calls, so later images are repelled from earlier ones of similar prompts;
    ``pipe.guide.memory.clear()`` empties it. ``kspec_guidance=other`` uses another guide for one call, ``None`` none.
    """

    def own(self: Any) -> KernelGuidance:
        """The guide of this pipeline, created at the first use."""
        if "_kspec_guide" not in self.__dict__:
            self.__dict__["_kspec_guide"] = guide_class()  # type: ignore[call-arg]
        return self.__dict__["_kspec_guide"]

    def put(self: Any, guide: KernelGuidance) -> None:
        if not isinstance(guide, KernelGuidance):
            raise TypeError(f"guide must be a guide such as SPARKE(), got {type(guide).__name__}")
        self.__dict__["_kspec_guide"] = guide

    def to_json_string(self: Any) -> str:
        """The configuration as JSON; it names the parent class, so saved pipelines load without this package."""
        return pipeline_class.to_json_string(self).replace(
            f'"_class_name": "{name}"', f'"_class_name": "{pipeline_class.__name__}"'
        )

    doc = f"{pipeline_class.__name__} guided by {guide_class.__name__}: see :func:`kspec_guidance.pipelines.named`."
    body = {
        "__call__": _call(pipeline_class, OWN),
        "guide": property(own, put),
        "to_json_string": to_json_string,
        "__module__": module,
        "__doc__": doc,
    }
    return type(name, (pipeline_class,), body)


def sparke_pipeline(pipeline_class_name: str, module: str = __name__) -> Any:
    """The named SPARKE subclass of one of diffusers' pipeline classes, as a class of ``module``.

    Raises:
        AttributeError: if the installed diffusers has no such class.
    """
    import diffusers

    from kspec_guidance.guidance.presets import SPARKE

    found = getattr(diffusers, pipeline_class_name, None)
    if not isinstance(found, type):
        raise AttributeError(f"diffusers {diffusers.__version__} has no pipeline class {pipeline_class_name!r}")
    return named(SPARKE, found, f"SPARKE{pipeline_class_name}", module)


def __getattr__(name: str) -> Any:
    if name.startswith("SPARKE") and name.endswith("Pipeline"):
        made = sparke_pipeline(name.removeprefix("SPARKE"))
        globals()[name] = made  # one class per name, for isinstance and pickle
        return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(f"SPARKE{cls}" for cls in FAMILIES.values())})
