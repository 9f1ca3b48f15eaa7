"""Dataset synthesis with controlled diversity: prompts in, a folder of varied images with their metadata out.

    from kspec_guidance.synthesis import synthesize
    synthesize(["heart", "runner"], "outputs/set", images_per_prompt=16)

A run can be stopped and resumed at any time and can use several processes: see ``docs/synthesis.md``.
"""

from kspec_guidance.synthesis.api import Synthesis, reproduce, synthesize
from kspec_guidance.synthesis.arms import Arm, read_arms
from kspec_guidance.synthesis.errors import (
    CheckpointError,
    FolderError,
    RunFailedError,
    SettingsChangedError,
    SynthesisError,
)
from kspec_guidance.synthesis.estimate import Estimate, estimate
from kspec_guidance.synthesis.prompts import Prompt, read_prompts
from kspec_guidance.synthesis.quotas import Attribute
from kspec_guidance.synthesis.schedule import Target
from kspec_guidance.synthesis.worker import Progress

__all__ = [
    "Arm",
    "Attribute",
    "CheckpointError",
    "Estimate",
    "FolderError",
    "Progress",
    "Prompt",
    "RunFailedError",
    "SettingsChangedError",
    "Synthesis",
    "SynthesisError",
    "Target",
    "estimate",
    "read_arms",
    "read_prompts",
    "reproduce",
    "synthesize",
]
