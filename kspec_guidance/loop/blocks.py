"""Blocks of transformers: where they are, what they return, and hooks that change what they return.

diffusers registers the block classes of many transformers, with the position of image and text tokens in what they return;
a table here has further ones. Hooks are forward hooks of torch, which leave nothing behind when they are removed.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from kspec_guidance.loop.components import denoisers_of
from kspec_guidance.loop.context import CallContext, ComingStep, StepHandler
from kspec_guidance.loop.observer import DenoiserWatch
from kspec_guidance.loop.prompts import prompts_of_samples
from kspec_guidance.loop.scheduler_hook import MethodPatch, SchedulerHook

__all__ = ["BlockHooks", "Tokens", "TransformerBlock", "hook_block", "transformer_blocks"]

# Block classes that diffusers does not register, by the position of image and text tokens in what they return. A second
# tensor that is no text, such as sound, is left out.
IMAGE, IMAGE_TEXT, TEXT_IMAGE = (0, None), (0, 1), (1, 0)
UNREGISTERED: dict[str, tuple[int, int | None]] = {
    **dict.fromkeys(
        ("AllegroTransformerBlock", "AuraFlowSingleTransformerBlock", "BriaFiboSingleTransformerBlock",
         "ChromaSingleTransformerBlock", "HeliosTransformerBlock", "HunyuanDiTBlock", "Ideogram4TransformerBlock",
         "Krea2TransformerBlock", "LTX2VideoTransformerBlock", "Lumina2TransformerBlock", "LuminaNextDiTBlock",
         "NucleusMoEImageTransformerBlock", "OmniGenBlock", "PRXBlock", "QwenImage21TransformerBlock",
         "SanaTransformerBlock", "SanaVideoTransformerBlock", "SkyReelsV2TransformerBlock", "StableAudioDiTBlock",
         "WanTransformerBlock"), IMAGE),
    **dict.fromkeys(
        ("ConsisIDBlock", "CogView3PlusTransformerBlock", "EasyAnimateTransformerBlock", "GlmImageTransformerBlock",
         "HunyuanVideo15TransformerBlock", "JoyImageTransformerBlock"), IMAGE_TEXT),
    **dict.fromkeys(
        ("AuraFlowJointTransformerBlock", "BriaFiboTransformerBlock", "BriaSingleTransformerBlock",
         "ChromaTransformerBlock", "LongCatImageSingleTransformerBlock", "LongCatImageTransformerBlock",
         "OvisImageSingleTransformerBlock", "OvisImageTransformerBlock"), TEXT_IMAGE),
}  # fmt: skip

# Denoisers whose pipelines put rows with the prompt before those without it; all others put them last
COND_FIRST = ("ZImage", "LuminaNext")


@dataclass(frozen=True)
class TransformerBlock:
    """A transformer block: its name in the denoiser, its position among all blocks, and what it returns where.

    ``image`` and ``text`` are indices into the tuple that it returns; ``text`` is None for blocks without text tokens.
    """

    module: nn.Module
    name: str
    index: int
    count: int
    image: int
    text: int | None

    @property
    def depth(self) -> float:
        """Position from 0, the first block, to 1, the last."""
        return self.index / max(1, self.count - 1)


@dataclass(frozen=True)
class Tokens:
    """What a block returned: ``image [n, l, c]``, and ``text [n, m, c]`` or None.

    ``again`` calls the block at other image tokens, with its other arguments as they were, and returns image tokens.
    """

    image: Tensor
    text: Tensor | None
    again: Callable[[Tensor], Tensor]


Change = Callable[[TransformerBlock, Tokens], tuple[Tensor, Tensor | None] | None]


def transformer_blocks(network: nn.Module) -> list[TransformerBlock]:
    """The blocks of a transformer whose outputs are known, in order; without those that refine one kind of tokens first.

    Raises:
        ValueError: if there are none, as in UNets, whose blocks are not all of one size.
    """
    from diffusers.hooks._helpers import TransformerBlockRegistry

    whole, found = getattr(network, "_orig_mod", network), []
    lists = [(n, part) for n, part in whole.named_children() if isinstance(part, nn.ModuleList) and "refiner" not in n]
    for name, module in ((f"{name}.{k}", module) for name, part in lists for k, module in enumerate(part)):
        cls = type(getattr(module, "_orig_mod", module))
        try:
            about = TransformerBlockRegistry.get(cls)
            found.append((module, name, about.return_hidden_states_index, about.return_encoder_hidden_states_index))
        except ValueError:
            if cls.__name__ in UNREGISTERED:
                found.append((module, name, *UNREGISTERED[cls.__name__]))
    if not found:
        raise ValueError(
            f"{type(whole).__name__} has no transformer blocks that diffusers registers; choose space='activations', which "
            "takes any network, or space='x0'"
        )
    return [TransformerBlock(module, name, k, len(found), *where) for k, (module, name, *where) in enumerate(found)]


def hook_block(block: TransformerBlock, change: Change) -> Any:
    """Replace what a block returns by what ``change`` makes of it, until ``remove()`` of the result is called.

    Args:
        block: the block, which may be compiled.
        change: returns image and text tokens, or None to keep them.
    """
    module = block.module

    def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
        several = list(output) if isinstance(output, tuple) else [output]
        at = block.image if isinstance(output, tuple) else 0

        def again(image: Tensor) -> Tensor:
            if args:
                out = module.forward(image, *args[1:], **kwargs)
            else:
                out = module.forward(**{**kwargs, "hidden_states": image})
            return out[at] if isinstance(out, tuple) else out

        text_at = block.text if isinstance(output, tuple) else None
        changed = change(block, Tokens(several[at], None if text_at is None else several[text_at], again))
        if changed is None:
            return output
        several[at] = changed[0]
        if text_at is not None:
            several[text_at] = changed[1]
        return tuple(several) if isinstance(output, tuple) else several[0]

    def around_compiled(compiled: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: hook(module, args, kwargs, compiled(*args, **kwargs))

    if getattr(module, "_compiled_call_impl", None) is not None:  # hooks would be part of the graph
        return MethodPatch(module, "_compiled_call_impl", around_compiled, change)
    return module.register_forward_hook(hook, with_kwargs=True)


class BlockHooks:
    """Hooks on the blocks that a handler asks for: in the first call of the denoiser at each step it changes their tokens.

    With classifier-free guidance these are the rows with the prompt: of a batched call half of the rows, of two calls the
    first.

    Args:
        pipe: the pipeline.
        handler: returns the present handler.
        watch: observes the calls of the denoisers.
        hook: the hook on the scheduler, which knows the step.
        call: returns the data of the present call.

    Raises:
        ValueError: if the handler asks for blocks of a network that has none, or whose code is compiled as a whole.
    """

    def __init__(
        self,
        pipe: Any,
        handler: Callable[[], StepHandler],
        watch: DenoiserWatch,
        hook: Callable[[], SchedulerHook],
        call: Callable[[], CallContext],
    ):
        self._handler, self._watch, self._hook, self._call = handler, watch, hook, call
        self._known: tuple[Any, ComingStep] | None = None  # the denoiser's call, and its step
        self._handles: list[Any] = []
        for denoiser in denoisers_of(pipe):
            blocks = handler().blocks(denoiser)
            if blocks and (hasattr(denoiser, "_orig_mod") or getattr(denoiser, "_compiled_call_impl", None) is not None):
                raise ValueError(
                    f"{type(pipe).__name__} has a compiled denoiser, whose blocks cannot be reached; compile its blocks "
                    "instead, denoiser.compile_repeated_blocks(), or choose another space, such as 'x0'"
                )
            for block in blocks:
                self._handles.append(hook_block(block, self._change))

    def _change(self, block: TransformerBlock, tokens: Tokens) -> tuple[Tensor, Tensor | None] | None:
        call = self._watch.kept
        if call is None or call.outputs:  # a further call of the step, or one of another pipeline
            return None
        if self._known is None or self._known[0] is not call:
            self._known = call, self._coming(call.module, tokens.image)
        return self._handler().inside(block, tokens, self._known[1])

    def _coming(self, denoiser: nn.Module, image: Tensor) -> ComingStep:
        call = self._call()
        context, step, total = self._hook().coming(call)
        n, rows = call.count or len(image), len(image)
        if not call.count and getattr(call.pipe, "do_classifier_free_guidance", False):
            n = rows // 2
        if rows not in (n, 2 * n):
            raise ValueError(
                f"blocks of {type(denoiser).__name__} return {rows} rows for {n} samples, and need one row for each, or "
                "two with classifier-free guidance; choose space='activations' or 'x0'"
            )
        first = type(denoiser).__name__.startswith(COND_FIRST)
        wanted = slice(0, n) if first else slice(rows - n, rows)
        if context is not None:
            prompts = context.prompts
        else:
            prompts = prompts_of_samples(call.prompts, n, image.device, call.class_labels, call.warn)
        return ComingStep(call, context, step, total, wanted, prompts)

    def remove(self) -> None:
        """Remove the hooks."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
