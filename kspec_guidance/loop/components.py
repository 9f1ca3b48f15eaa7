"""Pipelines from disk or the hub, and their components, found by name: scheduler, denoiser, autoencoder."""

import inspect
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from packaging.version import Version
from torch import nn

from kspec_guidance.loop.prediction import UnsupportedSchedulerError

__all__ = [
    "autoencoder_of",
    "call_parameters",
    "denoiser_of",
    "denoisers_of",
    "find_scheduler",
    "image_size",
    "load_pipeline",
    "pipeline_config",
    "sub_pipelines",
]

DENOISERS = ("transformer", "unet", "prior", "decoder", "image_unet", "model")


def load_pipeline(model: str, dtype: torch.dtype, revision: str | None = None) -> Any:
    """A diffusers pipeline, from safetensors files alone.

    Args:
        model: id on the hub, or a folder.
        dtype: of its networks.
        revision: branch, tag or commit on the hub.

    Raises:
        Exception: of the hub, the files, or a package that the pipeline needs.
    """
    from diffusers import DiffusionPipeline

    name = "dtype" if Version(version("diffusers")) >= Version("0.40") else "torch_dtype"
    given = _left_out(model, revision) | {name: dtype}
    return DiffusionPipeline.from_pretrained(model, revision=revision, use_safetensors=True, **given)


def _left_out(model: str, revision: str | None) -> dict[str, None]:
    """Components that a stored pipeline is without, though its class has them: T5 of Stable Diffusion 3, for instance.

    diffusers loads such a pipeline only if they are named; those that its class calls optional need no name.
    """
    import diffusers

    try:
        config = pipeline_config(model, revision)
    except (OSError, ValueError):
        return {}  # diffusers says what is wrong
    cls = getattr(diffusers, str(config.get("_class_name")), None)
    if cls is None:
        return {}
    return {k: None for k, v in config.items() if v == [None, None] and k not in cls._optional_components}


def pipeline_config(model: str, revision: str | None = None) -> dict[str, Any]:
    """The file ``model_index.json`` of a stored pipeline.

    Args:
        model: id on the hub, or a folder.
        revision: branch, tag or commit on the hub.

    Raises:
        OSError: if there is no such file.
        ValueError: for a text that is no id, or a file that is not JSON.
    """
    from huggingface_hub import hf_hub_download

    name = "model_index.json"
    path = Path(model) / name if Path(model).is_dir() else hf_hub_download(model, name, revision=revision)
    return json.loads(Path(path).read_text(encoding="utf-8"))


def denoiser_of(pipe: Any) -> nn.Module | None:
    """The denoising network of a pipeline, found by its component name; None if there is none."""
    for name in DENOISERS:
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def denoisers_of(pipe: Any) -> list[nn.Module]:
    """All denoising networks of a pipeline: some (Wan 2.2) have a second one for low noise levels."""
    second = [getattr(pipe, f"{name}_2", None) for name in DENOISERS]
    return [found for found in (denoiser_of(pipe), *second) if isinstance(found, nn.Module)]


def autoencoder_of(pipe: Any) -> Any:
    """``pipe.vae`` or ``pipe.vqvae``; None if pixels are sampled directly."""
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


def call_parameters(cls: type) -> dict[str, inspect.Parameter]:
    """Parameters of the call of a pipeline's class; with ``**kwargs``, also those of the class that it extends."""
    found: dict[str, inspect.Parameter] = {}
    for base in (c for c in cls.__mro__ if "__call__" in vars(c)):
        own = inspect.signature(vars(base)["__call__"]).parameters
        found = {**own, **found}
        if not any(p.kind is p.VAR_KEYWORD for p in own.values()):
            break
    return found


def image_size(pipe: Any) -> tuple[int, int] | None:
    """Default height and width of the pipeline's images in pixels; None if not declared.

    Read from the denoiser's ``sample_size``, the pipeline's ``default_sample_size``, or the defaults of its ``__call__``.
    """
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    latent_size = getattr(getattr(denoiser_of(pipe), "config", None), "sample_size", None)
    latent_size = latent_size if latent_size is not None else getattr(pipe, "default_sample_size", None)
    if isinstance(latent_size, int):
        return latent_size * factor, latent_size * factor
    if isinstance(latent_size, tuple | list) and len(latent_size) == 2:
        return latent_size[0] * factor, latent_size[1] * factor
    parameters = call_parameters(type(pipe))
    height, width = (getattr(parameters.get(k), "default", None) for k in ("height", "width"))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def sub_pipelines(pipe: Any) -> list[Any]:
    """The pipeline and its inner pipelines: combined pipelines consist of a prior and a decoder."""
    inner = [getattr(pipe, name, None) for name in ("prior_pipe", "decoder_pipe", "generation_pipe")]
    return [pipe, *(p for p in inner if p is not None)]


AUXILIARY = ("image_noising_", "low_res_", "inverse_", "prior_", "super_res_", "audio_", "local_latents_")


def find_scheduler(pipe: Any, name: str | None = None) -> Any:
    """The scheduler that steps the samples: usually ``pipe.scheduler``.

    Args:
        pipe: a pipeline, or a scheduler, which is returned.
        name: name of the component, if there are several schedulers.

    Raises:
        UnsupportedSchedulerError: if there is no scheduler, or none with this name; the message lists the existing ones.
    """
    if hasattr(pipe, "step") or hasattr(pipe, "step_pred"):  # a bare scheduler
        return pipe
    for inner in sub_pipelines(pipe):
        if name is None and getattr(inner, "scheduler", None) is not None:
            return inner.scheduler
    parts = {k: v for k, v in getattr(pipe, "components", {}).items() if k.endswith("scheduler") and v is not None}
    if name in parts:
        return parts[name]
    main = [k for k in parts if not k.startswith(AUXILIARY)]
    if name is None and main:
        return parts[main[-1]]
    raise UnsupportedSchedulerError(
        f"{type(pipe).__name__} has no scheduler{f' named {name!r}' if name else ''} to guide"
        + (f"; it has {', '.join(parts)}" if parts else "; guidance needs a denoising loop that calls scheduler.step")
    )
