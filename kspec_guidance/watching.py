"""What a guide reads off a pipeline as it works: prompts, the number of samples, beginning and end of a call.

Nothing is tokenised or encoded twice: prompt features are means of what the pipeline's own encoder returns.
"""

import hashlib
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.injection import Hook, sub_pipelines

__all__ = [
    "CallWatch",
    "DenoiserWatch",
    "PromptWatch",
    "condition_of",
    "denoiser_of",
    "fingerprint",
    "masked_mean",
    "token_mask",
]

ENCODE = ("encode_prompt", "_encode_prompt", "_encode_text_prompt")
DENOISERS = ("transformer", "unet", "prior", "decoder", "image_unet", "model")
PER_PROMPT = ("num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt")


def token_mask(ids: Tensor, bos: int | None = None) -> Tensor:
    """Which tokens ``[n, l]`` carry the prompt: not the start token, and of the trailing run of equal ones the first.

    >>> token_mask(torch.tensor([[0, 7, 9, 1, 1, 1]]), bos=0).int().tolist()
    [[0, 1, 1, 1, 0, 0]]
    """
    differs = ids != ids[:, -1:]
    place = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    last = torch.where(differs, place, -1).amax(1, keepdim=True)
    mask = place <= last + 1
    if bos is not None:
        mask = mask & ~((ids == bos) & (place == 0) & (mask.sum(1, keepdim=True) > 1))
    return mask


def masked_mean(embeds: Tensor, mask: Tensor | None) -> Tensor:
    """Unit-norm mean over tokens: ``[n, l, c]`` and ``[n, l]`` to ``[n, c]``; ``[n, c]`` is only normalised."""
    embeds = embeds.detach().float()
    if embeds.ndim > 2:
        embeds = embeds.flatten(1, -2)
        if mask is None:
            embeds = embeds.mean(1)
        else:
            weight = mask.to(embeds)[..., None]
            embeds = (embeds * weight).sum(1) / weight.sum(1).clamp_min(1)
    return embeds / embeds.norm(dim=-1, keepdim=True).clamp_min(1e-12)


def fingerprint(module: Any) -> str:
    """A short name for a text encoder: its class, width, and a hash of some of its weights."""
    digest = hashlib.sha256(type(module).__name__.encode())
    if isinstance(module, nn.Module):
        parameters = list(module.named_parameters())
        for name, p in [parameters[0], parameters[len(parameters) // 2], parameters[-1]] if parameters else []:
            digest.update(f"{name}{list(p.shape)}".encode())
            if p.device.type != "meta":
                # rounded, so that the same weights in half precision are the same encoder
                sample = p.detach().flatten()[:256].to("cpu", torch.float32)
                digest.update((sample * 64).round().to(torch.int32).numpy().tobytes())
    return f"{type(module).__name__}-{digest.hexdigest()[:12]}"


def denoiser_of(pipe: Any) -> nn.Module | None:
    """The network that the loop calls, as far as its name tells."""
    for name in DENOISERS:
        found = getattr(pipe, name, None)
        if isinstance(found, nn.Module):
            return found
    return None


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


def first_tensor(result: Any) -> Tensor | None:
    """The prompt embeddings in what an ``encode_prompt`` returns: the first tensor ``[n, ...]``, or the means of a list."""
    first = result
    while isinstance(first, tuple | list) and len(first):
        if all(isinstance(p, Tensor) and p.ndim == 2 for p in first) and isinstance(result, tuple) and first is not result:
            return torch.stack([p.float().mean(0) for p in first])  # one [l, c] for each prompt, of different lengths
        first = first[0]
    return first if isinstance(first, Tensor) and first.ndim >= 2 and first.is_floating_point() else None


def wanted_half(features: Tensor, signature: inspect.Signature, args: tuple, kwargs: dict) -> Tensor:
    """Without the negative prompts, where an encoder returns them first in one tensor (AudioLDM, Kandinsky, unCLIP)."""
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return features
    prompt = given.get("prompt")
    n = 1 if isinstance(prompt, str) else len(prompt) if isinstance(prompt, list) else None
    per = next((given[k] for k in PER_PROMPT if isinstance(given.get(k), int)), 1)
    doubled = given.get("do_classifier_free_guidance", False)
    if n is not None and doubled and len(features) in (2 * n, 2 * n * per) and len(features) != n * per:
        return features[len(features) // 2 :]
    return features


def condition_of(module: nn.Module, given: dict[str, Any]) -> tuple[Tensor, bool] | None:
    """Prompt features in a denoiser's arguments, for pipelines without any ``encode_prompt``, and whether they are labels.

    Means of ``encoder_hidden_states`` ``[n, c]``, else class labels, one-hot; None where there are neither. In a batch with
    its negatives the wanted prompts come last, but wanted labels come first.
    """
    states, labels = given.get("encoder_hidden_states"), given.get("class_labels")
    states = None if states is None else first_tensor((states,))
    if states is not None:
        return masked_mean(states, None), False
    if isinstance(labels, Tensor) and not labels.is_floating_point() and labels.ndim == 1:
        known = getattr(getattr(module, "config", None), "num_embeds_ada_norm", None) or 1000
        return nn.functional.one_hot(labels, max(int(labels.max()), known) + 1).float(), True
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
