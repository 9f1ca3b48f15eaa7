"""Which process makes the images of which prompts: similar prompts go to the same one."""

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["relevant", "shard"]


def shard(features: Tensor, sizes: Sequence[int], parts: int) -> list[int]:
    """The part of each prompt, so that parts are equally large and similar prompts lie in one.

    The prompts are halved along the direction in which their features vary most, at the middle of the images, and each
    half again. Deterministic, ``O(n p log parts)``.

    Args:
        features: of the prompts ``[n, p]``.
        sizes: images of each prompt.
        parts: how many processes.

    >>> shard(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), [1, 1, 1, 1], 2)
    [0, 1, 0, 1]
    """
    if len(features) != len(sizes):
        raise ValueError(f"{len(features)} prompts' features but {len(sizes)} sizes; one for each prompt")
    owner = [0] * len(sizes)
    pending = [(list(range(len(sizes))), 0, parts)]
    while pending:
        members, first, count = pending.pop()
        if count == 1 or not members:
            for i in members:
                owner[i] = first
            continue
        rows = features[members].double()
        order = torch.argsort(_along(rows), stable=True).tolist()
        total, half = sum(sizes[i] for i in members), count // 2
        cut, reached = 0, 0
        while cut < len(order) and reached + sizes[members[order[cut]]] / 2 <= total * half / count:
            reached += sizes[members[order[cut]]]
            cut += 1
        pending.append((sorted(members[k] for k in order[:cut]), first, half))
        pending.append((sorted(members[k] for k in order[cut:]), first + half, count - half))
    return owner


def _along(rows: Tensor) -> Tensor:
    """Coordinates along the first principal direction, its sign fixed by its largest entry."""
    centred = rows - rows.mean(0)
    if len(rows) < 2 or not centred.abs().sum() > 0:
        return torch.arange(len(rows)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    direction = vectors[:, -1]
    return (centred @ direction * direction[direction.abs().argmax()].sign()).round(decimals=9)


def relevant(mine: Tensor, theirs: Tensor, weigh: object, least: float) -> Tensor:
    """Which prompts ``mine`` ``[n, p]`` weigh more than ``least`` for any of ``theirs`` ``[m, p]``; bool ``[n]``."""
    if not len(theirs):
        return torch.zeros(len(mine), dtype=torch.bool)
    return torch.cat([(weigh(part, theirs) > least).any(1) for part in mine.split(1024)])  # type: ignore[operator]
