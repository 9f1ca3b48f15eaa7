"""Recipes: how a model is run in a comparison, what its pipeline offers to methods, and the memory that it needs."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from kspec_guidance.loop.components import pipeline_config
from kspec_guidance.utils.arguments import choices
from kspec_guidance.utils.devices import free_bytes
from kspec_guidance.utils.messages import readable_size

__all__ = ["RECIPES", "Recipe", "choose_offload", "find_recipe", "place"]

UNET = frozenset({"features", "guidance", "prompts", "images"})
T5, CLIP, CLIP_G, VAE = 4.762, 0.123, 0.695, 0.084  # billions of parameters
ITEM_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "I8": 1, "U8": 1}


@dataclass(frozen=True)
class Recipe:
    """How a model is run.

    Attributes:
        model: id on the hub, or a folder.
        pipeline: class of diffusers.
        dtype: of its networks.
        call: arguments of its call: steps, classifier-free guidance, size.
        guidance: name of the argument for the weight of classifier-free guidance; None for models without.
        has: what methods may need of it, see :class:`~kspec_guidance.bench.methods.Method`.
        one_call: whether the denoiser makes all predictions of a step in one call, so that methods can call it again.
        billions: parameters of its parts.
        working: gigabytes for one image beside the weights; an estimate.
        gated: whether the hub asks for an account and consent.
    """

    model: str
    pipeline: str
    dtype: str
    call: Mapping[str, Any]
    guidance: str | None = None
    has: frozenset[str] = frozenset()
    one_call: bool = False
    billions: Mapping[str, float] = field(default_factory=dict)
    working: float = 1.0
    gated: bool = False

    @property
    def steps(self) -> int:
        """Steps of the sampler."""
        return int(self.call["num_inference_steps"])

    def bytes_needed(self, images: int, offload: str = "none") -> int:
        """Memory of the device for a batch: all weights, or those of the largest part, and the work on the images."""
        weights = list(self.billions.values()) or [0.0]
        parts = {"none": sum(weights), "model": max(weights), "sequential": 0.0}[offload]
        return int(1e9 * (parts * torch.finfo(getattr(torch, self.dtype)).bits / 8 + self.working * images))


def _sd3(name: str, transformer: float, **call: Any) -> Recipe:
    few = call["guidance_scale"] == 0
    parts = {"transformer": transformer, "text encoders 1, 2": CLIP + CLIP_G, "text encoder 3": T5, "autoencoder": VAE}
    return Recipe(
        f"stabilityai/stable-diffusion-3.5-{name}", "StableDiffusion3Pipeline", "bfloat16",
        {**call, "height": 1024, "width": 1024}, None if few else "guidance_scale",
        (UNET | {"blocks"}) - {"features"} - ({"guidance"} if few else set()), True, parts, 2.0, True,
    )  # fmt: skip


def _flux(name: str, **call: Any) -> Recipe:
    parts = {"transformer": 11.901, "text encoder 1": CLIP, "text encoder 2": T5, "autoencoder": VAE}
    return Recipe(
        f"black-forest-labs/FLUX.1-{name}", "FluxPipeline", "bfloat16", {**call, "height": 1024, "width": 1024},
        None, frozenset({"prompts", "blocks"}), True, parts, 2.0, True,
    )  # fmt: skip


XL_PARTS = {"unet": 2.567, "text encoder 1": CLIP, "text encoder 2": CLIP_G, "autoencoder": VAE}
RECIPES: dict[str, Recipe] = {
    "demo": Recipe(
        "demo", "StableDiffusionPipeline", "float32", {"num_inference_steps": 8, "guidance_scale": 5.0}, "guidance_scale",
        UNET, True, {"all": 0.007}, 0.05,
    ),
    "sd-1.5": Recipe(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "StableDiffusionPipeline", "float16",
        {"num_inference_steps": 50, "guidance_scale": 7.5, "height": 512, "width": 512}, "guidance_scale", UNET, True,
        {"unet": 0.860, "text encoder": CLIP, "autoencoder": VAE, "safety checker": 0.304}, 0.6,
    ),
    "sdxl": Recipe(
        "stabilityai/stable-diffusion-xl-base-1.0", "StableDiffusionXLPipeline", "float16",
        {"num_inference_steps": 50, "guidance_scale": 5.0, "height": 1024, "width": 1024}, "guidance_scale", UNET, True,
        XL_PARTS, 2.0,
    ),
    "sdxl-turbo": Recipe(
        "stabilityai/sdxl-turbo", "StableDiffusionXLPipeline", "float16",
        {"num_inference_steps": 4, "guidance_scale": 0.0, "height": 512, "width": 512}, None, UNET - {"guidance"}, True,
        XL_PARTS, 0.8,
    ),
    "sd-3.5-medium": _sd3("medium", 2.243, num_inference_steps=40, guidance_scale=4.5),
    "sd-3.5-large": _sd3("large", 8.057, num_inference_steps=28, guidance_scale=3.5),
    "sd-3.5-large-turbo": _sd3("large-turbo", 8.057, num_inference_steps=4, guidance_scale=0.0),
    "flux-dev": _flux("dev", num_inference_steps=50, guidance_scale=3.5, max_sequence_length=512),
    "flux-schnell": _flux("schnell", num_inference_steps=4, guidance_scale=0.0, max_sequence_length=256),
    "sana": Recipe(
        "Efficient-Large-Model/Sana_1600M_1024px_diffusers", "SanaPipeline", "bfloat16",
        {"num_inference_steps": 20, "guidance_scale": 4.5, "height": 1024, "width": 1024}, "guidance_scale",
        UNET - {"features"}, True, {"transformer": 1.604, "text encoder": 2.614, "autoencoder": 0.312}, 2.0,
    ),
    "pixart-sigma": Recipe(
        "PixArt-alpha/PixArt-Sigma-XL-2-1024-MS", "PixArtSigmaPipeline", "float16",
        {"num_inference_steps": 20, "guidance_scale": 4.5, "height": 1024, "width": 1024}, "guidance_scale",
        frozenset({"guidance", "images"}), False, {"transformer": 0.611, "text encoder": T5, "autoencoder": VAE}, 2.0,
    ),
    "qwen-image": Recipe(
        "Qwen/Qwen-Image", "QwenImagePipeline", "bfloat16",
        {"num_inference_steps": 50, "true_cfg_scale": 4.0, "negative_prompt": " ", "height": 1024, "width": 1024},
        "true_cfg_scale", frozenset({"guidance"}), False,
        {"transformer": 20.430, "text encoder": 8.292, "autoencoder": 0.127}, 2.0,
    ),
    "z-image-turbo": Recipe(
        "Tongyi-MAI/Z-Image-Turbo", "ZImagePipeline", "bfloat16",
        {"num_inference_steps": 9, "guidance_scale": 0.0, "height": 1024, "width": 1024}, None, frozenset({"images"}),
        False, {"transformer": 6.155, "text encoder": 4.022, "autoencoder": VAE}, 2.0,
    ),
    "wan": Recipe(
        "Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "WanPipeline", "bfloat16",
        {"num_inference_steps": 50, "guidance_scale": 5.0, "height": 480, "width": 832, "num_frames": 1}, "guidance_scale",
        frozenset({"guidance"}), False, {"transformer": 1.419, "text encoder": 5.681, "autoencoder": 0.127}, 1.0,
    ),
}  # fmt: skip


def find_recipe(model: str) -> tuple[Recipe, bool]:
    """The recipe of a model, by its short name or its id; else that of another model of its class, and whether it is.

    Args:
        model: a short name of :data:`RECIPES`, an id on the hub, or a folder.

    Returns:
        The recipe, and whether it was written for this very model.

    Raises:
        ValueError: for models that cannot be found.
    """
    for name, recipe in RECIPES.items():
        if model in (name, recipe.model):
            return recipe, True
    folder = Path(model)
    try:
        pipeline = pipeline_config(model)["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"model {model!r} is unknown: no folder of a diffusers pipeline, and not found on the hub ({_line(error)}); "
            f"{choices(model, RECIPES)}"
        ) from error
    alike = next((r for r in RECIPES.values() if r.pipeline == pipeline and r.model != "demo"), None)
    if alike is None:
        alike = Recipe(model, pipeline, "bfloat16", {"num_inference_steps": 50})
    call = {k: v for k, v in alike.call.items() if k not in ("height", "width")}  # the pipeline knows its own size
    billions = _stored_billions(folder) if folder.is_dir() else {}
    return replace(alike, model=model, call=call, billions=billions, gated=alike.gated and not folder.is_dir()), False


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _stored_billions(folder: Path) -> dict[str, float]:
    """Billions of parameters of each part of a pipeline, from the headers of its safetensors files."""
    found: dict[str, float] = {}
    for path in folder.glob("*/*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        for name, about in header.items():
            if name != "__metadata__":
                start, end = about["data_offsets"]
                size = (end - start) / ITEM_SIZES.get(about["dtype"], 4)
                found[path.parent.name] = found.get(path.parent.name, 0.0) + size / 1e9
    return found


def choose_offload(recipe: Recipe, device: torch.device, images: int, wanted: str = "auto") -> str:
    """Where the weights are kept, decided before any is read.

    Args:
        recipe: of the model.
        device: that makes the images.
        images: in a batch.
        wanted: ``none``, all weights on the device; ``model``, the part that works; ``sequential``, layer by layer, slow;
            ``auto``, the first of the first two that fits.

    Raises:
        ValueError: if the device has too little memory free, with what is needed.
    """
    free = _free(device)
    if device.type == "cpu" and wanted not in ("auto", "none"):
        raise ValueError(f"--offload {wanted} keeps weights off a GPU, and the device is the CPU; leave it out")
    modes = ("none", "model") if wanted == "auto" and device.type != "cpu" else ("none" if wanted == "auto" else wanted,)
    for mode in modes:
        if free is None or recipe.bytes_needed(images, mode) <= free:
            return mode
    needs = " or ".join(
        f"about {readable_size(recipe.bytes_needed(images, mode))}" + (f" with --offload {mode}" if mode != "none" else "")
        for mode in modes
    )
    advice = "a smaller --batch-size" if images > 1 else "a smaller model"
    if device.type != "cpu" and wanted != "sequential":
        advice += ", or --offload sequential (slow)"
    raise ValueError(
        f"{recipe.model} in {recipe.dtype} needs {needs} for {images} images at once, and {device} has "
        f"{readable_size(free or 0)} free; give {advice}"
    )


def _free(device: torch.device) -> int | None:
    """Free bytes of a device; on the CPU those of the machine."""
    if device.type != "cpu":
        return free_bytes(device)
    import psutil  # a dependency of accelerate

    return int(psutil.virtual_memory().available)


def place(pipe: Any, device: torch.device, offload: str) -> None:
    """Bring a pipeline to its device, or let it come by parts."""
    if offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif device.type != "cpu":
        pipe.to(device)
