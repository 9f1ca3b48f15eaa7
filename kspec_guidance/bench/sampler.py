"""A pipeline as methods sample from it: images of a prompt from seeds, start noises, and a unit of distance."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance.bench.methods import Method
from kspec_guidance.bench.methods.base import Moment
from kspec_guidance.loop.scheduler_hook import MethodPatch
from kspec_guidance.synthesis.generator import PipelineCaller
from kspec_guidance.synthesis.schedule import image_seed

__all__ = ["Case", "Sampler"]

RADIUS_PROMPTS = 4  # whose plain samples give the unit of distance


@dataclass(frozen=True)
class Case:
    """One prompt, with the seeds of its images."""

    prompt: str
    seeds: tuple[int, ...]

    @staticmethod
    def of(seed: int, index: int, prompt: str, images: int) -> "Case":
        """The images of a prompt: their seeds depend on the run's, the prompt with its index, and their numbers."""
        return Case(prompt, tuple(image_seed(seed, f"{index}/{prompt}", k) for k in range(images)))


class Found(Exception):
    """Stops a call of the pipeline once its start noise is known."""


@dataclass
class LastSample(Method):
    """Plain sampling that keeps the sample after the last step."""

    def after(self, m: Moment, latents: Tensor) -> Tensor:
        self.last = latents
        return latents


class Sampler:
    """Calls a pipeline for methods.

    Args:
        pipe: the pipeline.
        call: arguments of every call.
        images: of each prompt.
        batch_size: images made at once.
        radius_cases: of which plain samples are compared for :meth:`radius_unit`.

    Raises:
        SynthesisError: if the pipeline takes no prompt, or not all of ``call``.
    """

    def __init__(
        self, pipe: Any, call: Mapping[str, Any], images: int, batch_size: int, radius_cases: Sequence[Case] = ()
    ) -> None:
        self.pipe, self.images, self.batch_size = pipe, images, min(batch_size, images)
        self.caller = PipelineCaller(pipe, dict(call))
        self.radius_cases = tuple(radius_cases)[:RADIUS_PROMPTS]
        self._unit: float | None = None

    @property
    def device(self) -> torch.device:
        """The device that the pipeline runs on."""
        return self.caller.device

    def sample(self, method: Method, case: Case) -> list[Image.Image]:
        """The images of a case."""
        method.generator.manual_seed(case.seeds[0] % 2**63)
        return method.sample(self, case)

    def run(self, case: Case, n: int, latents: Tensor | None = None, **more: Any) -> list[Image.Image]:
        """``n`` images of a case from its seeds, or from start noises ``[n, ...]``, as many at once as fit."""
        images: list[Image.Image] = []
        seeds = self._seeds(case, n)
        for start in range(0, n, self.batch_size):
            part = slice(start, start + self.batch_size)
            given = {} if latents is None else {"latents": latents[part]}
            images += self._call(case.prompt, seeds[part], **given, **more)
        return images

    def _call(self, prompt: str, seeds: Sequence[int], **more: Any) -> list[Image.Image]:
        try:
            return self.caller.images([prompt] * len(seeds), seeds, **more)
        except BaseException:
            if hasattr(self.pipe, "maybe_free_model_hooks"):
                self.pipe.maybe_free_model_hooks()  # as at the end of a call: offloaded parts leave the device
            raise

    def _seeds(self, case: Case, n: int) -> tuple[int, ...]:
        """Seeds of ``n`` images: those of the case, and others after them."""
        further = (image_seed(case.seeds[0], case.prompt, k) for k in range(len(case.seeds), n))
        return (*case.seeds[:n], *further)

    def start(self, case: Case, n: int) -> Tensor:
        """Start noises ``[n, ...]`` of the images, in the form in which the pipeline takes them."""
        parts, seeds = [], self._seeds(case, n)
        for start in range(0, n, self.batch_size):
            kept: list[Tensor] = []

            def keep(original: Any, kept: list[Tensor] = kept) -> Any:
                def prepare_latents(*args: Any, **kwargs: Any) -> Any:
                    found = original(*args, **kwargs)
                    kept.append(found[0] if isinstance(found, tuple | list) else found)
                    raise Found

                return prepare_latents

            patch = MethodPatch(self.pipe, "prepare_latents", keep, self)
            try:
                self._call(case.prompt, seeds[start : start + self.batch_size])
            except Found:
                parts.append(kept[0] / getattr(self.pipe.scheduler, "init_noise_sigma", 1.0))
            finally:
                patch.remove()
        return torch.cat(parts)

    def joined(self, parts: list[list[Image.Image]]) -> list[Image.Image]:
        """Images of several runs as those of one."""
        return [image for part in parts for image in part]

    def radius_unit(self) -> float:
        """Median distance of plain samples of one prompt, over the first prompts."""
        if self._unit is None:
            found = []
            for case in self.radius_cases:
                method = LastSample()
                with method.attach(self.pipe):
                    self._call(case.prompt, self._seeds(case, max(2, self.batch_size)))
                rows = method.last.flatten(1).float()
                d = torch.cdist(rows, rows)
                found.append(float(d[~torch.eye(len(d), dtype=torch.bool)].median()))
            self._unit = sum(found) / len(found)
        return self._unit
