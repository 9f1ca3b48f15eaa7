"""The embedded emoji pipeline, trained by this project on Noto Emoji and Twemoji, and reference sets."""

import json
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kspec_guidance.utils.arguments import choices
from kspec_guidance.utils.hashing import fingerprint, same_network

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

__all__ = ["DEMO_PROMPTS", "is_demo", "is_demo_denoiser", "load_demo_pipeline", "load_demo_reference", "unknown_words"]

ASSETS = Path(__file__).parent / "assets"
# fingerprints of the denoisers of earlier versions: folders of their images are still known as the embedded model's
EARLIER_DENOISERS = ("UNet2DConditionModel-d025d1d68aa1(+117+84+76-12+72-52)",)  # 1.0.0rc1
DEMO_PROMPTS = (  # names of different things that the embedded model knows
    "heart", "cat face", "dog face", "rocket", "teacher", "clock face", "bird", "surfer", "flag", "smiling face",
    "automobile", "evergreen tree", "student", "police officer", "fish", "book", "baby", "runner", "elf", "farmer", "cook",
    "flower", "building", "fruit", "vehicle", "person", "singer", "judge", "swimmer", "mage", "pilot", "guitar", "umbrella",
)  # fmt: skip


def load_demo_pipeline(dtype: torch.dtype = torch.float32) -> "StableDiffusionPipeline":
    """A Stable Diffusion pipeline for 64 x 64 emoji, from files inside the package: no network.

    Prompts are lower-case emoji names (``runner``, ``cat face``, ``heart``), optionally with ``, woman``,
    ``, dark skin tone``, ``, noto style`` or ``, twemoji style``. What the prompt leaves open varies from image to image.

    Args:
        dtype: of the weights; they are stored in float16.
    """
    from diffusers import StableDiffusionPipeline

    from kspec_guidance.utils.progress import quiet_loading

    with quiet_loading():
        pipe = StableDiffusionPipeline.from_pretrained(ASSETS / "emoji", local_files_only=True, use_safetensors=True)
    for part in pipe.components.values():  # older diffusers name from_pretrained's argument differently
        if isinstance(part, torch.nn.Module):
            torch.nn.Module.to(part, dtype)  # diffusers' own method warns about float16 on the CPU
    return pipe


def unknown_words(pipe: Any, prompt: str) -> list[str]:
    """Words that the embedded model never saw: those that its tokenizer, trained on its captions, cuts into pieces.

    Args:
        pipe: the embedded pipeline; of others nothing is known, and the list is empty.
        prompt: its text.
    """
    if not is_demo(pipe):
        return []
    words = dict.fromkeys(re.findall(r"[^\W\d_]+", prompt.lower()))
    return [word for word in words if len(pipe.tokenizer.tokenize(word)) > 1]


@cache
def _demo_denoiser() -> str:
    return fingerprint(load_demo_pipeline().unet)


def is_demo_denoiser(network: str) -> bool:
    """Whether a fingerprint is that of the embedded pipeline's denoiser, of this version or an earlier one."""
    return any(same_network(network, known) for known in (*EARLIER_DENOISERS, _demo_denoiser()))


def is_demo(pipe: Any) -> bool:
    """Whether a pipeline's denoiser was loaded by :func:`load_demo_pipeline`."""
    config = getattr(getattr(pipe, "unet", None), "config", {})
    return Path(str(config.get("_name_or_path", ""))) == ASSETS / "emoji" / "unet"


def load_demo_reference(name: str) -> Tensor:
    """A small set of original emoji images ``[m, 3, 64, 64]`` in -1..1, for MMD guidance.

    Args:
        name: ``twemoji``, ``noto``, ``dark-skin-tone`` or ``light-skin-tone``.

    Raises:
        ValueError: for an unknown name; the message lists the known ones.
    """
    import numpy as np
    from PIL import Image

    sets = json.loads((ASSETS / "references" / "references.json").read_text())
    if name not in sets:
        raise ValueError(f"no reference set named {name!r}; {choices(name, sets)}")
    with Image.open(ASSETS / "references" / f"{name}.png") as file:  # the name is a key of references.json
        sheet = torch.from_numpy(np.asarray(file.convert("RGB")).copy())
    size, columns = 64, sheet.shape[1] // 64
    tiles = sheet.view(-1, size, columns, size, 3).permute(0, 2, 4, 1, 3).reshape(-1, 3, size, size)
    return tiles[: sets[name]["count"]].float() / 127.5 - 1
