"""PipelineObserver: records prompts, sizes and denoiser calls of a running pipeline, without encoding prompts again."""

import inspect
import weakref
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kspec_guidance.loop.callers import owns, running_pipelines
from kspec_guidance.loop.components import call_parameters, denoisers_of, sub_pipelines
from kspec_guidance.loop.context import CallContext, DenoiserCall
from kspec_guidance.loop.prompts import (
    condition_of,
    masked_mean,
    prompt_count,
    prompt_major,
    prompt_tensor,
    token_mask,
    wanted_rows,
)
from kspec_guidance.loop.scheduler_hook import Function, MethodPatch, never
from kspec_guidance.utils.hashing import fingerprint

__all__ = ["DenoiserWatch", "PipelineObserver", "network_fingerprint"]

ENCODE_METHODS = ("encode_prompt", "_encode_prompt", "_encode_text_prompt")
CONDITIONS = {"prompt", "prompt_embeds", "image", "image_embeds", "class_labels"}  # arguments that state what is wanted
_fingerprints: "weakref.WeakKeyDictionary[nn.Module, tuple[int, str]]" = weakref.WeakKeyDictionary()


def network_fingerprint(network: nn.Module) -> str:
    """:func:`fingerprint`, computed once per network, and again if parameters were added or removed."""
    size = sum(1 for _ in network.parameters())
    known = _fingerprints.get(network)
    if known is None or known[0] != size:
        known = _fingerprints[network] = size, fingerprint(network)
    return known[1]


