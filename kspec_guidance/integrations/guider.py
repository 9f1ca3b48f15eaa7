"""KernelGuider: kernel guidance as a guider of diffusers, around another guider.

A guider combines predictions; it sees neither the scheduler nor the finished samples, and some pipelines change its result
before their step. So this one prepares the scheduler's next step instead, as ``attach`` does: x0, the move and the memory
are those of ``attach``, with every scheduler and prediction type. Prompts are read from what the guider is given.
"""

import json
import os
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

from diffusers import guiders
from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import BaseGuidance
from huggingface_hub import hf_hub_download
from torch import Tensor

from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.config import TENSORS_NAME, load_tensors, save_tensors
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.loop.callers import running_pipelines
from kspec_guidance.loop.components import find_scheduler
from kspec_guidance.loop.context import CallContext
from kspec_guidance.loop.observer import network_fingerprint
from kspec_guidance.loop.prompts import condition_states, masked_mean, prompt_major
from kspec_guidance.loop.scheduler_hook import first_index
from kspec_guidance.utils.messages import warn_user

__all__ = ["KernelGuider"]


class KernelGuider(BaseGuidance):
    """A guider of diffusers that adds kernel guidance to another guider.

        pipe.update_components(guider=KernelGuider(inner=ClassifierFreeGuidance(4.0), guide=SPARKE()))

    It makes the images that ``guide.attach(pipe)`` makes with the inner guider, and at scale 0 those of the inner guider
    alone. All attributes of the inner guider can be read and set on this one: ``pipe.guider.guidance_scale = 3``.
    A pipeline saves it with its other components. The saved settings contain those of the inner guider and of the guide;
    reference tensors are in a file beside them, and the memory is saved by ``guide.memory.save(path)``.

    Args:
        inner: a guider of diffusers: classifier-free guidance, APG, ...; ``ClassifierFreeGuidance()`` by default.
        guide: SPARKE() by default. Two guiders of one pipeline, such as ``guider`` and ``guider_2`` of Wan 2.2, take the
            same guide.
        scheduler: the scheduler of a loop of your own. In a call of a pipeline it is found, and this is not needed. It is
            not saved.

    Raises:
        TypeError: for an inner guider or a guide of another kind.
        ValueError: for saved settings that cannot be loaded.
    """

    ignore_for_config = ["scheduler"]
    _own = frozenset({"inner", "guide", "scheduler", "_call", "_pass", "_diffusers_load_id", "_internal_dict"})

    @register_to_config
    def __init__(
        self,
        inner: BaseGuidance | dict[str, Any] | None = None,
        guide: KernelGuidance | dict[str, Any] | None = None,
        scheduler: Any = None,
    ):
        # the base class is not initialised: the state of the steps is that of the inner guider
        self.inner = ClassifierFreeGuidance() if inner is None else _guider(inner)
        self.guide = SPARKE() if guide is None else _guide(guide)
        self.scheduler = scheduler
        self._call: _Call | None = None
        self._pass: _Pass | None = None
        self._diffusers_load_id = f"kspec_guidance|{uuid4()}|null|null"  # pipelines save what was loaded from somewhere
        try:
            settings = self.guide.to_config()[0]
        except TypeError as error:  # can be used, but not saved
            settings = {"unsaved": str(error)}
        self._register(settings)

    def _register(self, settings: dict[str, Any]) -> None:
        inner = json.loads(self.inner.to_json_string())
        self.register_to_config(inner=inner, guide=settings, _use_default_values=[])

    # -- the inner guider ----------------------------------------------------------------------------------------------

    def __getattr__(self, name: str) -> Any:
        inner = self.__dict__.get("inner")
        if inner is None or name.startswith("__"):
            raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")
        return getattr(inner, name)

    def __setattr__(self, name: str, value: Any) -> None:
        inner = self.__dict__.get("inner")
        own = inner is None or name in self._own or not hasattr(inner, name)
        object.__setattr__(self if own else inner, name, value)

    @property
    def _input_predictions(self) -> Any:
        return self.inner._input_predictions

    @property
    def num_conditions(self) -> int:
        """Number of predictions that the inner guider combines."""
        return self.inner.num_conditions

    @property
    def is_conditional(self) -> bool:
        """Whether the prediction that is being made is conditional."""
        return self.inner.is_conditional

    def enable(self) -> None:
        """Enable the inner guider."""
        self.inner.enable()

    def disable(self) -> None:
        """Disable the inner guider; kernel guidance stays, as in pipelines without classifier-free guidance."""
        self.inner.disable()

    def get_state(self) -> dict[str, Any]:
        """State of the inner guider."""
        return self.inner.get_state()

    def prepare_models(self, denoiser: Any) -> None:
        """Prepare the denoiser, by the inner guider."""
        self.inner.prepare_models(denoiser)

    def cleanup_models(self, denoiser: Any) -> None:
        """Clean up the denoiser, by the inner guider."""
        self.inner.cleanup_models(denoiser)

    # -- the steps -----------------------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Any) -> None:
        """Begin a step of the denoising loop."""
        self.inner.set_state(step, num_inference_steps, timestep)
        self._call = _Call(step, num_inference_steps, timestep)

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        """The inner guider's batches; the next step of the scheduler will be guided."""
        self._prepare_step({k: _conditional(v) for k, v in data.items()})
        return self.inner.prepare_inputs(data)

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        """The inner guider's batches; the next step of the scheduler will be guided."""
        self._prepare_step({k: getattr(data, _conditional(v) or "", None) for k, v in input_fields.items()})
        return self.inner.prepare_inputs_from_block_state(data, input_fields)

    def __call__(self, data: list[Any]) -> Any:
        """The inner guider's result: the move is added in the scheduler's step."""
        self._prepare_step({})
        return self.inner(data)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inner guider's result: the move is added in the scheduler's step."""
        self._prepare_step({})
        return self.inner.forward(*args, **kwargs)

    def _prepare_step(self, inputs: dict[str, Any]) -> None:
        """Let the guide take the next step of the scheduler, once in a step."""
        call, self._call = self._call, None
        if call is None:
            return
        pipe = next(running_pipelines(), None) if self.scheduler is None else self.scheduler
        if pipe is None:
            raise RuntimeError(
                "KernelGuider found no call of a diffusers pipeline in progress, so it does not know the scheduler that "
                "this loop uses; for a loop of your own give it: KernelGuider(inner, guide, scheduler=scheduler)"
            )
        timesteps = find_scheduler(pipe).timesteps
        if call.step == 0 or self._pass is None or self._pass.timesteps is not timesteps:
            self._pass = _Pass(timesteps, _count_steps(find_scheduler(pipe), call), _context(pipe, inputs))
            if pipe is not self.scheduler:
                self._check_companions(pipe)
        self.guide.before_step(pipe, call.step, self._pass.total, self._pass.context)

    def _check_companions(self, pipe: Any) -> None:
        """Warn if another guider takes over in the same loop (Wan 2.2) without this guide."""
        parts = {k: v for k, v in pipe.components.items() if isinstance(v, BaseGuidance)}
        own = next((k for k, v in parts.items() if v is self), None)
        for name, part in parts.items():
            if own and name.startswith(f"{own}_") and getattr(part, "guide", None) is not self.guide:
                warn_user(
                    f"the steps of {name} are not guided, and the finished samples are not remembered: give it the same "
                    f"guide, {name}=KernelGuider(inner, guide)"
                )

    # -- settings ------------------------------------------------------------------------------------------------------

    def new(self, **kwargs: Any) -> "KernelGuider":
        """A guider with these settings and an empty memory; ``kwargs`` replace ``inner``, ``guide`` or ``scheduler``."""
        given = {"inner": json.loads(self.inner.to_json_string()), "scheduler": self.scheduler} | kwargs
        if "guide" not in given:
            given["guide"] = KernelGuidance.from_config(*self.guide.to_config())
        return type(self)(**given)

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write the present settings, and the tensors that they refer to, into a folder; see ``save_pretrained``.

        Raises:
            TypeError: for a guide that cannot be saved, with a kernel of your own for example.
        """
        settings, tensors = self.guide.to_config()
        self._register(settings)
        os.makedirs(save_directory, exist_ok=True)
        save_tensors(save_directory, tensors)
        super().save_config(save_directory, push_to_hub=push_to_hub, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike, subfolder: str | None = None, **kwargs: Any
    ) -> "KernelGuider":
        """Load the guider that ``save_pretrained``, or a pipeline with it, has saved; the memory is empty.

        Args:
            pretrained_model_name_or_path: a folder, or a repository of the Hub.
            subfolder: the guider's folder in it.
            kwargs: ``scheduler``, and options of the download, see ``BaseGuidance.from_pretrained``.

        Raises:
            OSError: if there is no such guider.
            ValueError: for settings that cannot be loaded.
        """
        scheduler = kwargs.pop("scheduler", None)
        config, _ = cls.load_config(
            pretrained_model_name_or_path, subfolder=subfolder, return_unused_kwargs=True, **kwargs
        )  # fmt: skip
        settings = config.get("guide")
        if isinstance(settings, dict) and _refers_to_tensors(settings):
            tensors = load_tensors(_tensors_path(pretrained_model_name_or_path, subfolder, kwargs))
            config = {**config, "guide": KernelGuidance.from_config(settings, tensors)}
        return cls(config.get("inner"), config.get("guide"), scheduler)


