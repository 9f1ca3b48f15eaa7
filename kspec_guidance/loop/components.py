"""The parts of a pipeline that guidance asks for, found by name: scheduler, denoiser, autoencoder."""

import inspect
from typing import Any

from torch import nn

from kspec_guidance.loop.prediction import UnsupportedSchedulerError

__all__ = ["autoencoder_of", "denoiser_of", "find_scheduler", "image_size", "sub_pipelines"]

DENOISERS = ("transformer", "unet", "prior", "decoder", "image_unet", "model")


def denoiser_of(pipe: Any) -> nn.Module | None:
    """The network that the loop calls, as far as its name tells."""
    for name in DENOISERS:
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


def autoencoder_of(pipe: Any) -> Any:
    """``pipe.vae`` or what stands for it; None where pixels are sampled directly."""
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


def image_size(pipe: Any) -> tuple[int, int] | None:
    """Height and width in pixels of the images that the pipeline makes when it is not told; None if it does not say.

    Read from the denoiser's ``sample_size``, the pipeline's ``default_sample_size``, or the defaults of its call.
    """
    factor = int(getattr(pipe, "vae_scale_factor", 8))
    cells = getattr(getattr(denoiser_of(pipe), "config", None), "sample_size", None)
    cells = cells if cells is not None else getattr(pipe, "default_sample_size", None)
    if isinstance(cells, int):
        return cells * factor, cells * factor
    if isinstance(cells, tuple | list) and len(cells) == 2:
        return cells[0] * factor, cells[1] * factor
    given = inspect.signature(type(pipe).__call__).parameters
    height, width = (getattr(given.get(k), "default", None) for k in ("height", "width"))
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def sub_pipelines(pipe: Any) -> list[Any]:
    """The pipeline and those it is made of: combined pipelines hold a prior and a decoder."""
    inner = [getattr(pipe, name, None) for name in ("prior_pipe", "decoder_pipe", "generation_pipe")]
    return [pipe, *(p for p in inner if p is not None)]


ASIDE = ("image_noising_", "low_res_", "inverse_", "prior_", "super_res_", "audio_", "local_latents_")


def find_scheduler(pipe: Any, name: str | None = None) -> Any:
    """The scheduler whose step makes the samples: ``pipe.scheduler``, or the one that stands for it.

    Args:
        name: which of several, by the name of the component.

    Raises:
        UnsupportedSchedulerError: if there is none, or none of that name; those there are get listed.
    """
    if hasattr(pipe, "step") or hasattr(pipe, "step_pred"):  # a bare scheduler
        return pipe
    for inner in sub_pipelines(pipe):
        if name is None and getattr(inner, "scheduler", None) is not None:
            return inner.scheduler
    parts = {k: v for k, v in getattr(pipe, "components", {}).items() if k.endswith("scheduler") and v is not None}
    if name in parts:
        return parts[name]
    mine = [k for k in parts if not k.startswith(ASIDE)]
    if name is None and mine:
        return parts[mine[-1]]
    raise UnsupportedSchedulerError(
        f"{type(pipe).__name__} has no scheduler{f' named {name!r}' if name else ''} to guide"
        + (f"; it has {', '.join(parts)}" if parts else "; guidance needs a denoising loop that calls scheduler.step")
    )
