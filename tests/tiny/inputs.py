"""Arguments of a pipeline's call, by the names in its signature."""

import inspect
from typing import Any

import numpy as np
import torch
from PIL import Image

PROMPTS = ["a red heart", "two green cats"]
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")
EXPLICIT_NONE = object()  # passes None, where None itself omits the argument
SIZE, FRAMES, STEPS = 32, 9, 4


def image(seed: int = 0, size: int = SIZE) -> Image.Image:
    """Soft blobs of colour from a fixed seed."""
    rng = np.random.default_rng(seed)
    blobs = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blobs).resize((size, size), Image.Resampling.BICUBIC)


def mask(size: int = SIZE) -> Image.Image:
    array = np.zeros((size, size), dtype=np.uint8)
    array[size // 4 : size // 2 + 4] = 255
    return Image.fromarray(array)


def clip(frames: int = FRAMES, size: int = SIZE) -> list[Image.Image]:
    return [image(k, size) for k in range(frames)]


def call_kwargs(pipe: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """Two prompts with two images each where supported; ``settings`` take precedence, and None omits an argument."""
    parameters = inspect.signature(type(pipe).__call__).parameters
    accepts = parameters.__contains__
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
        "image": image(1, size),
        "mask_image": mask(size),
        "control_image": image(3, size),
        "use_resolution_binning": False,
        "video": clip(frames, size),
        "strength": 0.9,
        "batch_size": 2,
    }
    for name in PER_PROMPT:
        values[name] = 2
    optional = {k for k in ("image", "video") if accepts(k) and parameters[k].default is None and k not in settings}
    kwargs = {k: v for k, v in values.items() if accepts(k) and k not in optional}
    kwargs |= {k: v for k, v in settings.items() if accepts(k)}
    return {k: None if v is EXPLICIT_NONE else v for k, v in kwargs.items() if v is not None}


def seeded(arguments: dict[str, Any], pipe: Any, seed: int = 0) -> dict[str, Any]:
    """Add a seeded generator, and seed the global one."""
    torch.manual_seed(seed)
    if "generator" not in inspect.signature(type(pipe).__call__).parameters:
        return arguments
    return arguments | {"generator": torch.Generator().manual_seed(seed)}
