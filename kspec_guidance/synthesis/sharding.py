"""Which process makes the images of which prompts: similar prompts go to the same one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kspec_guidance.memory import PromptWeights

__all__ = ["groups_of", "relevant", "shard", "shard_groups"]

ALIKE = 0.5  # squared distance of unit-norm prompt features within which a prompt joins a group: weight 0.017 at 0.35
LARGEST = 0.05  # of a shard that one group may take; larger groups are parted, so that shards are even


def groups_of(features: Tensor, within: float = ALIKE, block: int = 1024) -> list[int]:
    """A group for each prompt: it joins the nearest founder of one within a squared distance, or founds one.

    One pass in order, against the founders only. Deterministic.
    """
    founders = features[:0]
    owner: list[int] = []
    for part in features.split(block):
        d2, nearest = torch.cdist(part, founders).square().min(1) if len(founders) else (None, None)
        start = len(founders)
        fresh: list[Tensor] = []
        for k, row in enumerate(part):
            best, where = (float("inf"), -1) if d2 is None or nearest is None else (float(d2[k]), int(nearest[k]))
            if fresh:
                near, place = (torch.stack(fresh) - row).square().sum(1).min(0)
                if float(near) < best:
                    best, where = float(near), start + int(place)
            if best > within:
                where = start + len(fresh)
                fresh.append(row)
            owner.append(where)
        founders = torch.cat([founders, torch.stack(fresh)]) if fresh else founders
    return owner


def shard(features: Tensor, sizes: Sequence[int], parts: int) -> list[int]:
    """The part of each prompt, so that parts are equally large and similar prompts lie in one.

    Prompts are gathered into groups of similar ones, which stay together unless they are large. Groups are halved along
    the direction in which their means vary most, at the middle of the images, and each half again. Deterministic.

    Args:
        features: of the prompts ``[n, p]``.
        sizes: images of each prompt.
        parts: how many processes.

    >>> shard(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), [1, 1, 1, 1], 2)
    [0, 1, 0, 1]
    """
    if len(features) != len(sizes):
        raise ValueError(f"{len(features)} prompts' features but {len(sizes)} sizes; one for each prompt")
    if parts == 1:
        return [0] * len(sizes)
    features = features.double()
    bundles = _bundles(groups_of(features), sizes, LARGEST * sum(sizes) / parts)
    centres = torch.stack([features[b].mean(0) for b in bundles]) if bundles else features
    loads = [sum(sizes[i] for i in b) for b in bundles]
    owner = [0] * len(sizes)
    pending = [(list(range(len(bundles))), 0, parts)]
    while pending:
        members, first, count = pending.pop()
        if count == 1 or not members:
            for i in (i for b in members for i in bundles[b]):
                owner[i] = first
            continue
        order = [members[k] for k in torch.argsort(_along(centres[members]), stable=True).tolist()]
        half, total = count // 2, sum(loads[b] for b in members)
        cut, reached = 0, 0
        while cut < len(order) and reached + loads[order[cut]] / 2 <= total * half / count:
            reached += loads[order[cut]]
            cut += 1
        pending.append((sorted(order[:cut]), first, half))
        pending.append((sorted(order[cut:]), first + half, count - half))
    return owner


def shard_groups(groups: Sequence[str | None], sizes: Sequence[int], parts: int) -> list[int]:
    """The part of each prompt, every group in one part: the largest group first, each to the part that has least.

    >>> shard_groups(["a", "b", "a", "c"], [3, 4, 3, 1], 2)
    [0, 1, 0, 1]
    """
    totals: dict[str | None, int] = {}
    for group, size in zip(groups, sizes, strict=True):
        totals[group] = totals.get(group, 0) + size
    loads, owner = [0] * parts, {}
    for group, total in sorted(totals.items(), key=lambda item: -item[1]):
        owner[group] = loads.index(min(loads))
        loads[owner[group]] += total
    return [owner[group] for group in groups]


def _bundles(groups: Sequence[int], sizes: Sequence[int], largest: float) -> list[list[int]]:
    """Members of each group, in pieces of at most so many images, of single prompts at least."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    pieces = []
    for whole in members.values():
        piece: list[int] = []
        for i in whole:
            if piece and sum(sizes[k] for k in piece) + sizes[i] > largest:
                pieces.append(piece)
                piece = []
            piece.append(i)
        pieces.append(piece)
    return pieces


def _along(rows: Tensor) -> Tensor:
    """Coordinates along the first principal direction, its sign fixed by its largest entry."""
    centred = rows - rows.mean(0)
    if len(rows) < 2 or not centred.abs().sum() > 0:
        return torch.arange(len(rows)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    direction = vectors[:, -1]
    return (centred @ direction * direction[direction.abs().argmax()].sign()).round(decimals=9)


def relevant(mine: Tensor, theirs: Tensor, weigh: PromptWeights, least: float) -> Tensor:
    """Which prompts ``mine`` ``[n, p]`` weigh more than ``least`` for any of ``theirs`` ``[m, p]``; bool ``[n]``."""
    if not len(theirs):
        return torch.zeros(len(mine), dtype=torch.bool)
    return torch.cat([(weigh(part, theirs) > least).any(1) for part in mine.split(1024)])