KernelGuider.__module__ = "kspec_guidance.modular"  # the import path that saved pipelines state


@dataclass(frozen=True, eq=False)
class _Call:
    """A step of the loop, as the pipeline announces it."""

    step: int
    total: int
    timestep: Any


@dataclass(frozen=True, eq=False)
class _Pass:
    """A pass through the timesteps of a scheduler."""

    timesteps: Any
    total: int
    context: CallContext


def _count_steps(scheduler: Any, call: _Call) -> int:
    """Number of steps of the scheduler in this pass."""
    first = first_index(scheduler, call.timestep)
    if getattr(scheduler, "begin_index", None) is None:
        first -= call.step
    total = len(scheduler.timesteps) - first
    return min(total, call.total) if getattr(scheduler, "order", 1) == 1 else total  # of higher order: several per step


def _guider(inner: Any) -> BaseGuidance:
    """A guider, or the one of saved settings."""
    if isinstance(inner, dict):
        name = inner.get("_class_name")
        found = getattr(guiders, str(name), None)
        if not (isinstance(found, type) and issubclass(found, BaseGuidance)):
            raise ValueError(f"the saved inner guider is a {name!r}, which diffusers does not have; build it in code")
        return found.from_config(inner)  # type: ignore[attr-defined]
    if not isinstance(inner, BaseGuidance):
        raise TypeError(f"inner must be a guider such as ClassifierFreeGuidance(4.0), got {type(inner).__name__}")
    if isinstance(inner, KernelGuider):
        raise TypeError("inner must be a guider of diffusers, got a KernelGuider; combine two guides with `guide + other`")
    return inner


