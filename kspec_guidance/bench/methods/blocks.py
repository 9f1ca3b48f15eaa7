"""What methods inside transformer blocks share: hooks on the outputs of all blocks."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from kspec_guidance.bench.methods.base import Method
from kspec_guidance.loop.blocks import Tokens, TransformerBlock, hook_block, transformer_blocks

__all__ = ["BlockMethod", "TokensOfRun"]


@dataclass(frozen=True)
class TokensOfRun(Tokens):
    """What a block returned, at a position ``fraction`` of the run, 0 at its start.

    Rows before ``prompted`` are those of the empty prompt.
    """

    prompted: int = 0
    fraction: float = 0.0


@dataclass
class BlockMethod(Method):
    """Base class of methods that change what transformer blocks return."""

    needs = frozenset({"blocks"})

    def change(self, block: TransformerBlock, tokens: TokensOfRun) -> tuple[Tensor, Tensor | None]:
        """The block's image and text tokens, as the next block is to get them."""
        return tokens.image, tokens.text

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator["Method"]:
        def change(block: TransformerBlock, tokens: Tokens) -> tuple[Tensor, Tensor | None]:
            prompted = len(tokens.image) // 2 if getattr(pipe, "do_classifier_free_guidance", False) else 0
            return self.change(block, TokensOfRun(tokens.image, tokens.text, tokens.again, prompted, self._fraction(pipe)))

        with ExitStack() as hooks, super()._attached(pipe):
            for block in transformer_blocks(pipe.transformer):
                hooks.callback(hook_block(block, change).remove)
            yield self
