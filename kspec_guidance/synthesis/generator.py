"""Generator: makes one batch of images at a time with a guided pipeline."""

import inspect
import math
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.loop.components import call_parameters
from kspec_guidance.synthesis.errors import RunFailedError, SynthesisError
from kspec_guidance.synthesis.schedule import Job, Sample
from kspec_guidance.utils.arguments import nearest_name

__all__ = ["GeneratedBatch", "Generator", "PipelineCaller", "check_call"]

SET_BY_RUN = (
    "prompt",
    "num_images_per_prompt",
    "num_videos_per_prompt",
    "generator",
    "latents",
    "output_type",
    "return_dict",
)
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")  # arguments that say how many
MAX_LISTED = 16  # seeds, or prompts, of a batch in an error
UNLIMITED = 10**6  # tokens: tokenizers without a limit declare larger numbers


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


def check_call(pipe: Any, call: Mapping[str, Any]) -> None:
    """Check that a pipeline makes images of prompts, and takes these arguments.

    Raises:
        SynthesisError: if the pipeline takes no prompt, or not all of ``call``.
    """
    name, parameters = type(pipe).__name__, call_parameters(type(pipe))
    if "prompt" not in parameters:
        raise SynthesisError(f"{name} takes no prompt; synthesis needs a text-to-image pipeline")
    unknown = sorted(k for k in call if k not in parameters)
    if unknown:  # also if it takes **kwargs: diffusers ignores those that it does not know
        nearest = nearest_name(unknown[0], parameters)
        hint = "" if nearest is None else f"; did you mean {nearest}?"
        raise SynthesisError(f"{name} does not take {', '.join(unknown)}{hint}")
    fixed = [k for k in SET_BY_RUN if k in call]
    if fixed:
        raise SynthesisError(f"{', '.join(fixed)} cannot be set: a run gives them itself, for each batch")
    for key, value in call.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise SynthesisError(f"{key} must be a finite number, got {value}")
        if _is_text_of_prompt(parameters, key) and isinstance(value, list | tuple | bool | int | float):
            raise SynthesisError(f"{key} must be one text, which is given for all images; got {value!r}")


def _is_text_of_prompt(parameters: Mapping[str, inspect.Parameter], name: str) -> bool:
    """Whether an argument of a pipeline is a text for each prompt, or one for all."""
    kind = str(parameters[name].annotation).replace("typing.", "").lower()
    one, several = re.search(r"(?<!list\[)\bstr\b", kind), "list[str]" in kind
    return bool(one and several) or re.fullmatch(r"(negative_)?prompt(_\d+)?", name) is not None


