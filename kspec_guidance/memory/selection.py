"""Selection: the rows of a memory that matter to the prompts at hand, and one pass over them."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.kernels import Kernel
from kspec_guidance.kernels.distances import as_float, far_centre
from kspec_guidance.memory.store import RowStore

__all__ = ["PromptWeights", "Selection", "prune"]

BLOCK_BYTES = 4 << 20  # rows read at once on a CPU: they are used twice, the second time out of its cache
BLOCK_BYTES_GPU = 64 << 20
NEAR_SHARE, NEAR_BYTES = 0.05, 512 << 20  # of a store that a selection of its rows may copy, and the most
RUN = 16  # rows side by side from which they are read as they lie
CENTRE = 32  # rows by which it is judged whether all lie far from the origin


@dataclass(frozen=True)
class PromptWeights:
    """``k_T(t, s)^power``: how much a sample of prompt ``s`` counts for one of prompt ``t``."""

    kernel: Kernel
    power: int = 2

    def __call__(self, t: Tensor, s: Tensor) -> Tensor:
        return self.kernel(t, s).pow(self.power)


def prune(weights: Tensor, counts: Tensor, tolerance: float) -> Tensor:
    """Which prompts to keep ``[P]`` (bool), of weights ``[n, P]`` and numbers of rows ``[P]``.

    What is dropped weighs together, for each of the n samples, at most the part ``tolerance`` of all rows' weight, or of
    one row of weight 1 if all weigh less. Since a gradient is a sum over rows, it changes by at most so much times the
    steepest slope of one row: for ``k^2`` of a Gaussian of bandwidth b that is ``sqrt(2 / e) / b``.
    """
    every = weights.double() * counts.to(weights.device)
    allowed = tolerance * every.sum(1).min().clamp_min(1.0)
    mass, order = every.amax(0).sort()
    keep = torch.ones(len(mass), dtype=torch.bool, device=mass.device)
    keep[order[mass.cumsum(0) <= allowed]] = False
    return keep.cpu()


def _spans(store: RowStore, places: Tensor) -> list[int] | None:
    """Lengths of the runs of rows that lie side by side, where such runs are long enough to be read as they lie."""
    if len(places) < RUN:
        return None
    ends = torch.cat([(places.diff() != 1).nonzero().squeeze(1) + 1, torch.tensor([len(places)])])
    if len(places) / len(ends) < RUN:
        return None
    spans, start = [], 0
    for end in ends.tolist():
        first = int(places[start])
        spans += [len(view) for view in store.view(first, first + end - start)]
        start = end
    return spans


def _evenly(n: int, about: int) -> list[int]:
    """Parts of about so many, as even as can be: short runs are not cut into a block and a rest."""
    parts = max(1, n // about)
    return [n // parts + (k < n % parts) for k in range(parts)]


class Selection:
    """Rows of a store, their weights for each sample at hand, and their norms.

    Args:
        store: holds the rows.
        places: of the rows ``[m]``, sorted, on the host; None for the first ``len(norms)`` rows.
        weights: ``[n, m]``, ``[1, m]`` where they are the same for all samples, or None where all rows count alike.
        norms: of the rows as stored ``[m]``, on the host.
        unit: whether rows are to be taken at norm 1.
        squares: mean squared norms ``[m]`` of what the rows are means of; their own if None.
    """

    def __init__(
        self,
        store: RowStore | None,
        places: Tensor | None,
        weights: Tensor | None,
        norms: Tensor,
        unit: bool,
        squares: Tensor | None = None,
    ):
        self.store, self.places, self.weights, self.unit = store, places, weights, unit
        self.means = squares is not None
        self._near: object = None
        self._spans = None if store is None or places is None else _spans(store, places)
        self._centre: tuple[Tensor | None] | None = None
        alive = norms > 0
        self.scale = torch.where(alive, 1 / torch.where(alive, norms, 1), 1) if unit else None
        self.squares = squares if squares is not None else alive.to(norms) if unit else norms.square()

    def __len__(self) -> int:
        return len(self.squares)

    def of(self, samples: Tensor) -> "Selection":
        """The same rows, for some of the samples (a mask or places ``[n]``)."""
        part = copy.copy(self)
        if self.weights is not None and len(self.weights) > 1:  # one row of weights is for all samples
            part.weights = self.weights[samples]
        return part

    def mass(self, n: int) -> Tensor:
        """Sum of the weights for each of ``n`` samples ``[n]``."""
        if self.weights is None:
            return torch.full((n,), float(len(self)))
        return self.weights.sum(1)

    def near(self, like: Tensor) -> Tensor | None:
        """The rows side by side ``[m, d]``, in the dtype and on the device of ``like``, not scaled; None if too many.

        Few rows out of many are copied once for each image, at its first guided step: at most 5% of the store, and 512 MB.
        """
        if self.store is None or self.places is None or self._spans is not None:
            return None
        like, store = as_float(like), self.store
        if len(self) * store.width * like.element_size() > min(NEAR_BYTES, NEAR_SHARE * store.nbytes):
            return None
        near = store.room("near", len(self), like.dtype, like.device)
        if store.near_of is not self or self._near != (like.dtype, like.device):
            store.near_of, self._near = None, (like.dtype, like.device)
            same = store.dtype == like.dtype and store.device == like.device
            rows = store.gather(self.places, near if same else None)
            if rows.data_ptr() != near.data_ptr():
                near.copy_(rows)
            store.near_of = self
        return near

    def strided(self, like: Tensor, most: int) -> tuple[Tensor, slice]:
        """About ``most`` evenly spaced rows, not scaled, and their places; without a copy where rows lie side by side."""
        step = max(1, round(len(self) / most))
        near = self.near(like)
        if near is not None:
            return near[::step], slice(None, None, step)
        places = torch.arange(0, len(self), step)
        assert self.store is not None
        where = places if self.places is None else self.places[places]
        room = self.store.room("some", len(where), self.store.dtype, self.store.device)
        return self.store.gather(where, room).to(as_float(like)), slice(None, None, step)

    def centre(self, like: Tensor) -> Tensor | None:
        """A point amid the rows as they are compared, if they lie so far from the origin that digits would be lost."""
        if self._centre is None or (self._centre[0] is not None and self._centre[0].device != like.device):
            self._centre = (far_centre(self.rows(like, self.some(CENTRE))),)
        found = self._centre[0]
        return None if found is None else found.to(as_float(like))

    def _most(self, like: Tensor) -> int:
        """Rows in a block."""
        assert self.store is not None
        room = BLOCK_BYTES_GPU if like.device.type != "cpu" else BLOCK_BYTES // (2 if len(like) > 3 else 1)
        return max(4, room // (self.store.width * as_float(like).element_size()))

    def sizes(self, like: Tensor) -> list[int]:
        """How many rows each of the :meth:`blocks` has."""
        if self.store is None or not len(self):
            return []
        spans = self._spans or [len(self)]
        if self.places is None:
            spans = [len(view) for view in self.store.view(0, len(self))]
        return [size for span in spans for size in _evenly(span, self._most(like))]

    def blocks(self, like: Tensor) -> Iterator[Tensor]:
        """The rows in order, not scaled, in blocks ``[k, d]`` in the dtype and on the device of ``like``. A block is good
        until the next one is asked for.
        """
        sizes = self.sizes(like)
        if not sizes or self.store is None:
            return
        like, store, near = as_float(like), self.store, self.near(like)
        if near is not None:
            yield from near.split(sizes)
            return
        if self.places is None:
            views = store.view(0, len(self))
            parts: Iterator[Tensor] = (b for view in views for b in view.split(_evenly(len(view), self._most(like))))
        else:
            room = store.room("gathered", max(sizes), store.dtype, store.device)
            parts = (store.gather(places, room) for places in self.places.split(sizes))
        if store.dtype == like.dtype and store.device == like.device:
            yield from parts
            return
        converted = store.room("converted", max(sizes), like.dtype, like.device)
        for part in parts:
            yield converted[: len(part)].copy_(part, non_blocking=store.pinned)

    def rows(self, like: Tensor, places: Tensor | None = None) -> Tensor:
        """All rows, or those at ``places`` of the selection (sorted), as they are compared: a copy ``[k, d]``."""
        if self.store is None or not len(self):
            return like.new_empty(0, like.shape[-1])
        index = torch.arange(len(self)) if places is None else places
        where = index if self.places is None else self.places[index]
        rows = self.store.gather(where).to(as_float(like))
        return rows if self.scale is None else rows * self.scale[index, None].to(rows)

    def some(self, most: int) -> Tensor:
        """At most so many places of the selection, evenly spaced."""
        if len(self) <= most:
            return torch.arange(len(self))
        return torch.linspace(0, len(self) - 1, most).round().long()
