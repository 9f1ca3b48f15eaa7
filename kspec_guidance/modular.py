"""Import path of saved modular blocks: see :mod:`kspec_guidance.integrations.modular`."""

from kspec_guidance.integrations.modular import KernelGuidanceBlock, insert_guidance

__all__ = ["KernelGuidanceBlock", "insert_guidance"]
