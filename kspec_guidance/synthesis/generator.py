"""Generator: makes one batch of images at a time with a guided pipeline."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.schedule import Sample

__all__ = ["GeneratedBatch", "Generator"]


@dataclass(frozen=True)
class GeneratedBatch:
    """One generated batch.

    Attributes:
        images: its n images.
        x: their samples ``[n, ...]`` in the guide's space.
        prompt_features: of their prompts ``[n, p]``; None if the pipeline gives none.
    """

    images: list[Image.Image]
    x: Tensor
    prompt_features: Tensor | None


class Generator:
    """Calls a pipeline for batches of samples; nothing is added to the guide's memory.

    Args:
        pipe: a text-to-image pipeline.
        guide: the caller attaches it to the pipeline.
        call: arguments of every pipeline call, such as ``num_inference_steps``.

    Attributes:
        guidance_seconds: time that guidance has taken so far.

    Raises:
        SynthesisError: if the pipeline takes no prompt, or not all of ``call``.
    """

    def __init__(self, pipe: Any, guide: KernelGuidance, call: dict[str, Any]):
        self.pipe, self.guide, self.call = pipe, guide, call
        self.guide.remember = False
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.takes_image_count = "num_images_per_prompt" in parameters
        if "prompt" not in parameters:
            raise SynthesisError(f"{type(pipe).__name__} takes no prompt; synthesis needs a text-to-image pipeline")
        unknown = sorted(k for k in call if k not in parameters)
        if unknown:  # also if it takes **kwargs: diffusers ignores those that it does not know
            raise SynthesisError(f"{type(pipe).__name__} does not take {', '.join(unknown)}")
        self.guidance_seconds = 0.0

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on."""
        device: Any = getattr(self.pipe, "_execution_device", None) or getattr(self.pipe, "device", "cpu")
        return torch.device(device)

    def make(self, batch: list[Sample]) -> GeneratedBatch:
        """Generate the images of a batch.

        Raises:
            SynthesisError: if the pipeline refuses its arguments or returns no images, or if guidance got no samples.
        """
        texts = [sample.job.prompt.text for sample in batch]
        prompts: dict[str, Any] = {"prompt": texts}
        if self.takes_image_count and len(set(texts)) == 1:
            prompts = {"prompt": texts[0], "num_images_per_prompt": len(texts)}
        elif self.takes_image_count:
            prompts |= {"num_images_per_prompt": 1}
        generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
        try:
            result = self.pipe(**{**self.call, **prompts, "generator": generators, "output_type": "pil"})
        except ValueError as error:  # of the pipeline or of guidance: settings that do not fit each other
            raise SynthesisError(str(error)) from error
        images = getattr(result, "images", None)
        if not isinstance(images, list) or len(images) != len(batch) or not isinstance(images[0], Image.Image):
            got = type(result).__name__ if images is None else f"{len(images)} {type(images[0]).__name__}"
            raise SynthesisError(f"{type(self.pipe).__name__} returned {got}; expected {len(batch)} images")
        if not self.guide.finished:
            raise SynthesisError(f"guidance got no finished samples from {type(self.pipe).__name__}; see docs/support.md")
        _, x, prompt_features = self.guide.finished[0]
        self.guidance_seconds += self.guide.report().seconds
        return GeneratedBatch(images, x, prompt_features)

    def prompt_features(self, texts: list[str], batch_size: int) -> Tensor | None:
        """Features of prompts ``[n, p]`` as guidance gets them, by runs of a single step; None if it gets none."""
        parts, guide = [], self.guide
        scales = [term.scale for term in guide.terms]
        call = {**self.call, "num_inference_steps": 1, "output_type": "latent"}
        try:
            for term in guide.terms:
                term.scale = 0.0
            with guide.attach(self.pipe):
                for start in range(0, len(texts), batch_size):
                    part = texts[start : start + batch_size]
                    self.pipe(**{**call, "prompt": part, "generator": [torch.Generator().manual_seed(0) for _ in part]})
                    features = guide.finished[0][2] if guide.finished else None
                    if features is None:
                        return None
                    parts.append(features.float().cpu())
        finally:
            for term, scale in zip(guide.terms, scales, strict=True):
                term.scale = scale
        return torch.cat(parts) if parts else None
