"""Generator: a pipeline, asked for one batch at a time."""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.synthesis.jobs import Sample

__all__ = ["Generator", "Made"]


@dataclass(frozen=True)
class Made:
    """A batch: its images, its samples ``[n, ...]`` in the guide's space, and their prompts' features ``[n, p]``."""

    images: list[Image.Image]
    x: Tensor
    t: Tensor | None


class Generator:
    """
    Args:
        pipe: a text-to-image pipeline.
        guide: attached to it by the caller while batches are made.
        call: arguments of every call, such as ``num_inference_steps``.
    """

    def __init__(self, pipe: Any, guide: KernelGuidance, call: dict[str, Any]):
        self.pipe, self.guide, self.call = pipe, guide, call
        self.guide.remember = False
        parameters = inspect.signature(type(pipe).__call__).parameters
        self.takes_number = "num_images_per_prompt" in parameters
        if "prompt" not in parameters:
            raise SynthesisError(f"{type(pipe).__name__} takes no prompt; synthesis needs a text-to-image pipeline")
        unknown = sorted(k for k in call if k not in parameters)
        if unknown:  # also where it takes any keyword: diffusers ignores those that it does not know
            raise SynthesisError(f"{type(pipe).__name__} does not take {', '.join(unknown)}")
        self.guidance_seconds = 0.0

    @property
    def device(self) -> torch.device:
        place: Any = getattr(self.pipe, "_execution_device", None) or getattr(self.pipe, "device", "cpu")
        return torch.device(place)

    def make(self, batch: list[Sample]) -> Made:
        """
        Raises:
            SynthesisError: if the pipeline returns something else than images, or was not seen to work.
        """
        texts = [sample.job.prompt.text for sample in batch]
        wanted: dict[str, Any] = {"prompt": texts}
        if self.takes_number and len(set(texts)) == 1:
            wanted = {"prompt": texts[0], "num_images_per_prompt": len(texts)}
        elif self.takes_number:
            wanted |= {"num_images_per_prompt": 1}
        generators = [torch.Generator().manual_seed(sample.seed) for sample in batch]
        try:
            result = self.pipe(**{**self.call, **wanted, "generator": generators, "output_type": "pil"})
        except ValueError as error:  # of the pipeline or of guidance: settings that do not fit each other
            raise SynthesisError(str(error)) from error
        images = getattr(result, "images", None)
        if not isinstance(images, list) or len(images) != len(batch) or not isinstance(images[0], Image.Image):
            got = type(result).__name__ if images is None else f"{len(images)} {type(images[0]).__name__}"
            raise SynthesisError(f"{type(self.pipe).__name__} returned {got}; expected {len(batch)} images")
        if not self.guide.finished:
            raise SynthesisError(f"guidance saw no finished samples in {type(self.pipe).__name__}; see docs/support.md")
        _, x, t = self.guide.finished[0]
        self.guidance_seconds += self.guide.report().seconds
        return Made(images, x, t)

    def prompt_features(self, texts: list[str], batch: int) -> Tensor | None:
        """Features of prompts ``[n, p]`` as the guide sees them, by runs of a single step; None if it sees none."""
        found, guide = [], self.guide
        scales = [term.scale for term in guide.terms]
        short = {**self.call, "num_inference_steps": 1, "output_type": "latent"}
        try:
            for term in guide.terms:
                term.scale = 0.0
            with guide.attach(self.pipe):
                for start in range(0, len(texts), batch):
                    part = texts[start : start + batch]
                    self.pipe(**{**short, "prompt": part, "generator": [torch.Generator().manual_seed(0) for _ in part]})
                    t = guide.finished[0][2] if guide.finished else None
                    if t is None:
                        return None
                    found.append(t.float().cpu())
        finally:
            for term, scale in zip(guide.terms, scales, strict=True):
                term.scale = scale
        return torch.cat(found) if found else None
