"""Which process makes the images of which prompts: similar prompts go to the same one."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import on_host
from kspec_guidance.memory import PromptWeights

__all__ = ["bundles", "groups_of", "relevant", "shard", "shard_groups"]

GROUP_DISTANCE = 0.5  # squared, of unit-norm prompt features: at bandwidth 0.35 the weight is 0.017
MAX_GROUP_SHARE = 0.05  # of a shard; larger groups are split, so that shards are even


def groups_of(features: Tensor, within: float = GROUP_DISTANCE, block: int = 1024) -> list[int]:
    """Group similar prompts: each joins the group of the nearest founder, or founds a group.

    One pass in order, which compares prompts with the founders only. Deterministic.

    Args:
        features: of the prompts ``[n, p]``.
        within: largest squared distance of a prompt to the founder of its group.
        block: prompts that are compared at once.
    """
    founders = features[:0]
    groups: list[int] = []
    for part in features.split(block):
        d2, nearest = torch.cdist(part, founders).square().min(1) if len(founders) else (None, None)
        start = len(founders)
        new: list[Tensor] = []
        for k, row in enumerate(part):
            best, group = (float("inf"), -1) if d2 is None or nearest is None else (float(d2[k]), int(nearest[k]))
            if new:
                distance, index = (torch.stack(new) - row).square().sum(1).min(0)
                if float(distance) < best:
                    best, group = float(distance), start + int(index)
            if best > within:
                group = start + len(new)
                new.append(row)
            groups.append(group)
        founders = torch.cat([founders, torch.stack(new)]) if new else founders
    return groups


def shard(features: Tensor, sizes: Sequence[int], parts: int) -> list[int]:
    """Assign each prompt to a process, so that loads are equal and similar prompts are together.

    Prompts form groups of similar ones, which stay together unless they are large. Groups are split in two along the
    direction in which their means vary most, at the middle of the images, and so on with each half. Deterministic.

    Args:
        features: of the prompts ``[n, p]``.
        sizes: images of each prompt.
        parts: number of processes.

    Raises:
        ValueError: if the numbers of features and of sizes differ.

    >>> shard(torch.tensor([[0.0], [5.0], [0.1], [5.1]]), [1, 1, 1, 1], 2)
    [0, 1, 0, 1]
    """
    if len(features) != len(sizes):
        raise ValueError(f"{len(features)} prompts' features but {len(sizes)} sizes; one for each prompt")
    if parts == 1:
        return [0] * len(sizes)
    features = on_host(features)
    parts_of_groups = bundles(groups_of(features), sizes, MAX_GROUP_SHARE * sum(sizes) / parts)
    centres = torch.stack([features[b].mean(0) for b in parts_of_groups]) if parts_of_groups else features
    loads = [sum(sizes[i] for i in b) for b in parts_of_groups]
    owners = [0] * len(sizes)
    pending = [(list(range(len(parts_of_groups))), 0, parts)]
    while pending:
        members, first, count = pending.pop()
        if count == 1 or not members:
            for i in (i for b in members for i in parts_of_groups[b]):
                owners[i] = first
            continue
        order = [members[k] for k in torch.argsort(_principal_coordinates(centres[members]), stable=True).tolist()]
        half, total = count // 2, sum(loads[b] for b in members)
        cut, load = 0, 0
        while cut < len(order) and load + loads[order[cut]] / 2 <= total * half / count:
            load += loads[order[cut]]
            cut += 1
        pending.append((sorted(order[:cut]), first, half))
        pending.append((sorted(order[cut:]), first + half, count - half))
    return owners


def shard_groups(groups: Sequence[str | None], sizes: Sequence[int], parts: int) -> list[int]:
    """Assign each prompt to a process, whole groups at a time: the largest first, each to the process with least load.

    Args:
        groups: of the prompts.
        sizes: images of each prompt.
        parts: number of processes.

    >>> shard_groups(["a", "b", "a", "c"], [3, 4, 3, 1], 2)
    [0, 1, 0, 1]
    """
    totals: dict[str | None, int] = {}
    for group, size in zip(groups, sizes, strict=True):
        totals[group] = totals.get(group, 0) + size
    loads, owners = [0] * parts, {}
    for group, total in sorted(totals.items(), key=lambda item: -item[1]):
        owners[group] = loads.index(min(loads))
        loads[owners[group]] += total
    return [owners[group] for group in groups]


def bundles(groups: Sequence[int], sizes: Sequence[int], max_images: float) -> list[list[int]]:
    """Prompts of each group, in pieces of at most ``max_images`` images, but of one prompt at least."""
    members: dict[int, list[int]] = {}
    for i, group in enumerate(groups):
        members.setdefault(group, []).append(i)
    pieces = []
    for prompts in members.values():
        piece: list[int] = []
        for i in prompts:
            if piece and sum(sizes[k] for k in piece) + sizes[i] > max_images:
                pieces.append(piece)
                piece = []
            piece.append(i)
        pieces.append(piece)
    return pieces


def _principal_coordinates(rows: Tensor) -> Tensor:
    """Coordinates along the first principal direction, whose largest entry is positive."""
    centred = rows - rows.mean(0)
    if len(rows) < 2 or not centred.abs().sum() > 0:
        return torch.arange(len(rows)).double()
    _, vectors = torch.linalg.eigh(centred.T @ centred)
    direction = vectors[:, -1]
    return (centred @ direction * direction[direction.abs().argmax()].sign()).round(decimals=9)


def relevant(prompt_features: Tensor, other_features: Tensor, prompt_weights: PromptWeights, min_weight: float) -> Tensor:
    """Which prompts have a weight above ``min_weight`` for any of the other prompts.

    Args:
        prompt_features: ``[n, p]``.
        other_features: ``[m, p]``.
        prompt_weights: of a prompt for another.
        min_weight: in 0..1.

    Returns:
        bool ``[n]``.
    """
    if not len(other_features):
        return torch.zeros(len(prompt_features), dtype=torch.bool)
    parts = prompt_features.split(1024)
    return torch.cat([(prompt_weights(part, other_features) > min_weight).any(1) for part in parts])
