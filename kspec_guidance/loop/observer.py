"""What a guide reads off a pipeline as it works: prompts, the number of samples, beginning and end of a call.

Nothing is tokenised or encoded twice: prompt features are means of what the pipeline's own encoder returns.
"""

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from kspec_guidance.loop.components import denoiser_of, sub_pipelines
from kspec_guidance.loop.prompts import first_tensor, masked_mean, token_mask, wanted_half
from kspec_guidance.loop.scheduler_hook import Hook
from kspec_guidance.utils.hashing import fingerprint

__all__ = [
    "CallWatch",
    "DenoiserWatch",
    "PromptWatch",
]

ENCODE = ("encode_prompt", "_encode_prompt", "_encode_text_prompt")


class CallWatch:
    """Says when a pipeline begins a call, how many samples it makes noise for and of what size, and when it is done."""

    def __init__(
        self,
        pipe: Any,
        on_start: Callable[[], None],
        on_count: Callable[[int, tuple[int, int] | None], None],
        on_end: Callable[[], None],
        tag: Any,
    ):
        self.hooks: list[Hook] = []
        try:
            for inner in sub_pipelines(pipe):
                self._hook(inner, "prepare_latents", self._after(on_count), tag)
            self._hook(pipe, "check_inputs", self._before(on_start), tag)
            self._hook(pipe, "maybe_free_model_hooks", self._before(on_end), tag)
        except BaseException:
            self.remove()
            raise

    def _hook(self, owner: Any, name: str, wrap: Any, tag: Any) -> None:
        if callable(getattr(owner, name, None)):
            self.hooks.append(Hook(owner, name, wrap, tag))

    @property
    def sees_start(self) -> bool:
        return any(hook.name == "check_inputs" for hook in self.hooks)

    @staticmethod
    def _before(told: Callable[[], None]) -> Any:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                told()
                return original(*args, **kwargs)

            return call

        return wrap

    @staticmethod
    def _after(told: Callable[[int, tuple[int, int] | None], None]) -> Any:
        def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
            signature = inspect.signature(original)

            def call(*args: Any, **kwargs: Any) -> Any:
                result = original(*args, **kwargs)
                first = result[0] if isinstance(result, tuple | list) else result
                given = signature.bind(*args, **kwargs).arguments
                height, width = given.get("height"), given.get("width")
                size = (height, width) if isinstance(height, int) and isinstance(width, int) else None
                if isinstance(first, Tensor) and first.ndim > 1:
                    told(len(first), size)
                return result

            return call

        return wrap

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()


class PromptWatch:
    """Reads prompt features off the pipeline's own ``encode_prompt``.

    ``on_prompt(features, encoder)`` is called with unit-norm rows ``[n, c]``, the wanted prompts' half only, one row for
    each prompt or each image, and the fingerprint of what made them.
    """

    def __init__(self, pipe: Any, on_prompt: Callable[[Tensor, str], None], tag: Any):
        self.pipe, self.on_prompt = pipe, on_prompt
        self.seen: list[tuple[Tensor, Tensor | None, int | None]] = []
        self.hooks: list[Hook] = []
        try:
            for inner in sub_pipelines(pipe):
                name = next((n for n in ENCODE if callable(getattr(inner, n, None))), None)
                if name is not None:
                    self.hooks.append(Hook(inner, name, self._wrap, tag))
        except BaseException:
            self.remove()
            raise

    def __bool__(self) -> bool:
        return bool(self.hooks)

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def _encoders(self) -> list[nn.Module]:
        parts = getattr(self.pipe, "components", {})
        return [m for name, m in parts.items() if "text_encoder" in name and isinstance(m, nn.Module)]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            self.seen.append((ids, kwargs.get("attention_mask"), getattr(module.config, "bos_token_id", None)))

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self.seen.clear()
            handles = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._encoders()]
            try:
                result = original(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            embeds = first_tensor(result)
            if embeds is not None:
                features = masked_mean(embeds, self._mask(embeds, result))
                self.on_prompt(wanted_half(features, signature, args, kwargs), self.encoder_name())
            return result

        return encode_prompt

    def encoder_name(self) -> str:
        encoders = self._encoders()
        return fingerprint(encoders[0]) if encoders else "given"

    def _mask(self, embeds: Tensor, result: Any) -> Tensor | None:
        if embeds.ndim != 3:
            return None
        for part in result if isinstance(result, tuple | list) else ():
            if isinstance(part, Tensor) and part.shape == embeds.shape[:2] and not part.is_floating_point():
                return part
        for ids, attention, bos in self.seen:
            mask = token_mask(ids, bos) if attention is None else attention
            if mask.shape[1] == embeds.shape[1] and embeds.shape[0] % len(mask) == 0:
                return mask.repeat_interleave(embeds.shape[0] // len(mask), dim=0).to(embeds.device)
        return None


class DenoiserWatch:
    """Sees every call of the denoiser: ``on_call(module, arguments)``, the arguments by name, the caller's own tensors."""

    def __init__(self, pipe: Any, on_call: Callable[[nn.Module, dict[str, Any]], None]):
        self.module, self.handle = denoiser_of(pipe), None
        if self.module is None:
            return
        signature = inspect.signature(getattr(self.module, "_orig_mod", self.module).forward)

        def look(module: nn.Module, args: tuple, kwargs: dict) -> None:
            try:
                given = signature.bind_partial(*args, **kwargs).arguments
            except TypeError:
                return
            on_call(module, dict(given))

        self.handle = self.module.register_forward_pre_hook(look, with_kwargs=True)

    def remove(self) -> None:
        if self.handle is not None:
            self.handle.remove()
            self.handle = None
