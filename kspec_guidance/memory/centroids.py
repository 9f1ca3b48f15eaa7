"""CentroidMemory: weighted means of samples, in constant size."""

import os

import torch
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory.base import Memory, check_finite, exclusive
from kspec_guidance.memory.io import MemoryFileError, read_tensors, write_tensors
from kspec_guidance.memory.selection import PromptWeights, Selection, prune
from kspec_guidance.memory.store import RowStore

__all__ = ["CentroidMemory"]


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
        if not isinstance(capacity, int) or capacity < 2:
            raise ValueError(f"capacity must be an integer of at least 2, got {capacity!r}")
        if not (spread > 0 and prompt_spread > 0):
            raise ValueError(f"spread and prompt_spread must be positive, got {spread!r} and {prompt_spread!r}")
        self.capacity, self.spread, self.prompt_spread, self.normalize = capacity, spread, prompt_spread, normalize
        self.clear()

    @exclusive
    def clear(self) -> None:
        """Remove all entries."""
        self._store: RowStore | None = None
        self._prompts: Tensor | None = None
        size, infinity, host = self.capacity, float("inf"), torch.device("cpu")
        self._weights, self._squares = torch.zeros(size, device=host), torch.zeros(size, device=host)
        self._norms = torch.zeros(size, device=host)  # squared norms of the means
        self._cost = torch.full((size, size), infinity, device=host)
        self._best = torch.full((size,), infinity, device=host)
        self._mate = torch.zeros(size, dtype=torch.int64, device=host)
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
        for i in range(len(rows)):
            self._insert(rows[i], None if prompt is None else prompt[i], float(rows[i].square().sum()), 1.0)
        self._added += len(rows)

    def _costs(self, row: Tensor, prompt: Tensor | None, weight: float) -> Tensor:
        """Cost of merging an item with each mean ``[c]``."""
        w = self.weights
        d2 = (self._norms[: self._used] + row.square().sum() - 2 * (self.x @ row)).clamp_min(0) / self.spread**2
        if prompt is not None and self._prompts is not None:
            d2 = d2 + (self._prompts[: self._used] - prompt).square().sum(1) / self.prompt_spread**2
        return d2 * w * weight / (w + weight)

    def _set(self, index: int, row: Tensor, prompt: Tensor | None, square: float, weight: float) -> None:
        x = self._store.chunks[0] if self._store is not None else row[None]
        x[index], self._squares[index], self._weights[index] = row, square, weight
        self._norms[index] = row.square().sum()
        if prompt is not None and self._prompts is not None:
            self._prompts[index] = prompt
        costs = self._costs(row, prompt, weight)
        costs[index] = float("inf")
        c = self._used
        self._cost[index, :c] = costs
        self._cost[:c, index] = costs
        # _best has lower bounds of each mean's cheapest merge; _cheapest updates a bound only if it is the lowest
        nearer = costs < self._best[:c]
        self._best[:c] = torch.where(nearer, costs, self._best[:c])
        self._mate[:c][nearer] = index
        self._best[index], self._mate[index] = costs.min(0)

    def _mean(self, a: int, row: Tensor, prompt: Tensor | None, square: float, weight: float) -> None:
        """Merge an item into mean ``a``."""
        share = weight / float(self._weights[a] + weight)
        new_prompt = (
            None if prompt is None or self._prompts is None else self._prompts[a] + share * (prompt - self._prompts[a])
        )
        new = self.x[a] + share * (row - self.x[a])
        self._set(
            a,
            new,
            new_prompt,
            float(self._squares[a] + share * (square - self._squares[a])),
            float(self._weights[a] + weight),
        )

    def _insert(self, row: Tensor, prompt: Tensor | None, square: float, weight: float) -> None:
        if self._used < self.capacity:
            self._used += 1
            self._set(self._used - 1, row, prompt, square, weight)
            return
        costs = self._costs(row, prompt, weight)
        nearest = int(costs.argmin())
        a, b = self._cheapest()
        if float(costs[nearest]) <= float(self._cost[a, b]):
            self._mean(nearest, row, prompt, square, weight)
            return
        old_prompt = None if self._prompts is None else self._prompts[b].clone()
        self._mean(a, self.x[b].clone(), old_prompt, float(self._squares[b]), float(self._weights[b]))
        self._set(b, row, prompt, square, weight)

    def _cheapest(self) -> tuple[int, int]:
        """The two means that are cheapest to merge."""
        while True:
            a = int(self._best.argmin())
            b = int(self._mate[a])
            if float(self._cost[a, b]) <= float(self._best[a]):
                return a, b
            self._best[a], self._mate[a] = self._cost[a].min(0)

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
        t = as_float(prompt_features.detach().cpu())
        weights = prompt_weights(t, self._prompts[:c].to(t))
        indices = prune(weights, self.weights, tolerance).nonzero().squeeze(1)
        weights = (weights * self.weights.to(weights))[:, indices].to(prompt_features.device)
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
        for i in range(len(x)):
            self._insert(x[i], None if prompts is None else prompts[i], float(squares[i]), float(weights[i]))
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
