"""What methods inside transformer blocks share: the blocks that diffusers registers, and hooks on their outputs."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import Tensor, nn

from kspec_guidance.bench.methods.base import Method

__all__ = ["Block", "BlockMethod", "Tokens", "transformer_blocks"]


@dataclass(frozen=True)
class Block:
    """A transformer block: its position among all of them and where its outputs are in what it returns.

    ``image`` and ``text`` are indices into a tuple; ``text`` is None for blocks that return no text tokens.
    """

    module: nn.Module
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
    """What a block returned, at a position ``fraction`` of the run, 0 at its start.

    ``image [n, l, c]`` and ``text [n, m, c]``, or None. Rows before ``prompted`` are those of the empty prompt. ``again``
    calls the block at other image tokens, all its other arguments as they were, and returns image tokens.
    """

    image: Tensor
    text: Tensor | None
    prompted: int
    fraction: float
    again: Callable[[Tensor], Tensor]


def transformer_blocks(network: nn.Module) -> list[Block]:
    """The blocks of a denoiser whose outputs diffusers knows, in order.

    Raises:
        ValueError: if there is none, as in UNets.
    """
    found = []
    for module in network.modules():
        try:
            found.append((module, TransformerBlockRegistry.get(type(module))))
        except ValueError:
            continue
    if not found:
        raise ValueError(f"{type(network).__name__} has no transformer blocks that diffusers registers")
    return [
        Block(module, k, len(found), about.return_hidden_states_index, about.return_encoder_hidden_states_index)
        for k, (module, about) in enumerate(found)
    ]


@dataclass
class BlockMethod(Method):
    """Base class of methods that change what transformer blocks return."""

    needs = frozenset({"blocks"})

    def change(self, block: Block, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
        """The block's image and text tokens, as the next block is to get them."""
        return tokens.image, tokens.text

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator["Method"]:
        with ExitStack() as hooks, super()._attached(pipe):
            for block in transformer_blocks(pipe.transformer):
                hook = self._hook(pipe, block)
                hooks.callback(block.module.register_forward_hook(hook, with_kwargs=True).remove)
            yield self

    def _hook(self, pipe: Any, block: Block) -> Any:
        def hook(module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> Any:
            several = list(output) if isinstance(output, tuple) else [output]
            text = None if block.text is None else several[block.text]

            def again(image: Tensor) -> Tensor:
                if args:
                    out = module.forward(image, *args[1:], **kwargs)
                else:
                    out = module.forward(**{**kwargs, "hidden_states": image})
                return out[block.image] if isinstance(out, tuple) else out

            prompted = len(several[block.image]) // 2 if getattr(pipe, "do_classifier_free_guidance", False) else 0
            tokens = Tokens(several[block.image], text, prompted, self._fraction(pipe), again)
            image, changed = self.change(block, tokens)
            several[block.image] = image
            if block.text is not None:
                several[block.text] = changed
            return tuple(several) if isinstance(output, tuple) else several[0]

        return hook
