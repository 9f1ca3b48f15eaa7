"""KernelGuidance: when, where and how strongly an objective's gradient moves the samples of a running pipeline."""

import copy
import math
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from diffusers.callbacks import PipelineCallback
from torch import Tensor

from kspec_guidance.guidance.config import FORMAT, decode, encode, read_config, write_config
from kspec_guidance.guidance.report import GuidanceReport
from kspec_guidance.guidance.run import Run, jitter
from kspec_guidance.guidance.spaces import Activations, FeatureSpace, Scene
from kspec_guidance.guidance.term import DEFAULT_CHAIN, Term
from kspec_guidance.loop.components import find_scheduler
from kspec_guidance.loop.layouts import Layout
from kspec_guidance.loop.observer import CallWatch, DenoiserWatch, PromptWatch
from kspec_guidance.loop.prediction import predict
from kspec_guidance.loop.prompts import condition_of, masked_mean
from kspec_guidance.loop.scheduler_hook import SchedulerHook, ThreadOwner
from kspec_guidance.memory import Memory, MemoryBank
from kspec_guidance.objectives import Objective

__all__ = ["DEFAULT_CHAIN", "KernelGuidance", "Term"]


class KernelGuidance(PipelineCallback):
    """Guide a diffusers pipeline by kernel objectives. Use it in any of these ways::

        with guide.attach(pipe):                       # any pipeline that calls scheduler.step
            images = pipe("runner", num_images_per_prompt=8).images
        pipe("runner", callback_on_step_end=guide)     # any pipeline with callbacks; guided from the second step on
        guided(type(pipe))(**pipe.components)("runner", kspec_guidance=guide)   # as an argument of the call

    The important arguments are ``objective`` and ``scale``; those to tinker with are the rest, see :class:`Term`.
    ``guide + other`` guides by both in one pass. Finished samples go into ``guide.memory``, once for each image; with
    ``guide.remember = False`` they are only listed in ``guide.finished``, for the caller to add what is to be kept.

    Images of one batch repel or attract each other, so an image depends on the whole batch and on the memory, not on its
    own seed alone; the same seeds in the same order with the same memory give the same images.

    Args:
        objective: an :class:`~kspec_guidance.objectives.Objective`.
        scale, space, start, stop, every, sigma_interval, chain, memory: see :class:`Term`.
        seed: of the noise that separates exact duplicates; the global random state is never used.
        terms: several terms instead of one objective.

    Raises:
        ValueError: for settings outside their ranges.
    """

    tensor_inputs = ["latents", "prompt_embeds"]

    def __init__(
        self,
        objective: Objective | None = None,
        scale: float = 0.3,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 1.0,
        every: int = 1,
        sigma_interval: tuple[float, float] | None = None,
        chain: Sequence[str] = DEFAULT_CHAIN,
        memory: Memory | None = None,
        seed: int = 0,
        *,
        terms: Sequence[Term] | None = None,
    ):
        super().__init__()
        if (objective is None) == (terms is None):
            raise ValueError("give either an objective or terms")
        if terms is None:
            assert objective is not None
            terms = [Term(objective, scale, space, start, stop, every, sigma_interval, tuple(chain), memory)]
        self.terms, self.seed = list(terms), seed
        self._run: Run | None = None
        self._inside: ThreadOwner | None = None  # of the run in progress, during its steps too
        self._prompts: Tensor | None = None
        self._encoder: str | None = None
        self._asked: int | None = None  # images or clips that the pipeline makes noise for
        self._size: tuple[int, int] | None = None  # their height and width
        self._open = True  # whether prompts may still be read for the call at hand
        self._hooks: list[Any] = []
        self._pipe: Any = None
        self._scene_pipe: Any = None  # of a call that is guided without being attached
        self._sees_start = self._labels_first = self._ask_denoiser = False
        self._call: tuple[Any, dict[str, Any]] | None = None
        self._report = GuidanceReport()
        self.remember = True  # whether finished samples go into the memory by themselves
        self.finished: list[tuple[Memory, Tensor, Tensor | None]] = []  # what the last run made: memory, features, prompts

    # -- the pieces a user touches ---------------------------------------------------------------------------------

    @property
    def memory(self) -> Any:
        """The (first) memory: what later images are kept away from, or counted with."""
        return self.terms[0].memory

    @property
    def memories(self) -> list[Memory]:
        """All distinct memories."""
        return list({id(t.memory): t.memory for t in self.terms if t.memory is not None}.values())

    def __add__(self, other: "KernelGuidance") -> "KernelGuidance":
        """Both guides' objectives in one pass; exact memories of one space are shared, the first one's entries counting."""
        if not isinstance(other, KernelGuidance):
            return NotImplemented
        terms = [copy.copy(t) for t in (*self.terms, *other.terms)]
        shared: dict[Any, Memory] = {}
        for term in terms:
            if isinstance(term.memory, MemoryBank):
                first = shared.setdefault(term.space, term.memory)
                term.memory = term.memory if len(term.memory) else first
        return KernelGuidance(terms=terms, seed=self.seed)

    def gradient(self, x: Tensor, prompt_features: Tensor | None = None) -> Tensor:
        """The ascent direction on the objective at ``x``, given the memory, before any scaling or projection.

        Args:
            x: samples ``[n, ...]``, or whatever the guide's space makes of them: features as the memory holds them.
            prompt_features: ``[n, p]``; normalised here to norm 1.

        Raises:
            ValueError: for NaN, too few dimensions, or prompt features that do not match.
        """
        if not isinstance(x, Tensor) or x.ndim < 2 or not len(x):
            got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
            raise ValueError(f"x must be a tensor [n, ...] of at least one sample, got {got}")
        if not torch.isfinite(x).all():
            raise ValueError("x holds NaN or infinite values")
        with torch.no_grad():
            t = None if prompt_features is None else self._match(masked_mean(prompt_features, None).to(x.device), len(x))
            for memory in self.memories:
                if len(memory) and memory.shape is not None and math.prod(memory.shape) != x[0].numel():
                    raise ValueError(
                        f"memory holds features of shape {memory.shape}, got {tuple(x.shape[1:])}; "
                        "use a separate memory per resolution, or clear() it"
                    )
            apart = jitter(x, 0, self.seed)
            return torch.stack([term.gradient(x, t, apart) for term in self.terms]).sum(0).to(x.dtype)

    def to_config(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """All settings, ready for JSON, and the tensors they name; the memory is not among them.

        Raises:
            TypeError: for a kernel, objective or space that is not this package's own.
        """
        tensors: dict[str, Tensor] = {}
        terms = []
        for term in self.terms:
            said = {
                k: encode(getattr(term, k), tensors) for k in ("scale", "start", "stop", "every", "sigma_interval", "chain")
            }
            terms.append(said | {"objective": encode(term.objective, tensors), "space": term.feature_space.describe()})
        return {"format": FORMAT, "guide": type(self).__name__, "seed": self.seed, "terms": terms}, tensors

    def save_config(self, save_directory: str | os.PathLike) -> None:
        """Write the settings into a folder: ``kspec_guidance.json``, and ``kspec_guidance.safetensors`` for references."""
        write_config(save_directory, *self.to_config())

    @classmethod
    def from_config(cls, config: str | os.PathLike | dict[str, Any]) -> "KernelGuidance":
        """A guide of saved settings, with an empty memory of its own.

        Args:
            config: the folder, the JSON file, or a dictionary.

        Raises:
            FileNotFoundError, ValueError: if there is nothing of the kind, naming what was found.
        """
        from kspec_guidance.guidance import presets

        said, tensors = read_config(config)
        known = {c.__name__: c for c in (KernelGuidance, presets.SPARKE, presets.MMDGuidance, presets.NoveltyGuidance)}
        listed = said.get("terms")
        if not isinstance(listed, list) or not listed or said.get("guide") not in known:
            raise ValueError(
                f"the settings name guide {said.get('guide')!r} with terms {str(listed)[:60]}; expected one of "
                f"{', '.join(known)} with a list of terms"
            )
        try:
            terms = []
            for term in listed:
                settings = {k: decode(v, tensors) for k, v in term.items() if k != "space"}
                terms.append(Term(space=decode({"space": term["space"]}, tensors), **settings))
            guide = object.__new__(known[said["guide"]])
            KernelGuidance.__init__(guide, terms=terms, seed=int(said.get("seed", 0)))
        except (TypeError, KeyError, AttributeError, RuntimeError, OverflowError) as error:
            raise ValueError(
                f"the settings are damaged: {type(error).__name__}, {error}; restore them from a copy"
            ) from error
        return guide

    @staticmethod
    def preset(name: str, **more: Any) -> "KernelGuidance":
        """A guide by the name of its purpose: ``default``, ``safe``, ``vivid``, ``few-step`` or ``published``.

        What each buys and costs was measured side by side with other methods: docs/which-method.md.

        Args:
            more: settings of :class:`~kspec_guidance.guidance.presets.SPARKE` that take the place of the preset's.

        Raises:
            ValueError: for another name; the message lists those there are.
        """
        from kspec_guidance.guidance.presets import make_preset

        return make_preset(name, **more)

    def report(self) -> GuidanceReport:
        """What the last run did: see :class:`~kspec_guidance.guidance.report.GuidanceReport`."""
        return self._report

    def attach(self, pipe: Any, scheduler: str | None = None) -> AbstractContextManager["KernelGuidance"]:
        """Hook ``pipe`` (or a bare scheduler) until the ``with`` block ends, or until :meth:`detach`.

        Attaching the same guide twice is harmless. After the block, or an exception in it, the pipeline is untouched.

        Args:
            pipe: a pipeline, classic or modular, or a scheduler.
            scheduler: the name of the component to hook, for pipelines with several.

        Raises:
            UnsupportedSchedulerError: naming the scheduler and those that are supported.
            ValueError: if another guide is attached to this pipeline.
        """
        if self._pipe is not pipe:
            self.detach()
            self._forget()
            found = find_scheduler(pipe, scheduler)
            self._hooks = [SchedulerHook(found, self._on_step, self, pipe)]
            try:
                if found is not pipe:
                    self._watch(pipe)
            except BaseException:
                self.detach()
                raise
            self._pipe = pipe
        return self._attached()

    def _watch(self, pipe: Any) -> None:
        prompts = PromptWatch(pipe, self._on_prompt, self)
        self._hooks.append(prompts)
        calls = CallWatch(pipe, self._on_start, self._on_count, self._on_end, self)
        self._hooks.append(calls)
        self._sees_start = calls.sees_start
        if not prompts or any(isinstance(term.space, Activations) for term in self.terms):
            self._hooks.append(DenoiserWatch(pipe, self._on_denoise))
        self._ask_denoiser = not prompts

    @contextmanager
    def _attached(self) -> Iterator["KernelGuidance"]:
        try:
            yield self
            self._on_end()
        finally:
            self.detach()

    def detach(self) -> None:
        """Take every hook away; harmless when nothing is attached. Memory and report stay."""
        for hook in reversed(self._hooks):
            hook.remove()
        self._hooks, self._pipe, self._run, self._inside, self._call = [], None, None, None, None
        self._ask_denoiser = False

    # -- the callback way in ---------------------------------------------------------------------------------------

    def callback_fn(self, pipeline: Any, step_index: int, timestep: Any, callback_kwargs: dict[str, Any]) -> dict[str, Any]:
        """diffusers' ``callback_on_step_end``: hooks the *next* step only, so that no hook outlives a run.

        The model output is not among a callback's tensors and the step is already over, so guidance begins at the
        second step. An attached guide ignores the callback: the step is not taken twice.
        """
        if self._pipe is pipeline:
            return callback_kwargs
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        total = getattr(pipeline, "num_timesteps", None) or len(find_scheduler(pipeline).timesteps)
        if step_index == 0:
            self._begin_call(pipeline, callback_kwargs)
        if step_index + 1 < total:
            self._hook_next(pipeline, step_index + 1, total)
        return callback_kwargs

    def before_step(self, pipeline: Any, step_index: int, total: int, tensors: dict[str, Any]) -> None:
        """Guide the scheduler step that comes next, and that one only: what a block in a denoising loop calls.

        Args:
            pipeline: with a ``scheduler``.
            step_index, total: place in the run.
            tensors: ``prompt_embeds`` and ``latents``, where they are known; read at the first step.
        """
        if self._pipe is pipeline:
            return
        for hook in self._hooks:
            hook.remove()
        if step_index == 0:
            self._begin_call(pipeline, tensors)
        self._hook_next(pipeline, step_index, total)

    def _begin_call(self, pipeline: Any, tensors: dict[str, Any]) -> None:
        if self._inside is not None:
            self._inside.check()
        self._forget()
        self._scene_pipe = pipeline
        self._read_prompts(pipeline, tensors)

    def _hook_next(self, pipeline: Any, step: int, total: int) -> None:
        scheduler = find_scheduler(pipeline)
        expected = scheduler.timesteps
        hooks: list[Any] = []

        def once(owner: Any, proceed: Any, model_output: Tensor, t: Any, sample: Tensor, extra: dict[str, Any]) -> Any:
            for hook in hooks:
                hook.remove()
            if owner.timesteps is not expected:  # left over from a run that was aborted: stay out of this one
                return proceed(model_output, sample)
            return self._on_step(owner, proceed, model_output, t, sample, extra, (step, total))

        hooks.append(SchedulerHook(scheduler, once, self, pipeline))
        if any(isinstance(term.space, Activations) for term in self.terms):
            hooks.append(DenoiserWatch(pipeline, self._on_denoise))
        self._hooks = hooks

    def _read_prompts(self, pipeline: Any, tensors: dict[str, Any]) -> None:
        self._prompts = self._encoder = None
        embeds = tensors.get("prompt_embeds")
        if not isinstance(embeds, Tensor) or embeds.ndim < 2:
            return
        n = len(tensors["latents"]) if isinstance(tensors.get("latents"), Tensor) else len(embeds)
        if len(embeds) % (2 * n) == 0 and getattr(pipeline, "do_classifier_free_guidance", False):
            embeds = embeds[len(embeds) // 2 :]  # with classifier-free guidance the negative prompts come first
        self._prompts = masked_mean(embeds, None)
        encoder = getattr(pipeline, "text_encoder", None)
        self._encoder = f"{type(encoder).__name__} by callback"

    # -- what the watchers say -------------------------------------------------------------------------------------

    def _forget(self) -> None:
        """Whatever was known of an earlier call."""
        self._prompts = self._encoder = self._run = self._asked = self._size = self._call = None
        self._open, self._labels_first = True, False

    def _on_start(self) -> None:
        if self._inside is not None:
            self._inside.check()
        self._forget()

    def _on_prompt(self, features: Tensor, encoder: str) -> None:
        if self._inside is not None:
            self._inside.check()
        if self._sees_start and not self._open:
            return  # the same call again, for the negative prompts or for a second encoder
        self._prompts, self._encoder, self._run, self._open = features, encoder, None, False
        pipe, hook = self._pipe, self._hooks[0]
        current = getattr(pipe, "scheduler", None)
        if current is not None and current is not hook.scheduler:  # swapped inside the block
            hook.remove()
            self._hooks[0] = SchedulerHook(current, self._on_step, self, pipe)

    def _on_count(self, n: int, size: tuple[int, int] | None) -> None:
        self._asked, self._size = n, size

    def _on_denoise(self, module: Any, arguments: dict[str, Any]) -> None:
        if self._call is None:
            self._call = module, arguments
        if self._ask_denoiser and self._open and (self._run is None or self._run.step == 0):
            found = condition_of(module, arguments)
            if found is not None:
                self._prompts, self._labels_first = found
                self._encoder, self._open = "labels" if self._labels_first else "the denoiser's condition", False

    def _on_end(self) -> None:
        """A call is over: what it made is kept, also if a refiner is to finish it; not if it was interrupted."""
        run = self._run
        if run is not None and not run.done and run.final is not None and not getattr(self._pipe, "interrupt", False):
            run.finish(self._scene(), self.remember)
        self._open = True

    # -- the run ---------------------------------------------------------------------------------------------------

    def _match(self, t: Tensor, n: int) -> Tensor:
        """One prompt row for each of ``n`` samples: prompts are repeated for their images."""
        if len(t) == n:
            return t
        if n % len(t):
            raise ValueError(f"{n} samples cannot be shared out over {len(t)} prompts; give one prompt row for each sample")
        return t.repeat_interleave(n // len(t), dim=0)

    def _prompts_for(self, n: int, device: torch.device) -> Tensor | None:
        """Prompt rows of the samples at hand; None, with a word, where the pipeline's own do not fit."""
        t = self._prompts
        if t is None:
            return None
        if len(t) == 2 * n:  # a batch with its negatives: they come first, but class labels come last
            t = t[:n] if self._labels_first else t[n:]
        elif len(t) > n and len(t) % n == 0:  # one row for each frame
            t = t.unflatten(0, (n, -1)).mean(1)
        if n % len(t):
            warnings.warn(
                f"the pipeline encoded {len(t)} prompts for {n} samples, so prompts are not told apart in this run: all "
                "samples count as one prompt's",
                stacklevel=2,
            )
            self._prompts = None
            return None
        return self._match(t.to(device), n)

    def _begin(self, scheduler: Any, timestep: Any, sample: Any, place: tuple[int, int] | None) -> Run:
        layout = Layout.of(sample, self._asked)
        total = getattr(self._pipe, "_num_timesteps", None)
        total = total if isinstance(total, int) else None
        run = Run(scheduler, timestep, sample, place, layout, total, self.terms, self.seed, self._encoder)
        self._report, self.finished = run.report, run.finished
        return run

    def _scene(self) -> Scene:
        return Scene(self._pipe if self._pipe is not None else self._scene_pipe, self._call, self._size)

    def _on_step(
        self,
        scheduler: Any,
        proceed: Any,
        model_output: Tensor,
        timestep: Any,
        sample: Any,
        extra: dict[str, Any] | None = None,
        place: tuple[int, int] | None = None,
    ) -> Any:
        run = self._run
        if run is None or not run.continues(scheduler, sample):
            run = self._begin(scheduler, timestep, sample, place)
        else:
            run.owner.check()
        self._run, self._inside = None, run.owner  # no run until this step has succeeded: an aborted one is forgotten
        began = time.perf_counter()
        layout = run.layout
        with torch.no_grad():
            t = run.prompts = self._prompts_for(layout.count(sample), layout.device(sample))
            seen = predict(scheduler, model_output, timestep, sample, extra)
            x0 = layout.pack(seen.x0)
            if not torch.isfinite(x0).all():
                raise ValueError(
                    f"NaN or infinite values in the prediction at step {run.step + 1} of {run.total}; the memory was not "
                    "changed. Lower guidance_scale or scale, or use float32 if the model overflows in half precision"
                )
            due = [k for k in self.terms if k.due(run.step, run.total, seen.noise_to_signal)]
            scene = self._scene()
            guided = run.move([k for k in due if not k.feature_space.noisy], x0, seen, t, scene)
            if guided is not None:
                model_output = seen.moved(model_output, layout.unpack(guided))
        run.seconds += time.perf_counter() - began
        result = proceed(model_output, sample)
        began = time.perf_counter()
        with torch.no_grad():
            result = run.move_latents([k for k in due if k.feature_space.noisy], result, seen, t, scene)
            run.step += 1
            run.final = result[0]
            if run.step >= run.total:
                run.finish(self._scene(), self.remember)
                self._inside = None
        run.seconds += time.perf_counter() - began
        self._report.seconds = run.seconds
        self._run, self._call = run, None
        return result