def _guide(guide: Any) -> KernelGuidance:
    """A guide, or the one of saved settings."""
    if isinstance(guide, dict):
        if "unsaved" in guide:
            raise ValueError(f"the guide of this guider has no settings that can be loaded: {guide['unsaved']}")
        if _refers_to_tensors(guide):
            raise ValueError(
                "the guide of this guider has references, which a configuration does not contain: load it with "
                "KernelGuider.from_pretrained(folder), copy it with guider.new(), or give the guide itself"
            )
        return KernelGuidance.from_config(guide)
    if not isinstance(guide, KernelGuidance):
        raise TypeError(f"guide must be a guide such as SPARKE(), got {type(guide).__name__}")
    return guide


def _refers_to_tensors(value: Any) -> bool:
    if isinstance(value, dict):
        return set(value) == {"tensor"} or any(_refers_to_tensors(v) for v in value.values())
    return isinstance(value, list | tuple) and any(_refers_to_tensors(v) for v in value)


def _tensors_path(source: str | os.PathLike, subfolder: str | None, options: dict[str, Any]) -> Any:
    """Path of the tensors beside a guider's configuration, downloaded if it is in a repository."""
    if os.path.isdir(source):
        return os.path.join(source, subfolder or "", TENSORS_NAME)
    known = ("cache_dir", "force_download", "token", "local_files_only", "revision")
    return hf_hub_download(
        str(source), TENSORS_NAME, subfolder=subfolder or None, **{k: options[k] for k in known if k in options}
    )


def _conditional(value: Any) -> Any:
    """The part of a guider's input for the conditional prediction: the first of a tuple."""
    return value[0] if isinstance(value, tuple) and value else value


def _context(pipe: Any, inputs: dict[str, Any]) -> CallContext:
    """The prompts of a call, from what the denoiser is given for the conditional prediction."""
    owner = None if find_scheduler(pipe) is pipe else pipe
    states = condition_states(inputs)
    if states is None:
        return CallContext(owner, prompted=True)
    text_encoder = getattr(owner, "text_encoder", None)
    if text_encoder is not None and hasattr(owner, "encode_prompt"):  # `attach` reads the encoder's result with its mask
        masks = (v for k, v in inputs.items() if "mask" in k and isinstance(v, Tensor))
        mask = next((mask for mask in masks if mask.shape == states.shape[:2]), None)
        if mask is not None:
            count = 1 + int((states[1:] != states[:-1]).flatten(1).any(1).sum())
            features = masked_mean(states, prompt_major(mask, count))
            return CallContext(owner, features, network_fingerprint(text_encoder), prompted=True)
    return CallContext(owner, masked_mean(states, None), "the denoiser's condition", prompted=True)
