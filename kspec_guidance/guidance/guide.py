"""KernelGuidance: guides a diffusers pipeline with the gradients of kernel objectives."""

import copy
import math
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ClassVar, TypeVar, cast

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from kspec_guidance.guidance.comparison import GuidanceComparison, PlainRun, RepeatedCall
from kspec_guidance.guidance.config import SETTINGS_FORMAT, decode_terms, encode, read_config, write_config
from kspec_guidance.guidance.existing import remember_latents
from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.guidance.run import Finished, Run, ascent_direction
from kspec_guidance.guidance.spaces import FeatureSpace
from kspec_guidance.guidance.start import StartChoice, choose_start
from kspec_guidance.guidance.targets import VarietyTarget
from kspec_guidance.guidance.term import Term, usual_transforms
from kspec_guidance.kernels import l2_normalize
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.loop.attachment import Attachment, StepwiseAttachment
from kspec_guidance.loop.callers import pipeline_of
from kspec_guidance.loop.components import find_scheduler
from kspec_guidance.loop.context import CallContext
from kspec_guidance.loop.latents import encode_reference
from kspec_guidance.loop.prompts import repeat_rows
from kspec_guidance.loop.starts import has_starts
from kspec_guidance.memory import Memory, MemoryBank
from kspec_guidance.objectives import Objective
from kspec_guidance.utils.arguments import is_integer, unknown_arguments

__all__ = ["KernelGuidance"]

Guide = TypeVar("Guide", bound="KernelGuidance")
HINTS = {  # suggestions for unknown arguments
    "strength": "scale",
    "guidance_scale": "scale",
    "weight": "scale",
    "eta": "scale",
    "chain": "transforms",
    "features": "feature_map",
    "prompt_features": "prompt_feature_map",
    "bandwidth": "set the bandwidth of the kernel: kernel=GaussianKernel(bandwidth)",
    "order": "SPARKE is conditional RKE, of order 2; for another order use VendiGuidance(order=...)",
}


