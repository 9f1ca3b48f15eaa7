"""Rules: what pipeline classes need in addition to the shared builders."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny import inputs

PROMPT = "a red heart"
ONE = {"prompt": PROMPT, "num_images_per_prompt": 1}  # for classes that take one prompt and one image only
TWO = {"prompt": PROMPT, "num_images_per_prompt": 2}
CLIP = {"prompt": PROMPT, "num_videos_per_prompt": 1}


@dataclass
class Rule:
    """What one pipeline class needs.

    Args:
        components: by name: a class name, its settings, or both as a pair; any other value is the component itself.
        call: arguments of the call; a function is called for a fresh value, None omits the argument.
        init: other arguments of the constructor.
        attributes: attributes to set on the pipeline, by dotted name.
        not_run: the reason why a guidable class is not run.
        unguidable: the reason why a class cannot be guided.
    """

    components: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    init: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    not_run: str = ""
    unguidable: str = ""


def rule(pattern: str, **fields: Any) -> tuple[str, dict[str, Any]]:
    """Fields of :class:`Rule` for the class names that contain a match of ``pattern``."""
    return pattern, fields


def image() -> Any:
    return inputs.image(1)


def mask() -> Any:
    return inputs.mask()


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def few_frames() -> Any:
    return inputs.clip(4)
