"""Weights of the arena's networks, committed beside it or in a folder of one's own."""

import os
from pathlib import Path

from safetensors.torch import load_file
from torch import Tensor

WEIGHTS = Path(__file__).parent / "weights"


def weights_file(name: str) -> Path:
    """Path of a network's weights: in the folder named by environment variable ``ARENA_WEIGHTS``, else the committed."""
    own = Path(os.environ.get("ARENA_WEIGHTS", WEIGHTS)) / f"{name}.safetensors"
    return own if own.exists() else WEIGHTS / own.name


def weights(name: str) -> dict[str, Tensor]:
    """A network's weights as float32."""
    return {k: v.float() if v.is_floating_point() else v for k, v in load_file(weights_file(name)).items()}
