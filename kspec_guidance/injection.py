"""Ways into a pipeline: a reversible hook on ``scheduler.step``, and an eye on ``encode_prompt``.

A hook is an instance attribute that shadows the class's method; removing it leaves the object as it was, to the last
attribute. Nothing of diffusers is copied or subclassed.
"""

import functools
import hashlib
import inspect
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.prediction import family

__all__ = ["Hook", "PromptWatch", "SchedulerHook", "fingerprint", "masked_mean", "token_mask"]

StepFunction = Callable[..., Any]


class Hook:
    """Shadow the method ``name`` of one object by ``wrap(original)``, until :meth:`remove`."""

    def __init__(self, owner: Any, name: str, wrap: Callable[[Callable[..., Any]], Callable[..., Any]], tag: Any):
        present = owner.__dict__.get(name)
        if getattr(present, "kspec_tag", None) not in (None, tag):
            raise ValueError(
                f"this {type(owner).__name__} is already guided by another guide; combine the two with `guide + other`, "
                "or detach() the first"
            )
        self.owner, self.name, self.had, self.before = owner, name, name in owner.__dict__, present
        original = getattr(owner, name)
        wrapper = functools.wraps(original)(wrap(original))
        wrapper.kspec_tag = tag  # type: ignore[attr-defined]
        self.wrapper = wrapper
        object.__setattr__(owner, name, wrapper)

    def remove(self) -> None:
        """Undo; harmless the second time, and when someone else has put a hook of theirs on top."""
        if self.owner.__dict__.get(self.name) is not self.wrapper:
            return
        if self.had:
            object.__setattr__(self.owner, self.name, self.before)
        else:
            object.__delattr__(self.owner, self.name)


class SchedulerHook:
    """Calls ``on_step(scheduler, step, model_output, timestep, sample)`` in place of ``scheduler.step``.

    ``step(model_output, sample)`` is the scheduler's own, with all other arguments as the pipeline gave them.
    """

    def __init__(self, scheduler: Any, on_step: Callable[..., Any], tag: Any):
        family(scheduler)  # refuse what cannot be guided before anything is touched
        signature = inspect.signature(scheduler.step)

        def wrap(original: StepFunction) -> StepFunction:
            def step(*args: Any, **kwargs: Any) -> Any:
                given = signature.bind(*args, **kwargs)

                def proceed(model_output: Tensor, sample: Tensor) -> Any:
                    given.arguments["model_output"], given.arguments["sample"] = model_output, sample
                    return original(*given.args, **given.kwargs)

                a = given.arguments
                return on_step(scheduler, proceed, a["model_output"], a["timestep"], a["sample"])

            return step

        self.scheduler = scheduler
        self.hook = Hook(scheduler, "step", wrap, tag)

    def remove(self) -> None:
        self.hook.remove()


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


class PromptWatch:
    """Reads prompt features off the pipeline's own ``encode_prompt``: nothing is tokenised or encoded twice.

    ``on_prompt(features, encoder)`` is called with unit-norm rows ``[n, c]``, the wanted prompts' half only, one row for
    each image, and the fingerprint of what made them.
    """

    def __init__(self, pipe: Any, on_prompt: Callable[[Tensor, str], None], tag: Any):
        self.pipe, self.on_prompt = pipe, on_prompt
        self.seen: list[tuple[Tensor, Tensor | None, int | None]] = []
        self.hook = Hook(pipe, "encode_prompt", self._wrap, tag) if hasattr(pipe, "encode_prompt") else None

    def remove(self) -> None:
        if self.hook is not None:
            self.hook.remove()

    def _encoders(self) -> list[nn.Module]:
        parts = getattr(self.pipe, "components", {})
        return [m for name, m in parts.items() if name.startswith("text_encoder") and isinstance(m, nn.Module)]

    def _note(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if isinstance(ids, Tensor) and ids.ndim == 2 and not ids.is_floating_point():
            self.seen.append((ids, kwargs.get("attention_mask"), getattr(module.config, "bos_token_id", None)))

    def _wrap(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def encode_prompt(*args: Any, **kwargs: Any) -> Any:
            self.seen.clear()
            handles = [m.register_forward_hook(self._note, with_kwargs=True) for m in self._encoders()]
            try:
                result = original(*args, **kwargs)
            finally:
                for handle in handles:
                    handle.remove()
            embeds = result[0] if isinstance(result, tuple | list) else result
            if isinstance(embeds, Tensor) and embeds.ndim >= 2:
                self.on_prompt(masked_mean(embeds, self._mask(embeds, result)), self.encoder_name())
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


class ThreadOwner:
    """Remembers which thread is inside a run."""

    def __init__(self) -> None:
        self.thread = threading.current_thread()

    def check(self) -> None:
        """
        Raises:
            RuntimeError: from another thread, while the owner is still alive.
        """
        if threading.current_thread() is not self.thread and self.thread.is_alive():
            raise RuntimeError(
                "one guide is being used by two threads at once; give each thread its own pipeline and its own guide, and "
                "join their memories afterwards with memory.merge(other)"
            )
