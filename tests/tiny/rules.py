"""How the rules of a family are written down."""

from dataclasses import dataclass, field
from typing import Any

import torch

from tests.tiny import inputs

PROMPT = "a red heart"
ONE = {"prompt": PROMPT, "num_images_per_prompt": 1}  # one image of one prompt, for classes that take no more
TWO = {"prompt": PROMPT, "num_images_per_prompt": 2}
CLIP = {"prompt": PROMPT, "num_videos_per_prompt": 1}


@dataclass
class Rule:
    """
    Args:
        parts: components: a class name, settings, or both as a pair; anything else is the component itself.
        call: arguments of the call; a function makes a fresh value, None leaves the argument out.
        settings: other arguments of the constructor.
        attributes: what is set on the pipeline afterwards.
        not_run: why a class that could be guided is not run.
        unfit: why a class cannot be guided.
    """

    parts: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)
    attributes: dict[str, Any] = field(default_factory=dict)
    not_run: str = ""
    unfit: str = ""


def when(pattern: str, **says: Any) -> tuple[str, dict[str, Any]]:
    """A rule for the class names in which ``pattern`` is found."""
    return pattern, says


def picture() -> Any:
    return inputs.picture(1)


def mask() -> Any:
    return inputs.mask()


def noise(*shape: int, seed: int = 5) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def few_frames() -> Any:
    return inputs.clip(4)