class PipelineCaller:
    """Calls a pipeline for images of texts, from seeds.

    Args:
        pipe: a text-to-image pipeline, or one for videos whose clips have a single frame.
        call: arguments of every pipeline call, such as ``num_inference_steps``. A text for an argument that the pipeline
            takes for each prompt, such as ``negative_prompt``, is given for each prompt of a batch.

    Raises:
        SynthesisError: if the pipeline takes no prompt, or not all of ``call``.
    """

    def __init__(self, pipe: Any, call: dict[str, Any]):
        self.pipe, self.call = pipe, call
        self.parameters = call_parameters(type(pipe))
        self.count = next((n for n in COUNTS if n in self.parameters), None)
        check_call(pipe, call)

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on."""
        device: Any = getattr(self.pipe, "_execution_device", None) or getattr(self.pipe, "device", "cpu")
        return torch.device(device)

    def _arguments(self, texts: Sequence[str]) -> dict[str, Any]:
        """Arguments of a call that makes one image of each text."""
        if self.count is not None and len(set(texts)) == 1:
            return {**self.call, "prompt": texts[0], self.count: len(texts)}
        call = {
            k: [v] * len(texts) if isinstance(v, str) and _is_text_of_prompt(self.parameters, k) else v
            for k, v in self.call.items()
        }
        count = {} if self.count is None else {self.count: 1}
        return {**call, **count, "prompt": list(texts)}

    def images(self, texts: Sequence[str], seeds: Sequence[int], **more: Any) -> list[Image.Image]:
        """One image of each text; ``more`` are further arguments of the call.

        Raises:
            RunFailedError: if the pipeline returns no images, another number of them, or clips of several frames.
        """
        generators, name = [torch.Generator().manual_seed(seed) for seed in seeds], type(self.pipe).__name__
        result = self._call(**self._arguments(texts), generator=generators, output_type="pil", **more)
        images = getattr(result, "images", None)
        if images is None and isinstance(clips := getattr(result, "frames", None), list):
            if any(len(clip) != 1 for clip in clips):
                raise RunFailedError(
                    f"{name} made clips of {len(clips[0])} frames; for images, give the option num_frames=1"
                )
            images = [clip[0] for clip in clips]
        if not isinstance(images, list) or len(images) != len(texts) or not isinstance(images[0], Image.Image):
            got = type(result).__name__ if images is None else f"{len(images)} {type(images[0]).__name__}"
            raise RunFailedError(f"{name} returned {got}; expected {len(texts)} images")
        for key, size in (("height", images[0].height), ("width", images[0].width)):
            if self.call.get(key, size) not in (size, None):
                warnings.warn(
                    f"{key} is {self.call[key]}, but {name} made images of {images[0].width} x {images[0].height}; many "
                    "pipelines need both height and width",
                    stacklevel=2,
                )
        return images

    def _call(self, **arguments: Any) -> Any:
        """What the pipeline returns."""
        return self.pipe(**arguments)

    @contextmanager
    def explained(self, what: str, texts: Sequence[str], seeds: Sequence[int] | None = None) -> Iterator[None]:
        """Turn errors of the pipeline, and of guidance in it, into a :class:`SynthesisError` that names the batch."""
        try:
            yield
        except SynthesisError:
            raise
        except Exception as error:
            found: dict[str, list[str]] = {}
            for k, text in enumerate(texts[:MAX_LISTED]):
                numbers = found.setdefault(text if len(text) <= 60 else text[:57] + "...", [])
                if seeds is not None:
                    numbers.append(str(seeds[k]))
            batch = "; ".join(f"{text!r} with seeds {', '.join(n)}" if n else repr(text) for text, n in found.items())
            more = f"; and {len(texts) - MAX_LISTED} more" if len(texts) > MAX_LISTED else ""
            advice = "; give a smaller batch_size" if isinstance(error, torch.OutOfMemoryError) else ""
            raise RunFailedError(
                f"{type(self.pipe).__name__} failed in {what} of {len(texts)} images ({batch}{more}): "
                f"{type(error).__name__}: {' '.join(str(error).split())}{advice}; finished images are safe, and the same "
                "command continues after them"
            ) from error


class Generator(PipelineCaller):
    """Makes batches of samples with a guided pipeline; nothing is added to the guide's memory.

    Args:
        pipe: a text-to-image pipeline.
        guide: the caller attaches it to the pipeline.
        call: see :class:`PipelineCaller`.
        start_candidates: noises of each image, of which one is chosen by its first prediction.

    Attributes:
        guidance_seconds: time that guidance has taken so far.

    Raises:
        SynthesisError: if the pipeline takes no prompt, or not all of ``call``.
    """

    def __init__(self, pipe: Any, guide: KernelGuidance, call: dict[str, Any], start_candidates: int = 1):
        super().__init__(pipe, call)
        self.guide, self.start_candidates = guide, start_candidates
        self.guide.remember = False
        self.guidance_seconds = 0.0

    def _call(self, **arguments: Any) -> Any:
        if self.start_candidates == 1:
            return super()._call(**arguments)
        return self.guide.choose_start(self.pipe, candidates=self.start_candidates, **arguments).result

    def make(self, batch: list[Sample]) -> GeneratedBatch:
        """Generate the images of a batch.

        Raises:
            RunFailedError: if the pipeline fails or returns no images, with the prompts and seeds of the batch, or if
                guidance got no samples.
        """
        texts, seeds = [sample.job.prompt.text for sample in batch], [sample.seed for sample in batch]
        with self.explained("a batch", texts, seeds):
            images = self.images(texts, seeds)
        if not self.guide.finished:
            raise RunFailedError(f"guidance got no finished samples from {type(self.pipe).__name__}; see docs/support.md")
        _, x, prompt_features = self.guide.finished[0]
        self.guidance_seconds += self.guide.report().seconds
        return GeneratedBatch(images, x, prompt_features)

    def one_step(self, texts: Sequence[str]) -> None:
        """Run a single step without images.

        Raises:
            RunFailedError: if the pipeline fails.
        """
        call = {**self._arguments(texts), "output_type": "latent"}
        if "num_inference_steps" in self.parameters:
            call["num_inference_steps"] = 1
        call.pop("callback_on_step_end", None)
        with self.explained("one step", texts):
            self.pipe(**call, generator=[torch.Generator().manual_seed(0) for _ in texts])

    def check_mixed(self, jobs: Sequence[Job], batch_size: int, screened: bool) -> None:
        """Run one step of a batch of two prompts, if the run will have such batches.

        Args:
            jobs: of this process.
            batch_size: images in a batch.
            screened: whether images may be dropped, so that any prompt may end with a part of a batch.

        Raises:
            SynthesisError: if the pipeline fails for two prompts at once, but not for one.
        """
        left = [job for job in jobs if not job.finished]
        if batch_size == 1 or not any(screened or (job.goal - job.kept) % batch_size for job in left[:-1]):
            return
        texts = [left[k % 2].prompt.text for k in range(batch_size)]
        try:
            self.one_step(texts)
        except SynthesisError as error:
            try:
                self.one_step(texts[:1] * batch_size)
            except SynthesisError:
                return  # not a matter of two prompts: the first batch will tell, with all its steps
            raise SynthesisError(f"this run needs batches of several prompts, and {error}") from error

    def prompt_features(self, texts: list[str], batch_size: int) -> Tensor | None:
        """Features of prompts ``[n, p]`` as guidance gets them, by runs of a single step; None if it gets none."""
        parts, guide = [], self.guide
        scales = [term.scale for term in guide.terms]
        try:
            for term in guide.terms:
                term.scale = 0.0
            with guide.attach(self.pipe):
                for start in range(0, len(texts), batch_size):
                    self.one_step(texts[start : start + batch_size])
                    features = guide.finished[0][2] if guide.finished else None
                    if features is None:
                        return None
                    parts.append(features.float().cpu())
        finally:
            for term, scale in zip(guide.terms, scales, strict=True):
                term.scale = scale
        return torch.cat(parts) if parts else None

    def count_cut(self, texts: Sequence[str]) -> tuple[int, int]:
        """How many texts all tokenizers of the pipeline cut, and the number of tokens that the longest one keeps."""
        from transformers import PreTrainedTokenizerBase

        limits = {}
        for tokenizer in getattr(self.pipe, "components", {}).values():
            if isinstance(tokenizer, PreTrainedTokenizerBase):
                limit = tokenizer.model_max_length
                if "max_sequence_length" in self.parameters and "CLIP" not in type(tokenizer).__name__:
                    default = self.parameters["max_sequence_length"].default
                    limit = self.call.get("max_sequence_length") or (default if isinstance(default, int) else limit)
                limits[limit] = tokenizer
        if not limits or max(limits) > UNLIMITED:
            return 0, 0
        limit = max(limits)
        long = [text for text in texts if len(text.encode()) + 2 > limit]  # a token has one byte or more
        rows = limits[limit](long, truncation=True, max_length=limit + 1)["input_ids"] if long else []
        return sum(len(row) > limit for row in rows), limit
