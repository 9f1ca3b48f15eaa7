"""Guides a MODEL: the functions behind the nodes, and behind the script for Forge. Nothing of ComfyUI is imported here."""

from collections.abc import Callable
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from kspec_guidance import SPARKE, MMDGuidance
from kspec_guidance.integrations.denoised import DenoisedGuidance, MemoryBySize, prompts_of_conditioning


def guide_model(model: Any, make: Callable[[Tensor], Any], conditioning: Any = None, sigmas: Tensor | None = None) -> Any:
    """A clone of a MODEL whose clean predictions are guided, at each call of the sampler.

    Args:
        model: has ``clone`` and ``set_model_sampler_post_cfg_function``, as in ComfyUI and Forge.
        make: makes the guide for clean predictions like the given ones ``[n, ...]``.
        conditioning: what the images are grouped by; by default the positive prompt of the sampler.
        sigmas: the noise levels of the run, from a host whose sampler does not say them (Forge).
    """
    model, guidance = model.clone(), DenoisedGuidance(make)

    def after_cfg(args: dict[str, Any]) -> Tensor:
        source = args["model"]
        sampling = getattr(source, "model_sampling", None) or getattr(source, "predictor", None)
        prompt = args.get("cond") if conditioning is None else conditioning
        levels = args["model_options"].get("transformer_options", {}).get("sample_sigmas", sigmas)
        if levels is None:
            raise RuntimeError(
                "this sampler does not say which noise levels it will use (sample_sigmas), so the guided steps are "
                "unknown; update ComfyUI"
            )
        return guidance(
            args["denoised"], args["input"], args["sigma"], levels, sampling, lambda: prompts_of_conditioning(prompt)
        )

    def around_sampler(executor: Any, guider: Any, sigmas: Tensor, *args: Any, **kwargs: Any) -> Any:
        guidance.begin(sigmas)
        result = None
        try:
            result = executor(guider, sigmas, *args, **kwargs)
            return result
        finally:
            guidance.end(result)

    model.set_model_sampler_post_cfg_function(after_cfg)
    if hasattr(model, "add_wrapper_with_key"):  # ComfyUI says where a run begins and ends
        model.add_wrapper_with_key("sampler_sample", f"kspec-{uuid4()}", around_sampler)
    return model


def diverse(
    model: Any,
    variety: float,
    seed: int = 0,
    memory: MemoryBySize | None = None,
    conditioning: Any = None,
    sigmas: Tensor | None = None,
) -> Any:
    """A MODEL whose images repel each other, and those in the memory, of similar prompts.

    Args:
        model: see :func:`guide_model`.
        variety: strength from 0 to 100.
        seed: of the noise that separates images which start from identical noise.
        memory: earlier images; without one nothing is remembered.
        conditioning: see :func:`guide_model`.
        sigmas: see :func:`guide_model`.
    """

    def make(x0: Tensor) -> SPARKE:
        guide = SPARKE(variety=variety, seed=seed, memory=None if memory is None else memory.of(x0))
        guide.remember = memory is not None
        return guide

    return guide_model(model, make, conditioning, sigmas)


def matching(model: Any, latents: Tensor, scale: float, stop: float, baseline: Tensor | None = None) -> Any:
    """A MODEL whose images move toward the style of references, or without a baseline toward their distribution.

    Args:
        model: see :func:`guide_model`.
        latents: references ``[m, c, ...]`` as the autoencoder returns them.
        scale: size of the move, relative to the norm of the prediction.
        stop: end of the guided interval, as a fraction of the steps.
        baseline: what the model samples anyway, over many prompts: latents ``[b, c, ...]`` as the sampler returns them.
    """
    process = getattr(model.model, "process_latent_in", lambda x: x)

    def make(x0: Tensor) -> MMDGuidance:
        rows = [None if x is None else _fitted(process(x), x0).to(x0.device) for x in (latents, baseline)]
        guide = MMDGuidance(rows[0], scale=scale, stop=stop, baseline=rows[1])
        guide.remember = False
        return guide

    return guide_model(model, make)


def baseline_prompts() -> list[str]:
    """Prompts of general subjects, without words of style."""
    from kspec_guidance.baseline import BASELINE_PROMPTS  # takes a second, and few workflows need it

    return list(BASELINE_PROMPTS)


def encoded(clip: Any, text: str) -> Any:
    """The CONDITIONING of a prompt, as ComfyUI's own node encodes it."""
    return clip.encode_from_tokens_scheduled(clip.tokenize(text))


def _fitted(latents: Tensor, x0: Tensor) -> Tensor:
    """References in the shape of samples: resized, and repeated in time.

    Raises:
        ValueError: for references of another kind.
    """
    if latents.ndim == 4 and x0.ndim == 5:
        latents = latents[:, :, None]
    if latents.ndim == 5 and x0.ndim == 4 and latents.shape[2] == 1:
        latents = latents[:, :, 0]
    if latents.ndim != x0.ndim or latents.ndim < 4 or latents.shape[1] != x0.shape[1]:
        raise ValueError(
            f"the references have latents {list(latents.shape[1:])}, and this model samples {list(x0.shape[1:])}: connect "
            "the VAE of the model; a model that samples several latents at once (video with sound) cannot match references"
        )
    size, latents = x0.shape[2:], latents.float()
    if latents.shape[2:] != size:
        mode = "bilinear" if latents.ndim == 4 else "trilinear"
        latents = torch.nn.functional.interpolate(latents, size=tuple(size), mode=mode, align_corners=False)
    return latents
