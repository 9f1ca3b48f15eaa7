"""Kernel-spectral diversity, novelty and distribution-matching guidance for diffusers, and diversity scores."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kspec_guidance import functional
    from kspec_guidance.memory import CentroidMemory, MemoryBank, RandomFeatureMemory

__version__ = "1.0.0rc2"
_LAZY = {  # modules that need torch or diffusers are imported on first use
    "MemoryBank": "memory",
    "CentroidMemory": "memory",
    "RandomFeatureMemory": "memory",
    "SPARKE": "guidance.presets",
    "VendiGuidance": "guidance.presets",
    "MMDGuidance": "guidance.presets",
    "NoveltyGuidance": "guidance.presets",
    "KernelGuidance": "guidance.guide",
    "guided": "integrations.pipelines",
    "KernelGuidanceBlock": "integrations.modular",
    "insert_guidance": "integrations.modular",
    "KernelGuider": "modular",
    "synthesize": "synthesis",
    "load_demo_pipeline": "demo",
    "load_demo_reference": "demo",
    "encode_reference": "loop.latents",
    "make_baseline": "baseline",
    "toward_reference": "baseline",
}

__all__ = [
    "SPARKE",
    "VendiGuidance",
    "MMDGuidance",
    "NoveltyGuidance",
    "KernelGuidance",
    "MemoryBank",
    "CentroidMemory",
    "RandomFeatureMemory",
    "functional",
    "guided",
    "KernelGuidanceBlock",
    "insert_guidance",
    "KernelGuider",
    "synthesize",
    "load_demo_pipeline",
    "load_demo_reference",
    "encode_reference",
    "make_baseline",
    "toward_reference",
]


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name in _LAZY:
        return getattr(import_module(f"kspec_guidance.{_LAZY[name]}"), name)
    if name == "functional":
        return import_module("kspec_guidance.functional")
    raise AttributeError(f"module 'kspec_guidance' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY, "functional"})
