"""Semantic duplicates in large sets: near rows by an approximate index (faiss), in one pass and bounded memory."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.utils.arguments import is_number

__all__ = ["load_faiss", "semantic_duplicates"]

MAX_LISTS = 4096  # of the index
TRAIN_ROWS = 40  # for each list: what faiss advises as a minimum
PROBES = 8  # lists that are read for a row
ITERATIONS = 8  # of k-means
BLOCK_ROWS = 4096  # compared with each other exactly
ROUNDING = 2**-11  # of numbers in half precision: by so much the cosine of two equal rows may be below 1


def semantic_duplicates(
    blocks: Iterable[Tensor], rows: int, at_least: float = 0.95, seed: int = 0
) -> list[tuple[int, int, float]]:
    """Rows that nearly repeat an earlier row that is kept, over a whole set, whatever their prompts.

    Kept rows are stored in half precision, ``2 d + 8`` bytes each, in lists about the centres of a k-means of the first
    rows (``IVF, SQfp16`` of faiss), of which ``PROBES`` are read for a row: a duplicate far from all centres may be missed.
    Beside the index, ``TRAIN_ROWS`` rows for each list are held at the beginning. The result depends on the rows, in
    order, and the seed.

    Args:
        blocks: features ``[k, d]``, in order, read once; a generator may read them from files.
        rows: number of all rows.
        at_least: cosine from which a row repeats another, in (0, 1], to the rounding of half precision. Equal rows always
            repeat each other, rows of zeros none.
        seed: of k-means.

    Returns:
        For each row to leave out, in order: its index, that of the kept row that is most like it, and their cosine.

    Raises:
        ImportError: if faiss is not installed.
        ValueError: for a cosine out of range, rows that are not finite or of different lengths, or another number of rows
            than announced.
    """
    faiss = load_faiss(at_least)
    at_least = min(at_least, 1 - ROUNDING)
    lists = max(1, min(MAX_LISTS, int(4 * math.sqrt(rows)), rows // TRAIN_ROWS))
    found, kept = list[tuple[int, int, float]](), list[int]()
    index, held, done = None, list[Tensor](), 0
    for u in _rechunked(blocks):
        held.append(u)
        done += len(u)
        if index is None and done < min(rows, lists * TRAIN_ROWS):
            continue
        if index is None:
            index = _trained(faiss, torch.cat(held)[: max(lists, lists * TRAIN_ROWS)], lists, seed)
        for block in held:
            _add(index, block, at_least, found, kept)
        held.clear()
    if done != rows or not rows:
        raise ValueError(f"expected {rows} rows, at least one, and got {done}")
    return found


def load_faiss(at_least: Any) -> Any:
    """Check the cosine from which rows repeat others, and return the module faiss.

    Raises:
        ImportError: if faiss is not installed.
        ValueError: for a cosine out of range.
    """
    if not is_number(at_least) or not 0 < at_least <= 1:
        raise ValueError(f"semantic_duplicates is a cosine in (0, 1], e.g. 0.95, got {at_least!r}")
    try:
        import faiss
    except ImportError as error:
        raise ImportError("semantic duplicates need: pip install 'kspec-guidance[publish]'") from error
    return faiss


def _rechunked(blocks: Iterable[Tensor]) -> Iterator[Tensor]:
    """The rows at norm 1, in blocks of one size."""
    waiting: list[Tensor] = []
    for block in blocks:
        if block.ndim < 2:
            raise ValueError(f"blocks of features have shape [k, d], got {list(block.shape)}")
        x = block.detach().cpu().float().flatten(1)
        if waiting and x.shape[1] != waiting[0].shape[1]:
            raise ValueError(
                f"features have rows of {waiting[0].shape[1]} and of {x.shape[1]} numbers; compare those of one kind"
            )
        if not bool(x.isfinite().all()):
            raise ValueError("features contain NaN or infinite values")
        waiting += l2_normalize(x).split(BLOCK_ROWS) if len(x) else ()
        while sum(map(len, waiting)) >= BLOCK_ROWS:
            joined = torch.cat(waiting)
            yield joined[:BLOCK_ROWS]
            waiting = [joined[BLOCK_ROWS:]]
    if sum(map(len, waiting)):
        yield torch.cat(waiting)


def _trained(faiss: Any, x: Tensor, lists: int, seed: int) -> Any:
    """An empty index whose lists are those of a k-means of these rows."""
    index = faiss.index_factory(x.shape[1], f"IVF{lists},SQfp16", faiss.METRIC_INNER_PRODUCT)
    index.cp.seed, index.cp.niter, index.cp.min_points_per_centroid = seed, ITERATIONS, 1
    index.train(x.numpy())
    index.nprobe = PROBES
    return index


def _add(index: Any, u: Tensor, at_least: float, found: list[tuple[int, int, float]], kept: list[int]) -> None:
    """Compare a block with the rows that are kept and with itself, and add the rows that repeat none."""
    start = len(found) + len(kept)
    cosines, near = (torch.from_numpy(z[:, 0]) for z in index.search(u.numpy(), 1))
    cosines = cosines.masked_fill(near < 0, -1.0)
    inner = u @ u.T
    close = (inner >= at_least).tril(-1)
    keep = ~close.any(1) & (cosines < at_least)  # sure: nothing before them is close
    for i in (~keep).nonzero().flatten().tolist():
        mine = close[i, :i] & keep[:i]
        best, other = float(cosines[i]), int(near[i])
        repeats = best >= at_least
        if bool(mine.any()):
            j = int(inner[i, :i].masked_fill(~mine, -1.0).argmax())
            if not repeats or float(inner[i, j]) > best:
                best, other = float(inner[i, j]), -1 - j
            repeats = True
        if repeats:
            found.append((start + i, kept[other] if other >= 0 else start - 1 - other, min(1.0, best)))
        keep[i] = not repeats
    index.add(u[keep].numpy())
    kept += (keep.nonzero().flatten() + start).tolist()
