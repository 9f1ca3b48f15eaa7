"""CentroidMemory: weighted means of samples, in constant size."""

import os

import numpy as np
import torch
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory.base import Memory, check_finite, exclusive
from kspec_guidance.memory.io import MemoryFileError, read_tensors, write_tensors
from kspec_guidance.memory.selection import PromptWeights, Selection, prune
from kspec_guidance.memory.store import RowStore
from kspec_guidance.utils.arguments import is_integer
from kspec_guidance.utils.devices import send
from kspec_guidance.utils.transfer import on_host

__all__ = ["CentroidMemory"]

BLOCK = 128  # samples whose products with the means are computed at once


class CentroidMemory(Memory):
    """At most ``capacity`` weighted means of samples with similar images and prompts, at constant cost.

    When the memory is full, a further sample is merged into its nearest mean, or becomes a new mean after the two means
    that are cheapest to merge are merged, whichever costs less. The cost of a merge is the increase of the within-cluster
    sum of squares (Ward 1963). A mean represents its samples by their *mean* squared distance, which is known exactly: for
    rows of norm 1 it is ``2 - 2 x.c``. A gradient lies in the span of ``x - c``, so its direction is accurate where that
    of random features is not, in particular on raw latents.

    Args:
        capacity: maximum number of means.
        spread: distance of samples that is equivalent to a distance ``prompt_spread`` of prompts.
        prompt_spread: distance of unit-norm prompt features; by default the bandwidth of the prompt kernel.
        normalize: whether samples are scaled to norm 1 first, as for most objectives.
        space, prompt_encoder: see :class:`MemoryBank`.

    Raises:
        ValueError: for settings outside their ranges.
    """

    def __init__(
        self,
        capacity: int = 1024,
        spread: float = 0.7,
        prompt_spread: float = 0.35,
        normalize: bool = True,
        space: str | None = None,
        prompt_encoder: str | None = None,
    ):
        super().__init__(space, prompt_encoder)
        if not is_integer(capacity, 2):
            raise ValueError(f"capacity must be an integer of at least 2, got {capacity!r}")
        if not (spread > 0 and prompt_spread > 0):
            raise ValueError(f"spread and prompt_spread must be positive, got {spread!r} and {prompt_spread!r}")
        self.capacity, self.spread, self.prompt_spread, self.normalize = int(capacity), spread, prompt_spread, normalize
        self.clear()

    @exclusive
    def clear(self) -> None:
        """Remove all entries."""
        self._store: RowStore | None = None
        self._prompts: Tensor | None = None
        size, host = self.capacity, torch.device("cpu")
        self._weights, self._squares = torch.zeros(size, device=host), torch.zeros(size, device=host)
        # squared distances of the means and squared norms, of images and prompts together; the diagonal is infinite
        self._distances, self._norms = np.full((size, size), np.inf), np.zeros(size)
        # lower bounds of each mean's cheapest merge, and with which; _cheapest updates a bound only if it is the lowest
        self._best, self._mate = np.full(size, np.inf), np.zeros(size, dtype=np.int64)
        self._used = self._added = 0
        self.shape = self.prompt_dim = None

    def empty_copy(self) -> "CentroidMemory":
        """A memory with the same settings and no entries."""
        return CentroidMemory(
            self.capacity, self.spread, self.prompt_spread, self.normalize, self.space, self.prompt_encoder
        )

    def __len__(self) -> int:
        return self._added

    def __repr__(self) -> str:
        return f"CentroidMemory({len(self)} entries in {self._used} means, shape={self.shape})"

    @property
    def x(self) -> Tensor:
        """The means ``[c, d]``."""
        return torch.empty(0, 0, device="cpu") if self._store is None else self._store.chunks[0][: self._used]

    @property
    def prompts(self) -> Tensor | None:
        """Mean prompt features ``[c, p]``, or None."""
        return None if self._prompts is None else self._prompts[: self._used]

    @property
    def weights(self) -> Tensor:
        """Number of samples of each mean ``[c]``."""
        return self._weights[: self._used]

    @property
    def nbytes(self) -> int:
        """Bytes of the means, including reserved space."""
        return 0 if self._store is None else self._store.nbytes

    @exclusive
    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Add samples ``[n, ...]`` with prompt features ``[n, p]``.

        Raises:
            ValueError: for samples or prompts that do not match the memory, which is then unchanged.
        """
        rows, prompt, shape = self._check(x, prompt_features)
        rows = check_finite(as_float(rows.cpu()).float(), "samples")
        rows = l2_normalize(rows) if self.normalize else rows
        prompt = None if prompt is None else prompt.float()
        self._ready(rows.shape[1], None if prompt is None else prompt.shape[1])
        self.shape, self.prompt_dim = shape, None if prompt is None else prompt.shape[1]
        self._insert(rows, prompt, rows.square().sum(1), torch.ones(len(rows), device="cpu"))
        self._added += len(rows)

    def _insert(self, x: Tensor, prompts: Tensor | None, squares: Tensor, weights: Tensor) -> None:
        """Insert items ``[k, d]`` one after the other: samples, or means of another memory."""
        for part in torch.arange(len(x), device="cpu").split(BLOCK):
            _Block(self, x[part], None if prompts is None else prompts[part], squares[part], weights[part]).insert()

    def _products(self, x: Tensor, prompts: Tensor | None, y: Tensor, y_prompts: Tensor | None) -> np.ndarray:
        """Inner products ``[n, m]`` of items, of which squared distances of images and prompts together are made."""
        found = (x @ y.mT).double() / self.spread**2
        if prompts is not None and y_prompts is not None:
            found += (prompts @ y_prompts.mT).double() / self.prompt_spread**2
        return found.numpy()

    def _cheapest(self) -> tuple[int, int]:
        """The two means that are cheapest to merge."""
        weights = self.weights.numpy()
        while True:
            a = int(self._best.argmin())
            costs = _costs(self._distances[a, : self._used], weights, weights[a])
            b = int(self._mate[a])
            if costs[b] <= self._best[a]:
                return a, b
            self._mate[a] = costs.argmin()
            self._best[a] = costs[self._mate[a]]

    @exclusive
    def select(
        self,
        prompt_features: Tensor | None = None,
        prompt_weights: PromptWeights | None = None,
        tolerance: float = 0.0,
        normalize: bool = True,
    ) -> Selection:
        """The relevant means for samples of these prompts ``[n, p]``; arguments as for :meth:`Memory.select`.

        Raises:
            ValueError: if ``normalize`` differs from that of the memory.
        """
        if normalize != self.normalize:
            raise ValueError(
                f"this memory has normalize={self.normalize}, the objective has normalize={normalize}; use "
                f"CentroidMemory(normalize={normalize})"
            )
        c, norms = self._used, torch.ones(self._used, device="cpu")
        if prompt_features is None or prompt_weights is None or self._prompts is None:
            return Selection(self._store, None, self.weights[None], norms, False, self._squares[:c])
        t = as_float(on_host(prompt_features))
        weights = prompt_weights(t, self._prompts[:c].to(t))
        indices = prune(weights, self.weights, tolerance).nonzero().squeeze(1)
        weights = send((weights * self.weights.to(weights))[:, indices], prompt_features.device)
        squares = self._squares[:c][indices]
        return Selection(self._store, indices, weights, norms[indices], False, squares, (self._prompts, indices))

    def newest(self, max_rows: int) -> tuple[Tensor, Tensor | None]:
        """The means ``[k, d]`` of largest weight and their prompts; this memory does not record the order of samples."""
        order = self.weights.argsort(descending=True)[:max_rows]
        return self.x[order], None if self._prompts is None else self._prompts[order]

    @exclusive
    def merge(self, other: "CentroidMemory") -> "CentroidMemory":
        """Add another memory's means, with their weights.

        Raises:
            ValueError: if the entries are not compatible.
        """
        self._check_mergeable(other)
        if self.normalize != other.normalize:
            raise ValueError(
                f"memories differ in normalize: {self.normalize} here, {other.normalize} there; they cannot be merged"
            )
        if other._used:
            prompt = None if other.prompts is None else other.prompts.clone()
            squares, weights, added = other._squares[: other._used].clone(), other.weights.clone(), len(other)
            self.absorb(other.x.clone(), prompt, squares, weights)
            self._added += added - round(float(weights.sum()))
        self._adopt(other)
        return self

    @exclusive
    def absorb(self, x: Tensor, prompts: Tensor | None, squares: Tensor, weights: Tensor) -> None:
        """Add means ``[k, d]`` with the mean squared norms ``[k]`` and the numbers ``[k]`` of their samples."""
        self._ready(x.shape[1], None if prompts is None else prompts.shape[1])
        x, squares, weights = x.float().cpu(), squares.float().cpu(), weights.float().cpu()
        prompts = None if prompts is None else prompts.float().cpu()
        self._insert(x, prompts, squares, weights)
        self._added += round(float(weights.sum()))

    def _ready(self, width: int, prompt_width: int | None) -> None:
        if self._store is None:
            self._store = RowStore(width)
            self._store.reserve(self.capacity)
            self._store.chunks[0].zero_()
        if prompt_width is not None and self._prompts is None:
            self._prompts = torch.zeros(self.capacity, prompt_width, device="cpu")

    @exclusive
    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum."""
        tensors = {}
        if self._used:
            tensors = {"x": self.x, "weights": self.weights, "squares": self._squares[: self._used]}
        if self.prompts is not None:
            tensors["prompts"] = self.prompts
        settings = {name: getattr(self, name) for name in ("capacity", "spread", "prompt_spread")}
        settings["unit"] = self.normalize  # its name in format 2
        write_tensors(path, "centroids", tensors, {**self._description(), **settings, "seen": self._added})

    @classmethod
    @exclusive
    def load(cls, path: str | os.PathLike) -> "CentroidMemory":
        """Load a memory that :meth:`save` wrote.

        Raises:
            FileNotFoundError: if there is no such file.
            MemoryFileError: if the file is truncated, altered, or of another kind of memory.
        """
        tensors, about = read_tensors(path, "centroids")
        saved = {name: about[name] for name in ("capacity", "spread", "prompt_spread", "space", "prompt_encoder")}
        memory = cls(**saved, normalize=about["unit"])
        if not tensors:
            return memory
        if len(tensors["x"]) > memory.capacity:
            raise MemoryFileError(f"{path} contains {len(tensors['x'])} means, more than its capacity {memory.capacity}")
        memory.shape, memory.prompt_dim = tuple(about["shape"]), about["prompt_dim"]
        memory.absorb(tensors["x"], tensors.get("prompts"), tensors["squares"], tensors["weights"])
        memory._added = about["seen"]
        return memory


