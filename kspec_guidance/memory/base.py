"""What all memories share: the description of their entries, and the refusal of what cannot be compared with them."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel
from kspec_guidance.kernels.distances import as_float

__all__ = ["Described"]


def _rows(x: Tensor, what: str) -> Tensor:
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] == 0:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{what} must be a tensor [n, ...] with n of at least 1, got {got}")
    if not torch.isfinite(x).all():
        raise ValueError(f"{what} hold NaN or infinite values; nothing was added")
    return as_float(x.detach()).flatten(1)


class Described:
    """What a memory knows of its entries; it refuses entries that cannot be compared with them."""

    shape: tuple[int, ...] | None
    space: str | None
    prompt_encoder: str | None
    prompt_dim: int | None

    def __init__(self, space: str | None = None, prompt_encoder: str | None = None):
        self.space, self.prompt_encoder = space, prompt_encoder
        self.shape = self.prompt_dim = None

    def __len__(self) -> int:
        raise NotImplementedError

    def bind(self, shape: tuple[int, ...], space: str, prompt_encoder: str | None) -> None:
        """Claim the memory for a pipeline; what is still unknown is filled in.

        Raises:
            ValueError: if the memory was filled by something whose entries mean something else.
        """
        shape = tuple(shape)
        if len(self):
            cure = "use a separate memory for each, or clear() this one"
            if self.shape not in (None, shape):
                raise ValueError(f"memory holds features of shape {self.shape}, this pipeline makes {shape}; {cure}")
            if self.space not in (None, space):
                raise ValueError(f"memory holds entries of space {self.space!r}, this guide works in {space!r}; {cure}")
            if None not in (self.prompt_encoder, prompt_encoder) and self.prompt_encoder != prompt_encoder:
                raise ValueError(
                    f"memory holds prompts encoded by {self.prompt_encoder}, this pipeline uses {prompt_encoder}; {cure}"
                )
        self.shape, self.space = shape, space
        self.prompt_encoder = prompt_encoder if prompt_encoder is not None else self.prompt_encoder

    def _check(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        rows, shape = _rows(x, "samples"), tuple(x.shape[1:])
        if self.shape is not None and self.shape != shape:
            raise ValueError(f"memory holds features of shape {self.shape}, got {shape}; use a memory of its own for them")
        if t is not None:
            t = CosineKernel.unit(_rows(t, "prompt features"))[0]
            if len(t) != len(rows):
                raise ValueError(f"{len(rows)} samples but {len(t)} prompt features; one row for each sample")
        if len(self):
            width = None if t is None else t.shape[1]
            if self.prompt_dim != width:
                holds = "no prompts" if self.prompt_dim is None else f"prompt features of width {self.prompt_dim}"
                got = "no prompts" if width is None else f"width {width}"
                raise ValueError(f"memory holds {holds}, got {got}; use a separate memory, or clear() this one")
        return rows, t, shape

    def _about(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "space": self.space,
            "prompt_encoder": self.prompt_encoder,
            "prompt_dim": self.prompt_dim,
        }

    def _match(self, other: "Described") -> None:
        if type(self) is not type(other):
            raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        for name in ("shape", "space", "prompt_encoder", "prompt_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (
                len(self)
                and len(other)
                and mine != theirs
                and (name in ("shape", "prompt_dim") or None not in (mine, theirs))
            ):
                raise ValueError(f"memories differ in {name}: {mine} here, {theirs} there; they cannot be merged")

    def _adopt(self, other: "Described") -> None:
        for name in ("shape", "space", "prompt_encoder", "prompt_dim"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))
