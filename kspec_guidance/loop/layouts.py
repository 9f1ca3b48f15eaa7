"""Layouts of scheduler samples, and their conversion to one row per image, clip or sound.

| kind | sample | used by |
|---|---|---|
| ``vector`` | ``[n, d]`` | priors of image embeddings |
| ``sequence`` | ``[n, l, c]`` or ``[n, c, l]`` | packed tokens (Flux, Qwen-Image, LTX), sound |
| ``image`` | ``[n, c, h, w]`` | most image pipelines, spectrograms |
| ``frames`` | ``[n f, c, h, w]`` | pipelines that flatten a clip's frames into the batch before the step |
| ``video`` | ``[n, c, f, h, w]`` | most video pipelines |
| ``several`` | a list or tuple of the above | states of several tensors, such as video with sound |

A clip is one sample: distances are computed over the whole clip, not frame by frame.
"""

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["Layout"]

KIND_BY_DIMENSIONS = {2: "vector", 3: "sequence", 4: "image", 5: "video"}
GUIDANCE_CALLS = 3  # predictions that classifier-free guidance combines at most: of the prompt, without it, of the image


@dataclass(frozen=True)
class Layout:
    """The layout of one scheduler's samples.

    Args:
        kind: see the module's table; ``other`` for more dimensions.
        group: number of consecutive rows that form one sample.
        copies: number of copies of the batch that are stepped together: some loops pass both halves of classifier-free
            guidance to the scheduler.
        shapes: shapes of the tensors of a ``several`` state, without the batch dimension.

    >>> x = torch.randn(6, 4, 8, 8)
    >>> Layout.of(x, count=2).pack(x).shape  # two clips of three frames
    torch.Size([2, 3, 4, 8, 8])
    >>> x = torch.randn(3, 4, 8, 8).repeat(2, 1, 1, 1)
    >>> Layout.of(x, count=3).pack(x).shape  # both halves of classifier-free guidance
    torch.Size([3, 4, 8, 8])
    """

    kind: str
    group: int = 1
    shapes: tuple[tuple[int, ...], ...] = ()
    copies: int = 1

    @classmethod
    def of(cls, sample: Any, count: int | None = None) -> "Layout":
        """The layout of a sample; ``count`` is the number of requested images or clips, if known.

        Raises:
            ValueError: if the sample, or one of its tensors, is not a tensor with a batch dimension.
        """
        if isinstance(sample, list | tuple):
            if not sample or not all(isinstance(s, Tensor) and s.ndim > 1 and len(s) == len(sample[0]) for s in sample):
                raise ValueError("a state of several tensors must contain tensors [n, ...] with equal n")
            return cls("several", 1, tuple(tuple(s.shape[1:]) for s in sample))
        if not isinstance(sample, Tensor) or sample.ndim < 2:
            got = list(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ValueError(f"a sample must be a tensor [n, ...], got {got}")
        kind = KIND_BY_DIMENSIONS.get(sample.ndim, "other")
        if count and len(sample) > count and len(sample) % count == 0:
            copies = len(sample) // count
            if copies <= GUIDANCE_CALLS and bool((sample.reshape(copies, -1) == sample[:count].reshape(1, -1)).all()):
                return cls(kind, copies=copies)
            return cls("frames", copies)
        return cls(kind)

    @functools.cached_property
    def trivial(self) -> bool:
        """Whether a sample is one tensor with one row per image or clip, so that packing has no effect."""
        return self.group == self.copies == 1 and self.kind != "several"

    def count(self, sample: Any) -> int:
        """Number of images or clips in the sample."""
        return len(sample[0]) if self.kind == "several" else len(sample) // self.group // self.copies

    @staticmethod
    def device(sample: Any) -> torch.device:
        """Device of the sample."""
        return (sample if isinstance(sample, Tensor) else sample[0]).device

    def pack(self, sample: Any) -> Tensor:
        """Convert a sample to one row per image or clip ``[n, ...]``."""
        if self.kind == "several":
            return torch.cat([s.flatten(1) for s in sample], dim=1)
        if self.copies > 1:
            return sample[: len(sample) // self.copies]
        return sample if self.group == 1 else sample.unflatten(0, (-1, self.group))

    def unpack(self, x: Tensor) -> Any:
        """The inverse of :meth:`pack`."""
        if self.kind == "several":
            sizes = [torch.Size(s).numel() for s in self.shapes]
            return tuple(p.view(len(x), *s) for p, s in zip(x.split(sizes, 1), self.shapes, strict=True))
        if self.copies > 1:
            return torch.cat([x] * self.copies)
        return x if self.group == 1 else x.flatten(0, 1)
