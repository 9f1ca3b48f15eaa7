"""Hidden states of a transformer block, compared and moved inside the denoiser's call."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from kspec_guidance.guidance.spaces.activations import check_stateless, check_whole
from kspec_guidance.guidance.spaces.base import FeatureSpace, Pullback
from kspec_guidance.loop.blocks import Tokens, TransformerBlock, transformer_blocks
from kspec_guidance.loop.context import CallContext, DenoiserCall

__all__ = ["Block", "Context"]


@dataclass(frozen=True)
class Block(FeatureSpace):
    """Image tokens of a transformer block: their mean is compared, and moved where the block has made it.

    The tokens of a sample, of the rows with the prompt, are all moved by the same vector, so that their mean follows the
    objective; the blocks behind make an image of them. That needs neither a second call of the denoiser nor a gradient
    through it, and scales are relative to the norm of the mean. In diffusion transformers this mean becomes alike for all
    seeds first (arXiv 2606.06813), and repulsion in it is that of arXiv 2606.27371 without inner iterations.

    Features at different noise levels are not comparable, so the memory stores one row of features per guided step, as in
    ``activations``. There is no score of hidden states: the transforms ``off_score`` and ``keep_prompt`` do not apply.

    Args:
        module: name of the block in the denoiser, such as ``transformer_blocks.9``; None for the middle one. For several
            blocks add guides: ``SPARKE(space=Block("blocks.2")) + SPARKE(space=Block("blocks.8"))``.
    """

    module: str | None = None
    name: ClassVar[str] = "block"
    direct: ClassVar[bool] = True
    inside: ClassVar[bool] = True
    step_by_step: ClassVar[bool] = True
    needs_denoiser_call: ClassVar[bool] = True

    @property
    def label(self) -> str:
        return f"{self.name}({self.module or 'middle'})"

    def _has(self, block: TransformerBlock) -> bool:
        return True

    def block_of(self, denoiser: nn.Module) -> TransformerBlock:
        """The block that is compared and moved.

        Raises:
            ValueError: for a network without known blocks, for an unknown name, for a split denoiser, or for a cache, which
                skips blocks.
        """
        check_whole(denoiser, self.name)
        check_stateless(denoiser, f"space={self.name!r} moves what a block returns, and a cache skips blocks")
        try:
            found = transformer_blocks(denoiser)
        except ValueError as error:
            raise ValueError(f"space={self.name!r} is for transformers: {error}") from None
        fit = [block for block in found if self._has(block)]
        if self.module is None and fit:
            return fit[(len(fit) - 1) // 2]
        named = [block for block in fit if block.name == self.module]
        if not named:
            names = ", ".join(block.name for block in fit)
            raise ValueError(
                f"space={self.name!r} has no block {self.module!r} in {type(denoiser).__name__}; it has {names}"
                if fit
                else f"space={self.name!r} needs a block that returns text tokens to a further block, and "
                f"{type(denoiser).__name__} has none; choose space='block'"
            )
        return named[0]

    def tokens_of(self, tokens: Tokens) -> Tensor:
        """The tokens ``[n, l, c]`` that are compared and moved.

        Raises:
            ValueError: if the block returned none.
        """
        return tokens.image

    def means(self, tokens: Tokens, rows: slice) -> Tensor:
        """Mean tokens ``[n, c]`` of the rows with the prompt."""
        x = self.tokens_of(tokens)[rows]
        return x.mean(tuple(range(1, x.ndim - 1)), dtype=x.dtype if x.dtype == torch.float64 else torch.float32)

    def moved(self, tokens: Tokens, rows: slice, move: Tensor) -> tuple[Tensor, Tensor | None]:
        """Image and text tokens with the mean of the rows with the prompt moved by ``[n, c]``."""
        x = self.tokens_of(tokens).clone()
        x[rows] += move.view(len(move), *[1] * (x.ndim - 2), -1).to(x.dtype)
        return self._with(tokens, x)

    def _with(self, tokens: Tokens, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return x, tokens.text

    def features(self, x: Tensor, call: CallContext, denoiser_call: DenoiserCall | None = None) -> tuple[Tensor, Pullback]:
        return x.flatten(1), lambda g: g.view(x.shape)

    def describe(self) -> dict[str, Any]:
        return {"name": self.name, "module": self.module}


@dataclass(frozen=True)
class Context(Block):
    """Text tokens of a transformer block that has them beside the image tokens: the prompt as that sample reads it.

    After each block of a multimodal transformer (SD 3, Flux, Qwen-Image) the text tokens differ from seed to seed; their
    repulsion chooses among the readings of a prompt (arXiv 2603.28762). Compared and moved as in :class:`Block`.

    Args:
        module: name of a block that returns text tokens, but not the last block; None for the middle one.
    """

    name: ClassVar[str] = "context"

    def _has(self, block: TransformerBlock) -> bool:
        return block.text is not None and block.index < block.count - 1  # nothing reads the text tokens of the last block

    def tokens_of(self, tokens: Tokens) -> Tensor:
        if tokens.text is None:
            raise ValueError(
                f"the block of space={self.name!r} has returned no text tokens; name another, Context(module=...), or "
                "choose space='block'"
            )
        return tokens.text

    def _with(self, tokens: Tokens, x: Tensor) -> tuple[Tensor, Tensor | None]:
        return tokens.image, x
