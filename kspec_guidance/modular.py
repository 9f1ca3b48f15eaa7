"""Import path of saved modular blocks and guiders: see :mod:`kspec_guidance.integrations`."""

from diffusers.guiders.guider_utils import BaseGuidance  # noqa: F401  (diffusers looks for it in the library of a saved guider)

from kspec_guidance.integrations.guider import KernelGuider
from kspec_guidance.integrations.modular import KernelGuidanceBlock, insert_guidance

__all__ = ["KernelGuidanceBlock", "KernelGuider", "insert_guidance"]
