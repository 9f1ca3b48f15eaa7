"""Which memory for how many images."""

import math
from collections.abc import Sequence

import torch

from kspec_guidance.memory.bank import MemoryBank
from kspec_guidance.memory.centroids import CentroidMemory

__all__ = ["choose_memory"]

BUDGET_BYTES = 4 << 30
MAX_MEANS = 2048


def choose_memory(images: int, shape: Sequence[int], budget: int = BUDGET_BYTES) -> MemoryBank | CentroidMemory:
    """What ``memory="auto"`` makes: exact rows while they fit, in half precision while those fit, weighted means beyond.

    The rule, for ``d`` numbers per sample: ``4 d images <= budget`` float32 rows; ``2 d images <= budget`` float16 rows;
    otherwise a :class:`CentroidMemory` of at most 2,048 means and an eighth of the budget. It depends on these numbers
    alone, so that a run is repeated on another machine. Random features are never picked: with them gradients are
    good for wide kernels in low dimension only (:meth:`RandomFourierFeatures.reliable`); ask for them by ``feature_map=``.

    Args:
        images: how many will be added.
        shape: of one sample in the guide's space.
        budget: bytes that the memory may take; 4 GiB, of the device that the samples are on.

    >>> choose_memory(10_000, (4, 16, 16)), choose_memory(10**6, (4, 64, 64))
    (MemoryBank(0 entries, shape=None, prompt_dim=None, space=None), CentroidMemory(0 entries in 0 means, shape=None))
    """
    width = math.prod(shape)
    if images * width * 4 <= budget:
        return MemoryBank()
    if images * width * 2 <= budget:
        return MemoryBank(dtype=torch.float16)
    return CentroidMemory(capacity=max(2, min(MAX_MEANS, budget // 8 // (width * 4))))