class PipelineObserver:
    """Records the data of a call from the pipeline's own methods, as a :class:`CallContext`.

    It patches ``check_inputs`` (a call begins), ``encode_prompt`` (prompts), ``prepare_latents`` (number and size of the
    samples), ``mask_processor.preprocess`` (where it inpaints) and ``maybe_free_model_hooks`` (a call ends), and hooks the
    denoiser if its arguments are needed.

    Args:
        pipe: a pipeline, classic or modular.
        on_call: called when a call begins and when its prompts are encoded, before they are recorded.
        on_end: called when a call ends, also if it was interrupted.
        denoiser_calls: whether to keep the arguments of the denoiser's first call at each step.
        tag, replaceable: see :class:`MethodPatch`.
        timesteps: returns the scheduler's timesteps, which are replaced when a call begins.

    Raises:
        ValueError: if the pipeline is observed under another tag.
    """

    def __init__(
        self,
        pipe: Any,
        on_call: Callable[[], None],
        on_end: Callable[[], None],
        denoiser_calls: bool,
        tag: Any,
        replaceable: Callable[[], bool] = never,
        timesteps: Callable[[], Any] = lambda: None,
    ):
        self.pipe, self.on_call, self.on_end, self.tag = pipe, on_call, on_end, tag
        self._replaceable, self._timesteps = replaceable, timesteps
        self._condition_timesteps: Any = None  # those of the call whose condition was recorded
        self._prompted = not CONDITIONS.isdisjoint(call_parameters(type(pipe)))
        self._patches: list[MethodPatch] = []
        self.denoiser: DenoiserWatch | None = None
        self._token_ids: list[tuple[Tensor, Tensor | None, int | None]] = []
        self._forget()
        try:
            self._install(denoiser_calls)
        except BaseException:
            self.remove()
            raise

    def _install(self, denoiser_calls: bool) -> None:
        for inner in sub_pipelines(self.pipe):
            encode = next((n for n in ENCODE_METHODS if callable(getattr(inner, n, None))), None)
            if encode is not None:
                self._patch(inner, encode, self._around_encode)
        self._encodes = bool(self._patches)
        patched = [self._patch(inner, "prepare_latents", self._around_latents) for inner in sub_pipelines(self.pipe)]
        self._has_latents = any(patched)
        for inner in sub_pipelines(self.pipe):
            self._patch(getattr(inner, "mask_processor", None), "preprocess", self._around_mask)
        self._has_start = self._patch(self.pipe, "check_inputs", self._around_start)
        self._patch(self.pipe, "maybe_free_model_hooks", self._around_end)
        if denoiser_calls or not self._encodes:
            self.denoiser = DenoiserWatch(self.pipe, None if self._encodes else self._note_condition, denoiser_calls)

    def _patch(self, owner: Any, name: str, wrap: Callable[[Function], Function]) -> bool:
        if callable(getattr(owner, name, None)):
            self._patches.append(MethodPatch(owner, name, wrap, self.tag, self._replaceable))
            return True
        return False

    def remove(self) -> None:
        """Remove all patches and hooks."""
        for patch in self._patches:
            patch.remove()
        if self.denoiser is not None:
            self.denoiser.remove()
        self._patches, self.denoiser = [], None

    def _forget(self) -> None:
        """Reset the data of an earlier call."""
        self._prompts: Tensor | None = None
        self._texts: list[str] | None = None
        self._encoder: str | None = None
        self._count: int | None = None
        self._size: tuple[int, int] | None = None
        self._mask_image: Tensor | None = None
        self._warned: set[str] = set()
        self._class_labels, self._open = False, True  # _open: whether prompts of the current call are still expected

    def close(self) -> None:
        """Expect no further prompts in the current call: what is encoded later is not recorded."""
        self._open = False

    def context(self) -> CallContext:
        """The recorded data of the current call."""
        steps = getattr(self.pipe, "num_timesteps", None)
        return CallContext(
            self.pipe, self._prompts, self._encoder, self._class_labels, self._prompted, self._count, self._size,
            steps if isinstance(steps, int) else None, self._warned, self._texts, self._mask_image,
        )  # fmt: skip

    def denoiser_call(self) -> DenoiserCall | None:
        """The denoiser's first call since the last query; None if there is none, or calls are not kept."""
        return None if self.denoiser is None else self.denoiser.take()

    # -- patches -----------------------------------------------------------------------------------------------------

    def _around_start(self, original: Function) -> Function:
        def check_inputs(*args: Any, **kwargs: Any) -> Any:
            self.on_call()
            self._forget()
            self.denoiser_call()  # what an aborted call has left
            return original(*args, **kwargs)

        return check_inputs

    def _around_end(self, original: Function) -> Function:
        def maybe_free_model_hooks(*args: Any, **kwargs: Any) -> Any:
            self.on_end()
            self._open = True
            return original(*args, **kwargs)

        return maybe_free_model_hooks

    def _around_latents(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def prepare_latents(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            first = result[0] if isinstance(result, tuple | list) else result
            given = signature.bind(*args, **kwargs).arguments
            height, width = given.get("height"), given.get("width")
            if isinstance(first, Tensor) and first.ndim > 1:
                self._count = len(first)
                self._size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
            return result

        return prepare_latents

    def _around_mask(self, original: Function) -> Function:
        def preprocess(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self._mask_image = result if isinstance(result, Tensor) else None
            return result

        return preprocess

    def _around_encode(self, original: Function) -> Function:
        signature = inspect.signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self._token_ids.clear()
            handles = [m.register_forward_hook(self._note_tokens, with_kwargs=True) for m in self._encoders()]
            try:
                result = original(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            embeds = prompt_tensor(result)
            if embeds is not None:
                self._note_prompts(embeds, result, signature.bind(*args, **kwargs))
            return result

        return encode_prompt

    def _note_prompts(self, embeds: Tensor, result: Any, bound: inspect.BoundArguments) -> None:
        if self._has_start and not self._open:
            return  # a further encoding of the same call: negative prompts, or a second encoder
        self.on_call()
        bound.apply_defaults()
        given, encoders = bound.arguments, self._encoders()
        if ("prompt" in given and given["prompt"] is None) or given.get("prompt_embeds") is not None:
            self._token_ids.clear()  # the tokens are those of negative prompts
        prompt = given.get("prompt")
        texts = [prompt] if isinstance(prompt, str) else prompt if isinstance(prompt, list) else []
        self._texts = texts if all(isinstance(text, str) for text in texts) else None
        mask, wanted = self._returned_mask(embeds, result), wanted_rows(embeds, given, self.pipe)
        if mask is None:
            mask = self._mask(wanted)
        else:
            mask = prompt_major(wanted_rows(mask, given, self.pipe), prompt_count(given))
        self._prompts = masked_mean(wanted, mask)
        self._encoder = network_fingerprint(encoders[0]) if encoders else "given"
        settings = ["clip_skip"]
        if mask is None and embeds.ndim > 2:
            self._encoder += ", with padding"  # not comparable with features of the prompt's tokens
            settings.append("max_sequence_length")
        parameters = bound.signature.parameters
        for name in settings:  # they change the features of a prompt
            if name in given and given[name] != parameters[name].default:
                self._encoder += f", {name}={given[name]}"
        self._open = False

    def _note_condition(self, call: DenoiserCall) -> None:
        timesteps = self._timesteps()
        if not self._open and timesteps is self._condition_timesteps:
            return
        found = condition_of(call)
        if found is not None:
            self._condition_timesteps = timesteps
            self._prompts, labelled = found
            self._class_labels = labelled is not None
            self._count = labelled if labelled and not self._has_latents else self._count
            self._encoder = "labels" if self._class_labels else "the denoiser's condition"
            self._open = False

    def _encoders(self) -> list[nn.Module]:
        parts = getattr(self.pipe, "components", {})
        return [m for name, m in parts.items() if "text_encoder" in name and isinstance(m, nn.Module)]

    def _note_tokens(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            self._token_ids.append((ids, kwargs.get("attention_mask"), getattr(module.config, "bos_token_id", None)))

    @staticmethod
    def _returned_mask(embeds: Tensor, result: Any) -> Tensor | None:
        """Mask ``[rows, l]`` of the prompt tokens that an encoder returned with its embeddings; None if there is none."""
        for part in result if isinstance(result, tuple | list) and embeds.ndim > 2 else ():
            if isinstance(part, Tensor) and part.shape == embeds.shape[:2] and bool(((part == 0) | (part == 1)).all()):
                return part
        return None

    def _mask(self, embeds: Tensor) -> Tensor | None:
        """Mask ``[n, l]`` of the prompt tokens from the encoder's input; None if unknown."""
        if embeds.ndim != 3:
            return None
        for ids, attention, bos in self._token_ids:
            mask = token_mask(ids, bos) if attention is None else attention
            if mask.shape[1] == embeds.shape[1] and embeds.shape[0] % len(mask) == 0:
                return mask.repeat_interleave(embeds.shape[0] // len(mask), dim=0).to(embeds.device)
        return None


class DenoiserWatch:
    """Observes the calls of a pipeline's denoisers: keeps the first since the last :meth:`take`, and the outputs of all.

    Args:
        pipe: the pipeline; without a denoiser no calls are recorded.
        on_call: called with each call.
        keep: whether to keep calls for :meth:`take`.
    """

    def __init__(self, pipe: Any, on_call: Callable[[DenoiserCall], None] | None = None, keep: bool = True):
        self.kept: DenoiserCall | None = None
        self._pipe, self._on_call, self._keep = pipe, on_call, keep
        self._handles: list[Any] = []  # hooks, or patches of modules that were compiled in place
        for denoiser in denoisers_of(pipe):
            self._watch(denoiser)

    def _watch(self, denoiser: nn.Module) -> None:
        signature = inspect.signature(getattr(denoiser, "_orig_mod", denoiser).forward)

        def record(module: nn.Module, args: tuple, kwargs: dict) -> None:
            if self._foreign():
                return
            try:
                call = DenoiserCall(module, dict(signature.bind_partial(*args, **kwargs).arguments))
            except TypeError:
                return
            if self._keep and self.kept is None:
                self.kept = call
            if self._on_call is not None:
                self._on_call(call)

        def record_output(module: nn.Module, args: tuple, output: Any) -> None:
            if self.kept is not None and not self._foreign():
                self.kept.outputs.append(output)

        def around_compiled(compiled: Function) -> Function:
            def call(*args: Any, **kwargs: Any) -> Any:
                record(denoiser, args, kwargs)
                output = compiled(*args, **kwargs)
                record_output(denoiser, args, output)
                return output

            return call

        if getattr(denoiser, "_compiled_call_impl", None) is not None:  # hooks would be part of the graph
            self._handles.append(MethodPatch(denoiser, "_compiled_call_impl", around_compiled, DenoiserWatch))
        else:
            self._handles.append(denoiser.register_forward_pre_hook(record, with_kwargs=True))
            if self._keep:
                self._handles.append(denoiser.register_forward_hook(record_output))

    def _foreign(self) -> bool:
        """Whether another pipeline with the same network makes this call, perhaps within a call of this one."""
        caller = next(running_pipelines(), None)
        return caller is not None and not owns(self._pipe, caller)

    def take(self) -> DenoiserCall | None:
        """Return the kept call, or None, and reset it."""
        kept, self.kept = self.kept, None
        return kept

    def remove(self) -> None:
        """Remove the hooks, if any."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
