"""Nearest rows by cosine: near-duplicates within a set, and the largest cosine to another."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import l2_normalize

__all__ = ["Duplicate", "largest_cosine", "near_duplicates", "prompt_bound", "redundant"]

BLOCK_ROWS = 1024


@dataclass(frozen=True)
class Duplicate:
    """Two rows, by index, and the cosine of their features."""

    first: int
    second: int
    cosine: float


def near_duplicates(x: Tensor, pairs: int = 12, at_least: float = 0.9) -> list[Duplicate]:
    """The pairs of rows with the largest cosines, most similar first.

    Args:
        x: features ``[n, d]``.
        pairs: maximum number of pairs.
        at_least: minimum cosine of a pair.
    """
    u, found = l2_normalize(on_host(x)), []
    for start in range(0, len(u), BLOCK_ROWS):
        block = u[start : start + BLOCK_ROWS] @ u.T
        i = torch.arange(start, start + len(block))[:, None]
        block = block.masked_fill(torch.arange(len(u))[None] <= i, -math.inf)
        values, flat = block.flatten().topk(min(pairs, block.numel()))
        rows, columns = flat // len(u) + start, flat % len(u)
        candidates = zip(rows.tolist(), columns.tolist(), values.tolist(), strict=True)
        found += [Duplicate(a, b, v) for a, b, v in candidates if a < b and v >= at_least]
    return sorted(found, key=lambda d: -d.cosine)[:pairs]


def redundant(x: Tensor, at_least: float) -> list[int]:
    """Rows to leave out so that no two of the others have a cosine of ``at_least`` or more; of several the first stays.

    Args:
        x: features ``[n, d]``.
        at_least: cosine from which a row repeats another.
    """
    u = l2_normalize(on_host(x))
    leave_out = torch.zeros(len(u), dtype=torch.bool)
    for start in range(0, len(u), BLOCK_ROWS):
        close = u[start : start + BLOCK_ROWS] @ u.T >= at_least
        for i, row in enumerate(close, start):
            leave_out[i] = bool((row[:i] & ~leave_out[:i]).any())
    return leave_out.nonzero().flatten().tolist()


def largest_cosine(x: Tensor, others: Tensor) -> Tensor:
    """Largest cosine of each row of ``x`` ``[n, d]`` with the rows of ``others`` ``[m, d]``, as ``[n]``; NaN if m is 0."""
    if not len(others):
        return torch.full((len(x),), float("nan"))
    return (l2_normalize(x.cpu().float()) @ l2_normalize(others.cpu().float()).T).amax(1)


def prompt_bound(x: Tensor, groups: Sequence[Sequence[int]]) -> dict[int, float]:
    """How much closer each image is to the other images of its prompt than to those of other prompts.

    The difference of mean cosines, in -2..2: large for images that a prompt brings out again and again, near 0 or below
    for images that might be of any prompt.

    Args:
        x: features ``[n, d]``.
        groups: indices of the images of each prompt, at least two of each.

    Returns:
        Values by the indices of the images; empty for fewer than two prompts.
    """
    if len(groups) < 2:
        return {}
    u, found = l2_normalize(on_host(x)), dict[int, float]()
    sums = torch.stack([u[list(g)].sum(0) for g in groups])
    total, images = sums.sum(0), sum(map(len, groups))
    for group, own in zip(groups, sums, strict=True):
        rows = u[list(group)]
        same = (rows @ own - 1) / (len(group) - 1)
        other = rows @ (total - own) / (images - len(group))
        found |= dict(zip(group, (same - other).tolist(), strict=True))
    return found