class KernelGuidance(PipelineCallback):
    """Guide a diffusers pipeline with kernel objectives.

    Use it in any of these ways::

        with guide.attach(pipe):                       # any pipeline that calls scheduler.step
            images = pipe("runner", num_images_per_prompt=8).images
        pipe("runner", callback_on_step_end=guide)     # any pipeline with callbacks; guided from the second step on
        guided(type(pipe))(**pipe.components)("runner", kspec_guidance=guide)   # as an argument of the call

    The important arguments are ``objective`` and ``scale``; the others are for tuning, see :class:`Term`.
    ``guide + other`` applies both in one pass. Finished samples are added to ``guide.memory``, once per image; with
    ``guide.remember = False`` they are only listed in ``guide.finished``, and the caller adds those to keep.

    Images of one batch repel or attract each other, so an image depends on the whole batch and on the memory, not only on
    its seed; the same seeds in the same order with the same memory give the same images.

    Subclasses are registered by name, so that settings saved by :meth:`save_config` load as the class that saved them.

    Args:
        objective: an :class:`~kspec_guidance.objectives.Objective`.
        scale, space, start, stop, every, sigma_interval, transforms, memory: see :class:`Term`.
        unit, target, ease_cfg, recall, cfg_share, apart: likewise.
        seed: seed of the noise that separates exact duplicates; the global random state is not used.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for settings outside their ranges.
    """

    _registry: ClassVar[dict[str, type["KernelGuidance"]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        KernelGuidance._registry[cls.__name__] = cls

    def __init__(
        self,
        objective: Objective,
        scale: float,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 1.0,
        every: int = 1,
        sigma_interval: tuple[float, float] | None = None,
        transforms: Sequence[str] | None = None,
        memory: Memory | None = None,
        seed: int = 0,
        *,
        unit: str = "norm",
        target: VarietyTarget | None = None,
        ease_cfg: float | None = None,
        recall: str = "all",
        cfg_share: float | None = None,
        apart: float | None = None,
        **unknown: Any,
    ):
        if unknown:
            raise unknown_arguments(type(self), unknown, HINTS)
        term = Term(
            objective, scale, space, start, stop, every, sigma_interval, transforms, memory, unit, target, ease_cfg,
            recall, cfg_share, apart,
        )  # fmt: skip
        self._set_up([term], seed)

    @classmethod
    def from_terms(cls: type[Guide], terms: Sequence[Term], seed: int = 0) -> Guide:
        """Create a guide from terms, without the defaults of the class.

        A subclass that sets attributes in ``__init__`` must set them here as well.

        Raises:
            ValueError: if there are no terms.
        """
        guide = cls.__new__(cls)
        guide._set_up(terms, seed)
        return guide

    def _set_up(self, terms: Sequence[Term], seed: int) -> None:
        super().__init__()
        if not terms:
            raise ValueError("a guide needs at least one term")
        if not is_integer(seed):
            raise ValueError(f"seed must be an integer, got {seed!r}")
        self.terms, self.seed = list(terms), int(seed)
        self.remember = True  # whether finished samples are added to the memory
        self.calibration: float | None = None  # factor of variety; None: that of the user's calibration file, or 1
        self._run = Run(self)

    # -- memory and results ------------------------------------------------------------------------------------------

    @property
    def memory(self) -> Any:
        """The memory of the first term: the earlier samples that new ones are compared with."""
        return self.terms[0].memory

    @property
    def memories(self) -> list[Memory]:
        """All distinct memories."""
        return list({id(term.memory): term.memory for term in self.terms}.values())

    @property
    def finished(self) -> list[Finished]:
        """Finished samples of the last run: memory, features and prompts."""
        return self._run.finished

    def report(self) -> GuidanceReport:
        """The report of the last run, a :class:`~kspec_guidance.guidance.report.GuidanceReport`."""
        return self._run.report

    def gradient(self, x: Tensor, prompt_features: Tensor | None = None) -> Tensor:
        """The ascent direction of the objective at ``x``, given the memory, before any scaling or projection.

        Args:
            x: samples ``[n, ...]``, or their features in the guide's space, in the shape of memory entries.
            prompt_features: ``[n, p]``, or one row per group of consecutive samples; scaled to norm 1 here.

        Raises:
            ValueError: for NaN, too few dimensions, or prompt features that do not match.
        """
        if not isinstance(x, Tensor) or x.ndim < 2 or not len(x):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor [n, ...] with at least one sample, got {got}")
        if not torch.isfinite(x).all():
            raise ValueError("x contains NaN or infinite values")
        with torch.no_grad():
            prompts = None
            if prompt_features is not None:
                prompts = repeat_rows(l2_normalize(prompt_features.detach().float().to(x.device)), len(x))
            for memory in self.memories:
                if len(memory) and memory.shape is not None and math.prod(memory.shape) != x[0].numel():
                    raise ValueError(
                        f"memory holds features of shape {memory.shape}, got {tuple(x.shape[1:])}; "
                        "use a separate memory per resolution, or clear() it"
                    )
            rows, total = as_float(x).flatten(1), torch.zeros_like(as_float(x).flatten(1))
            for term in (term.for_numbers(rows.shape[1]) for term in self.terms):
                g, found = ascent_direction(term.objective, rows, prompts, term.memory)
                if found.coincident is not None and bool(found.coincident.any()):
                    g = ascent_direction(term.objective, rows, prompts, term.memory, seed=self.seed * 1_000_003)[0]
                total = total + g
            return total.view(x.shape).to(x.dtype)

    def __add__(self, other: "KernelGuidance") -> "KernelGuidance":
        """Combine both guides in one pass; an empty exact memory is replaced by the first exact memory of its space."""
        if not isinstance(other, KernelGuidance):
            return NotImplemented
        terms = [copy.copy(term) for term in (*self.terms, *other.terms)]
        shared: dict[Any, Memory] = {}
        for term in terms:
            if isinstance(term.memory, MemoryBank):
                first = shared.setdefault(term.space, term.memory)
                term.memory = term.memory if len(term.memory) else first
        both = KernelGuidance.from_terms(terms, self.seed)
        both.calibration = self.calibration
        return both

    def __repr__(self) -> str:
        settings = " + ".join(term.settings for term in self.terms)
        memories = " and ".join(f"{type(m).__name__} with {len(m)} entries" for m in self.memories)
        found = self._run.attachment
        where = f"attached to {type(found.pipe).__name__}" if isinstance(found, Attachment) else "not attached"
        return f"{type(self).__name__}({settings}; {memories}; {where})"

    def compare(self, pipe: Any, *args: Any, **call: Any) -> GuidanceComparison:
        """Run one call of a pipeline twice, plainly and with this guide, from the same noise.

            comparison = guide.compare(pipe, "runner", num_images_per_prompt=8)
            print(comparison.report)  # how many different images, plain beside guided
            comparison.grid().save("comparison.png")

        Both runs begin with copies of the generators in ``generator=``, which do not advance; without one, with a seed that
        is drawn from the global random state and kept in ``comparison.seed``. The guide's memory is used by the guided run
        alone, whose images are added to it, as in any guided call. The guide may be attached to the pipeline; it is then
        attached afterwards as well.

        Args:
            pipe: a pipeline, classic or modular.
            *args: positional arguments of the pipeline's call.
            **call: named arguments of the pipeline's call.

        Raises:
            TypeError: if ``pipe`` is no pipeline, ``generator`` no generator, or for arguments that the pipeline refuses.
            ValueError: for a guide among the arguments, or as :meth:`attach`.
            UnsupportedSchedulerError: as :meth:`attach`.
        """
        given = [k for k, value in call.items() if k == "kspec_guidance" or isinstance(value, KernelGuidance)]
        if given:
            raise ValueError(f"compare() guides the call itself: leave {given[0]}= out; `guide + other` combines guides")
        repeated = RepeatedCall(pipe, args, call, self)
        found = self._run.attachment
        attached = isinstance(found, Attachment) and found.pipe is pipe
        with nullcontext() if attached else self.attach(pipe):
            attachment = self._run.attachment
            plain = PlainRun(self._run.needs_denoiser_call)
            with attachment.handled_by(plain):
                plain_result = repeated()
            with attachment.handled_by(self._run):
                guided_result = repeated()
        self.report().finished_plain = plain.finished
        return GuidanceComparison(plain_result, guided_result, self.report(), repeated)

    def choose_start(self, pipe: Any, *args: Any, candidates: int = 4, **call: Any) -> StartChoice:
        """Run one guided call of a pipeline from start noises that are chosen by their first predictions.

            found = guide.choose_start(pipe, "runner", candidates=4, num_images_per_prompt=4, num_inference_steps=1)
            found.result.images

        Each image gets ``candidates`` noises. The denoiser makes its first prediction of each, and for one image after the
        other that noise is kept with which the objective is largest, given the memory and the images before. Then the call
        runs from these noises, guided. This is for samplers of one to four steps, where guidance between steps has little
        room, and for images made one by one with a memory; it costs ``candidates`` denoiser calls, and prompts are encoded
        as many times (give ``prompt_embeds`` to avoid that). Noises are those of the call's generators and others that they
        determine, and an image alone keeps its own while the memory is empty; the generators are left as an ordinary call
        leaves them. Objective, memory and space are those of the guide's first term; of scale 0 it chooses and moves
        nothing.

        Args:
            pipe: a pipeline with a method ``prepare_latents``, or a modular one whose steps are blocks of a loop.
            *args: positional arguments of the pipeline's call.
            candidates: number of noises for each image, at least 1: then the call is an ordinary one.
            **call: named arguments of the pipeline's call.

        Raises:
            TypeError: if ``pipe`` is no pipeline, ``generator`` no generator, or for arguments that the pipeline refuses.
            ValueError: for fewer than one candidate, given ``latents``, a space whose features are not comparable from step
                to step, or a pipeline of another kind or without ``generator``; and as :meth:`attach`.
            UnsupportedSchedulerError: as :meth:`attach`.
        """
        if not is_integer(candidates, 1):
            raise ValueError(f"candidates must be an integer of at least 1, got {candidates!r}")
        if call.get("latents") is not None:
            raise ValueError("choose_start() draws the noises itself: leave latents= out")
        if self.terms[0].space.step_by_step:
            raise ValueError(
                f"choose_start() compares first predictions with finished samples, and features of "
                f"space={self.terms[0].space.name!r} differ from step to step; use space='x0', 'pooled' or 'pixels'"
            )
        repeated = RepeatedCall(pipe, args, call, self, "choose_start")
        if not has_starts(pipe) or repeated.kwargs.get("generator") is None:
            raise ValueError(
                "choose_start() replaces the noises of prepare_latents(generator=...), or of a modular pipeline whose "
                f"steps are blocks of a loop, and {type(pipe).__name__} has neither; choose the latents yourself and "
                "give latents="
            )
        found = self._run.attachment
        attached = isinstance(found, Attachment) and found.pipe is pipe
        with nullcontext() if attached else self.attach(pipe):
            return choose_start(self, self._run.attachment, repeated, candidates)

    def remember_images(self, pipe: Any, images: Any, *args: Any, **call: Any) -> int:
        """Add images that exist already to the memory, as if this call had made them: later images differ from them.

            guide.remember_images(pipe, images, "runner", num_images_per_prompt=8, num_inference_steps=30)
            with guide.attach(pipe):
                more = pipe("runner", num_images_per_prompt=8, num_inference_steps=30).images

        The call runs once without guidance and without the decoder, with each prediction of x0 replaced by the encoded
        images: the denoiser sees them at the noise level of each step. So prompts are read as in any call, and memories of
        the spaces ``block``, ``context`` and ``activations`` get a row for each guided step. Steps and guidance must be
        those of later calls.

        Args:
            pipe: a pipeline with an autoencoder.
            images: a folder, PIL images, or a tensor in -1..1, see :func:`~kspec_guidance.encode_reference`.
            *args: positional arguments of the pipeline's call.
            **call: its named arguments, as for making so many images of these prompts.

        Returns:
            The number of images.

        Raises:
            TypeError: if ``pipe`` is no pipeline, ``generator`` no generator, or for arguments that the pipeline refuses.
            ValueError: if the images cannot be encoded, or if the call would make another number of images, or images of
                another size; and as :meth:`attach`.
            UnsupportedSchedulerError: as :meth:`attach`.
        """
        repeated = RepeatedCall(pipe, args, call, self, "remember_images")
        size = repeated.kwargs.get("height"), repeated.kwargs.get("width")
        given = not isinstance(images, Tensor) and all(isinstance(side, int) for side in size)
        latents = encode_reference(pipe, images, size=cast(tuple[int, int], size) if given else None)
        if "output_type" in repeated.accepted:
            repeated.kwargs["output_type"] = "latent"
        found = self._run.attachment
        attached = isinstance(found, Attachment) and found.pipe is pipe
        with nullcontext() if attached else self.attach(pipe):
            remember_latents(self, self._run.attachment, repeated, latents)
        return len(latents)

    # -- attachment to a pipeline ------------------------------------------------------------------------------------

    def attach(self, pipe: Any, scheduler: str | None = None) -> AbstractContextManager["KernelGuidance"]:
        """Attach the guide to ``pipe`` (or a bare scheduler) until the ``with`` block ends, or until :meth:`detach`.

        Only calls of this pipeline are guided, also if other pipelines share its scheduler. Attaching the same guide again
        has no effect; of nested blocks the outermost detaches. After the block, or an exception in it, the pipeline is
        restored; if other code has wrapped ``scheduler.step`` since, its wrapper stays, without guidance.

        Args:
            pipe: a pipeline, classic or modular, or a scheduler.
            scheduler: name of the scheduler component to hook, for pipelines with several schedulers.

        Raises:
            UnsupportedSchedulerError: if the pipeline has no supported scheduler.
            ValueError: if another guide is attached to this pipeline, or this guide to another pipeline.
        """
        attachment = self._run.attachment
        if not isinstance(attachment, Attachment) or attachment.pipe is not pipe:
            self._check_free()
            self.detach()
            run = Run(self)
            run.attachment = Attachment(pipe, run, self, scheduler)
            self._run = run
        return self._attached()

    @contextmanager
    def _attached(self) -> Iterator["KernelGuidance"]:
        attachment = self._run.attachment
        attachment.blocks += 1
        try:
            yield self
            attachment.end_block()
        finally:
            attachment.blocks -= 1
            if not attachment.blocks and self._run.attachment is attachment:
                self.detach()

    def _check_free(self) -> None:
        """Check that the guide is not used by another pipeline.

        Raises:
            ValueError: if it is attached to one.
            RuntimeError: if it is the callback of a call in progress.
        """
        found = self._run.attachment
        advice = "use one guide for each pipeline, with memory=guide.memory to share the memory"
        if isinstance(found, Attachment):
            raise ValueError(f"this guide is attached to a {type(found.pipe).__name__}; detach() it first, or {advice}")
        if found is not None and found.in_progress():
            raise RuntimeError(f"this guide is used by a call of a {type(found.pipe).__name__} in progress; {advice}")

    def detach(self) -> None:
        """Remove all hooks, if any. Memory and report are kept."""
        if self._run.attachment is not None:
            self._run.attachment.remove()
            self._run.attachment = None

    @property
    def tensor_inputs(self) -> list[str]:
        """Names of the tensors that a callback needs: none. Many pipelines read this when a call with a callback begins.

        The guide then observes the call, as in :meth:`attach`, since callbacks are called after the prompts were encoded.
        """
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") == "diffusers.callbacks":
            frame = frame.f_back
        pipe = pipeline_of(frame)
        if pipe is not None and not self._is_attached_to(pipe):
            self._stepwise(pipe).observe()
        return []

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """The ``callback_on_step_end`` of diffusers: hooks the *next* step only, so that no hook remains after a run.

        A callback runs after its step and without the model output, so guidance begins at the second step. An attached
        guide ignores the callback, so no step is guided twice. Pipelines that do not read :attr:`tensor_inputs` hide their
        prompts from callbacks: a warning says so, and all images count as images of one prompt.
        """
        if self._is_attached_to(pipeline):
            return callback_kwargs
        total = getattr(pipeline, "num_timesteps", None) or len(find_scheduler(pipeline).timesteps)
        new = self._run.attachment is None or self._run.attachment.pipe is not pipeline
        stepwise = self._stepwise(pipeline)
        if step_index == 0 or new:
            stepwise.begin_call()
        if step_index + 1 < total:
            stepwise.before_step(step_index + 1, total)
        else:
            stepwise.remove()
        return callback_kwargs

    def before_step(self, pipeline: Any, step_index: int, total: int, given: dict[str, Any] | CallContext) -> None:
        """Guide the next scheduler step only; called by a block in a denoising loop, or by a guider.

        Args:
            pipeline: a pipeline with a ``scheduler``, or a scheduler.
            step_index: index of the step.
            total: number of steps.
            given: prompt embeddings and ``latents`` by name, if available, or what is known of the call; read at its first
                step.
        """
        if not self._is_attached_to(pipeline):
            stepwise = self._stepwise(pipeline)
            if step_index == 0 or not stepwise.in_pass():
                stepwise.begin_call(given)
            stepwise.before_step(step_index, total)

    def _is_attached_to(self, pipeline: Any) -> bool:
        attachment = self._run.attachment
        return isinstance(attachment, Attachment) and attachment.serves(pipeline)

    def _stepwise(self, pipeline: Any) -> StepwiseAttachment:
        """The attachment for single steps of a pipeline."""
        found = self._run.attachment
        if not isinstance(found, StepwiseAttachment) or found.pipe is not pipeline:
            self._check_free()
            self.detach()
            self._run = Run(self)
            found = self._run.attachment = StepwiseAttachment(pipeline, self._run, self)
        return found

    # -- settings ----------------------------------------------------------------------------------------------------

    def to_config(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All settings, ready for JSON, and the tensors that they refer to; the memory is not included.

        Raises:
            TypeError: for a user-defined kernel or objective, or a space whose settings cannot be saved.
        """
        tensors: dict[str, Tensor] = {}
        names = ("scale", "unit", "start", "stop", "every", "sigma_interval", "transforms", "objective")
        terms = [
            {name: encode(getattr(term, name), tensors) for name in names} | {"space": term.space.describe()}
            for term in self.terms
        ]
        for term, settings in zip(self.terms, terms, strict=True):
            if term.target is not None:
                settings["target"] = encode(term.target, tensors)
            if term.ease_cfg is not None:
                settings["ease_cfg"] = term.ease_cfg
            if term.cfg_share is not None:
                settings["cfg_share"] = term.cfg_share
            if term.apart is not None:
                settings["apart"] = term.apart
            if term.recall != "all":
                settings["recall"] = term.recall
            if term.own_transforms and term.transforms == usual_transforms(term.apart):
                settings["own_transforms"] = True
        config = {"format": SETTINGS_FORMAT, "guide": type(self).__name__, "seed": self.seed, "terms": terms}
        return config | ({} if self.calibration is None else {"calibration": self.calibration}), tensors

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Write the settings into a folder: ``kspec_guidance.json``, and ``kspec_guidance.safetensors`` for tensors."""
        write_config(save_directory, *self.to_config())

    @classmethod
    def from_config(
        cls, config: str | os.PathLike | dict[str, Any], tensors: dict[str, Tensor] | None = None
    ) -> "KernelGuidance":
        """Create a guide from saved settings, of the class that saved them, with an empty memory.

        Args:
            config: the folder, the JSON file, or a dictionary.
            tensors: those that a dictionary refers to, the second result of :meth:`to_config`.

        Raises:
            FileNotFoundError: if there are no settings at this path.
            ValueError: if the settings are damaged or of an unknown class, whose module must be imported first.
        """
        settings, found = read_config(config)
        tensors = found if tensors is None else tensors
        known: dict[str, type[KernelGuidance]] = {"KernelGuidance": KernelGuidance, **cls._registry}
        name, listed = settings.get("guide"), settings.get("terms")
        if not isinstance(listed, list) or not listed or name not in known:
            raise ValueError(
                f"the settings are of guide {name!r} with terms {str(listed)[:60]}; expected one of {', '.join(known)} "
                "with a list of terms; import the module that defines the guide before loading its settings"
            )
        try:
            guide = known[name].from_terms(decode_terms(listed, tensors), int(settings.get("seed", 0)))
            guide.calibration = None if settings.get("calibration") is None else float(settings["calibration"])
            return guide
        except (TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"the settings are damaged: {type(error).__name__}, {error}; restore them from a copy"
            ) from error
