"""Arguments for a pipeline's call, by the names in its signature."""

import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = ["a red heart", "two green cats"]
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
NOTHING = object()  # an argument that is to be None, rather than left out
SIZE, FRAMES, STEPS = 32, 9, 4


def picture(seed: int = 0, size: int = SIZE) -> Image.Image:
    """Soft blobs of colour, always the same."""
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((size, size), Image.Resampling.BICUBIC)


def mask(size: int = SIZE) -> Image.Image:
    m = np.zeros((size, size), dtype=np.uint8)
    m[size // 4 : size // 2 + 4] = 255
    return Image.fromarray(m)


def clip(frames: int = FRAMES, size: int = SIZE) -> list[Image.Image]:
    return [picture(k, size) for k in range(frames)]


def call(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Two prompts of two images each where the pipeline can; ``settings`` of its family come last, None leaving one out."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    has = parameters.__contains__
    size, frames = settings.get("height", SIZE), settings.get("num_frames", FRAMES)
    values: dict[str, Any] = {
        "prompt": list(PROMPTS),
        "num_inference_steps": STEPS,
        "output_type": "latent",
        "height": size,
        "width": size,
        "num_frames": frames,
        "max_sequence_length": 16,
        "guidance_scale": 4.0,
        "image": picture(1, size),
        "mask_image": mask(size),
        "control_image": picture(3, size),
        "use_resolution_binning": False,
        "video": clip(frames, size),
        "strength": 0.9,
        "batch_size": 2,
    }
    for name in PER_PROMPT:
        values[name] = 2
    optional = {k for k in ("image", "video") if has(k) and parameters[k].default is None and k not in settings}
    made = {k: v for k, v in values.items() if has(k) and k not in optional}
    made |= {k: v for k, v in settings.items() if has(k)}
    return {k: None if v is NOTHING else v for k, v in made.items() if v is not None}


def seeded(arguments: dict[str, Any], pipe: Any, seed: int = 0) -> dict[str, Any]:
    """The same noise at every call."""
    torch.manual_seed(seed)
    if "generator" not in inspect.signature(type(pipe).__call__).parameters:
        return arguments
    return arguments | {"generator": torch.Generator().manual_seed(seed)}