def _costs(distances: np.ndarray, weights: np.ndarray, weight: float) -> np.ndarray:
    """Costs of merging an item with each mean ``[c]``: increases of the within-cluster sum of squares (Ward 1963)."""
    return distances * (weights * weight / (weights + weight))


class _Block:
    """Items ``[k, d]`` that are inserted into a memory one after the other.

    Their products with the means and with each other are computed at once. They follow the means as these change, since a
    merged mean is a combination of two known points: its products are the same combination, and its distances follow by
    the formula of Lance and Williams (1967).
    """

    def __init__(self, memory: CentroidMemory, x: Tensor, prompts: Tensor | None, squares: Tensor, weights: Tensor):
        assert memory._store is not None
        self.memory, self.squares, self.weights = memory, squares.tolist(), weights.tolist()
        self.within = memory._products(x, prompts, x, prompts)
        self.products = np.zeros((len(x), memory.capacity))
        self.products[:, : memory._used] = memory._products(x, prompts, memory.x, memory.prompts)
        # means, items and spread, of images and of prompts
        self.points = [(memory._store.chunks[0].numpy(), x.numpy(), memory.spread)]
        if prompts is not None and memory._prompts is not None:
            self.points.append((memory._prompts.numpy(), prompts.numpy(), memory.prompt_spread))
        self.mean_weights, self.mean_squares = memory._weights.numpy(), memory._squares.numpy()

    def insert(self) -> None:
        memory = self.memory
        for i, weight in enumerate(self.weights):
            if memory._used < memory.capacity:
                memory._used += 1
                self._put(memory._used - 1, i)
                continue
            distances = self._distances_of(i)
            costs = _costs(distances, self.mean_weights, weight)
            nearest, (a, b) = int(costs.argmin()), memory._cheapest()
            if costs[nearest] <= _costs(memory._distances[a, b], self.mean_weights[b], self.mean_weights[a]):
                items = [rows[i] for _, rows, _ in self.points]
                self._merge(nearest, items, self.squares[i], weight, distances, self.within[:, i])
            else:
                items = [means[b] for means, _, _ in self.points]
                square, products = self.mean_squares[b], self.products[:, b]
                self._merge(a, items, square, self.mean_weights[b], memory._distances[b], products)
                self._put(b, i)

    def _distances_of(self, i: int) -> np.ndarray:
        """Squared distances ``[c]`` of an item to all means."""
        c = self.memory._used
        return np.maximum(self.memory._norms[:c] + self.within[i, i] - 2 * self.products[i, :c], 0)

    def _put(self, index: int, i: int) -> None:
        """Make an item the mean at ``index``."""
        for means, rows, _ in self.points:
            means[index] = rows[i]
        self.products[:, index] = self.within[:, i]
        self.memory._norms[index] = self.within[i, i]
        self.mean_weights[index], self.mean_squares[index] = self.weights[i], self.squares[i]
        self._set(index, self._distances_of(i))

    def _merge(
        self,
        a: int,
        items: list[np.ndarray],
        square: float,
        weight: float,
        distances: np.ndarray,
        products: np.ndarray,
    ) -> None:
        """Merge a point, in images and prompts, into mean ``a``; its distances are those to all means."""
        memory = self.memory
        share = float(weight / (self.mean_weights[a] + weight))
        apart = share * (1 - share) * distances[a]
        for (means, _, _), item in zip(self.points, items, strict=True):
            means[a] += share * (item - means[a])
        self.products[:, a] += share * (products - self.products[:, a])
        merged = (1 - share) * memory._distances[a, : memory._used] + share * distances - apart
        memory._norms[a] = sum(float(means[a] @ means[a]) / spread**2 for means, _, spread in self.points)
        self.mean_weights[a] += weight
        self.mean_squares[a] += share * (square - self.mean_squares[a])
        self._set(a, np.maximum(merged, 0))

    def _set(self, index: int, distances: np.ndarray) -> None:
        """Note the distances ``[c]`` of a mean that has changed."""
        memory, c = self.memory, self.memory._used
        distances[index] = np.inf
        memory._distances[index, :c] = memory._distances[:c, index] = distances
        costs = _costs(distances, self.mean_weights[:c], self.mean_weights[index])
        best = memory._best[:c]
        nearer = costs < best
        np.copyto(best, costs, where=nearer)
        np.copyto(memory._mate[:c], index, where=nearer)
        memory._mate[index] = nearest = costs.argmin()
        best[index] = costs[nearest]
