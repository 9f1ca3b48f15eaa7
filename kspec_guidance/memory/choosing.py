"""Choice of a memory by number and size of samples."""

import math
from collections.abc import Sequence

import torch

from kspec_guidance.memory.bank import MemoryBank
from kspec_guidance.memory.centroids import CentroidMemory
from kspec_guidance.utils.devices import free_bytes, resolve_device

__all__ = ["choose_memory"]

BUDGET_BYTES = 4 << 30
BUDGET_SHARE = 0.5  # of the free memory of the device that is given
MAX_MEANS = 2048


def choose_memory(
    images: int, shape: Sequence[int], budget: int | None = None, device: torch.device | str | None = None
) -> MemoryBank | CentroidMemory:
    """The memory of ``memory="auto"``: exact rows if they fit the budget, in half precision if needed, else weighted means.

    The rule, for ``d`` numbers per sample: float32 rows if ``4 d images <= budget``; float16 rows if
    ``2 d images <= budget``; otherwise a :class:`CentroidMemory` of at most 2,048 means and an eighth of the budget, on the
    host. Random features are never chosen, since their gradients are accurate only for wide kernels in low dimension
    (:meth:`RandomFourierFeatures.reliable`); request them with ``feature_map=``.

    Args:
        images: number of images that will be added.
        shape: shape of one sample in the guide's space.
        budget: maximum size of the memory in bytes: by default 4 GiB, so that the choice is the same on all machines; with
            a ``device`` whose free memory is known (CUDA), half of that, if it is less.
        device: device of the rows; by default as for :class:`MemoryBank`: the host beyond an eighth of its free memory.

    >>> choose_memory(10_000, (4, 16, 16)), choose_memory(10**6, (4, 64, 64))
    (MemoryBank(0 entries, shape=None, prompt_dim=None, space=None), CentroidMemory(0 entries in 0 means, shape=None))
    """
    home = None if device is None else resolve_device(device)
    if budget is None:
        free = None if home is None else free_bytes(home)
        budget = BUDGET_BYTES if free is None else min(BUDGET_BYTES, int(BUDGET_SHARE * free))
    width = math.prod(shape)
    if images * width * 4 <= budget:
        return MemoryBank(device=home)
    if images * width * 2 <= budget:
        return MemoryBank(dtype=torch.float16, device=home)
    return CentroidMemory(capacity=max(2, min(MAX_MEANS, budget // 8 // (width * 4))))
