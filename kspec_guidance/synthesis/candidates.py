"""Which of several candidates of an image is kept: the choice that raises the entropy given the prompts."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kspec_guidance.comparison import entropy_projection

__all__ = ["choose_candidates"]

ENTROPY_WEIGHT = 1.0  # the choice is of one candidate each, so only the order of weights counts
EARLIER_ROWS = 64  # earlier images that are compared with


def choose_candidates(
    features: Tensor, prompt_features: Tensor, usable: Sequence[bool], candidates: int, earlier: Tensor, of_earlier: Tensor
) -> list[int]:
    """The index of the kept candidate of each image to be made, in blocks of ``candidates`` rows.

    :func:`~kspec_guidance.comparison.entropy_projection` weighs the candidates of all images of the batch, given the
    earlier images of its prompts. One image after the other keeps its candidate of largest weight, and the weights
    of the next ones are computed given that choice: else all would choose the same rare kind.

    Args:
        features: of the candidates ``[n, d]``.
        prompt_features: of their prompts ``[n, p]``.
        usable: whether each passed the filters.
        candidates: m, the number of rows of a block.
        earlier: features of kept images of the same prompts ``[k, d]``; the last 64 count.
        of_earlier: of their prompts ``[k, p]``.

    Returns:
        One index for each block in which any candidate is usable, in order.
    """
    blocks = []  # of m indices each: unusable candidates are replaced by usable ones of the block
    for start in range(0, len(features), candidates):
        good = [k for k in range(start, start + candidates) if usable[k]]
        if good:
            blocks.append([good[k % len(good)] for k in range(candidates)])
    earlier, of_earlier = (z[-EARLIER_ROWS:].repeat_interleave(candidates, 0) for z in (earlier, of_earlier))
    chosen: list[int] = []
    for position, block in enumerate(blocks):
        if len(set(block)) > 1:
            decided = [k for k in chosen for _ in range(candidates)]
            rows = [*decided, *(k for later in blocks[position:] for k in later)]
            x, t = torch.cat([earlier, features[rows]]), torch.cat([of_earlier, prompt_features[rows]])
            weights = entropy_projection(x, t, candidates, ENTROPY_WEIGHT)
            first = len(earlier) + len(decided)
            best = int(weights[first : first + candidates].round(decimals=6).argmax())  # equal candidates: the first
        else:
            best = 0
        chosen.append(block[best])
    return chosen
