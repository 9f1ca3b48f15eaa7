"""What processes tell each other of their images: rows, weighted means or a sum of random features, as one tensor."""

import torch
from torch import Tensor

from kspec_guidance.memory import CentroidMemory, Memory, MemoryBank, RandomFeatureMemory

__all__ = ["absorb", "delta"]

MEANS = 64  # that a process sends of all its images since the last exchange, if the memory itself holds means


def delta(memory: Memory, x: Tensor, t: Tensor | None) -> Tensor:
    """What ``memory`` needs to know of samples ``x`` ``[k, ...]`` with prompt features ``t`` ``[k, p]``.

    For a :class:`MemoryBank` rows ``[k, d + p]``; for a :class:`CentroidMemory` at most 64 means ``[c, d + p + 2]``; for a
    :class:`RandomFeatureMemory` one row of whole numbers, which add exactly. The last two do not grow with k.
    """
    rows = x.flatten(1).float().cpu()
    text = rows[:, :0] if t is None else t.float().cpu()
    if isinstance(memory, MemoryBank):
        return torch.cat([rows, text], 1)
    if isinstance(memory, CentroidMemory):
        means = CentroidMemory(max(2, min(MEANS, memory.capacity)), memory.spread, memory.prompt_spread, memory.normalize)
        if not len(rows):
            return rows.new_zeros(0, rows.shape[1] + text.shape[1] + 2)
        means.add(rows, None if t is None else text)
        text = rows[:0, :0].expand(len(means.x), 0) if means.prompts is None else means.prompts
        return torch.cat([means.x, text, means._squares[: len(means.x), None], means.weights[:, None]], 1)
    assert isinstance(memory, RandomFeatureMemory)
    part = memory.empty_copy()
    if len(rows):
        part.add(rows, None if t is None else text)
    return torch.cat([part.total.flatten(), torch.tensor([len(part)])])[None]


def absorb(memory: Memory, told: Tensor, shape: tuple[int, ...], prompt_dim: int | None) -> None:
    """Add what :func:`delta` made in another process."""
    width, p = int(torch.Size(shape).numel()), prompt_dim or 0
    if not len(told):
        return
    if isinstance(memory, RandomFeatureMemory):
        memory.add_total(told[0, :-1].view_as(memory.total), int(told[0, -1]))
        return
    text = told[:, width : width + p] if p else None
    if isinstance(memory, MemoryBank):
        memory.add(told[:, :width].reshape(-1, *shape), text)
    elif isinstance(memory, CentroidMemory):
        memory.shape, memory.prompt_dim = shape, prompt_dim
        memory.absorb(told[:, :width], text, told[:, -2], told[:, -1])
