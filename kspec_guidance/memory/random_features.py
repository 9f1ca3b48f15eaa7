"""The memory of constant size: one random-feature sum."""

import os

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory.base import Described
from kspec_guidance.memory.io import MemoryFileError, read_tensors, write_tensors

__all__ = ["RandomFeatureMemory"]

SCALE = 2.0**40  # fixed point of the random-feature sums: whole numbers add exactly, in any order


class RandomFeatureMemory(Described):
    """``sum_i phi(m_i) psi(s_i)'``: all that a sum of kernels needs to know of its samples, in constant size.

    ``D x D_t`` numbers (``D`` without prompts), whatever the number of entries. The sums are kept in fixed point, as whole
    numbers, so merging and subtracting are exact and independent of order; 8 million entries fit before they overflow.

    Args:
        features: the map ``phi`` of the samples (flattened, scaled to norm 1 if ``unit``).
        prompt_features: the map ``psi`` of the prompts; None ignores prompts.
        unit: whether samples are scaled to norm 1 first.
    """

    total: Tensor

    def __init__(
        self,
        features: RandomFourierFeatures,
        prompt_features: RandomFourierFeatures | None = None,
        unit: bool = True,
        space: str | None = None,
        prompt_encoder: str | None = None,
    ):
        super().__init__(space, prompt_encoder)
        self.features, self.prompt_features, self.unit = features, prompt_features, unit
        self.clear()

    def clear(self) -> None:
        """Forget all entries."""
        size = [self.features.num_features]
        if self.prompt_features is not None:
            size.append(self.prompt_features.num_features)
        self.total = torch.zeros(size, dtype=torch.int64)
        self._scaled: tuple[Tensor, Tensor] | None = None  # the sums as numbers, until they change
        self._count = 0
        self.shape = self.prompt_dim = None

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"RandomFeatureMemory({len(self)} entries in {self.total.numel()} numbers, shape={self.shape})"

    def _sum(self, x: Tensor, t: Tensor | None) -> tuple[Tensor, int, int | None, tuple[int, ...]]:
        rows, t, shape = self._check(x, t)
        if self.prompt_features is not None and t is None:
            raise ValueError("this memory weighs samples by their prompts, but no prompt features came with them")
        width = None if t is None else t.shape[1]
        total = torch.zeros_like(self.total)
        for i in range(len(rows)):  # one by one: a product's rounding depends on how many rows it has
            row = rows[i : i + 1].double()
            part = self.features(CosineKernel.unit(row)[0] if self.unit else row)[0]
            if self.prompt_features is not None and t is not None:
                part = part[:, None] * self.prompt_features(t[i : i + 1].double())
            total += (part * SCALE).round().to(torch.int64).cpu()
        return total, len(rows), width, shape

    def _update(self, x: Tensor, t: Tensor | None, sign: int) -> None:
        total, count, width, shape = self._sum(x, t)
        self.total = self.total + sign * total
        self._count += sign * count
        self.shape, self.prompt_dim = shape, width

    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Add samples ``[n, ...]`` with prompt features ``[n, p]``."""
        self._update(x, prompt_features, 1)

    def subtract(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Take out samples that were added before; exact."""
        self._update(x, prompt_features, -1)

    def coefficients(self, t: Tensor | None, like: Tensor) -> Tensor:
        """``sum_i k_T(t, s_i) phi(m_i)`` ``[n or 1, D]`` for prompts ``t`` ``[n, p]`` in the dtype of ``like``."""
        if self._scaled is None or self._scaled[0] is not self.total or self._scaled[1].device != like.device:
            self._scaled = self.total, (self.total.double() / SCALE).to(like.device)
        total = self._scaled[1]
        if self.prompt_features is None:
            return total[None].to(like)
        if t is None:
            raise ValueError("this memory weighs samples by their prompts, but no prompt features came with this call")
        psi = self.prompt_features(CosineKernel.unit(as_float(t))[0]).double()
        return (psi @ total.mT).to(like)

    def _key(self) -> list:
        maps = [m for m in (self.features, self.prompt_features) if m is not None]
        return [self.unit, *[[repr(m.kernel), m.input_dim, m.num_features, m.orthogonal, m.seed] for m in maps]]

    def merge(self, other: "RandomFeatureMemory") -> "RandomFeatureMemory":
        """Add another memory's entries; exact."""
        self._match(other)
        if self._key() != other._key():
            raise ValueError(f"memories use different random features: {self._key()} here, {other._key()} there")
        self.total = self.total + other.total
        self._count += len(other)
        self._adopt(other)
        return self

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum."""
        write_tensors(
            path, "random features", {"total": self.total}, {**self._about(), "count": len(self), "key": self._key()}
        )

    def restore(self, path: str | os.PathLike) -> "RandomFeatureMemory":
        """Replace the entries by those of a file made with the same features.

        Raises:
            MemoryFileError: if the file is damaged, or was made with other features; nothing is changed then.
        """
        tensors, about = read_tensors(path, "random features")
        if about["key"] != self._key():
            raise MemoryFileError(f"{path} was made with other random features: {about['key']}, here {self._key()}")
        self.total, self._count = tensors["total"], about["count"]
        self.shape = None if about["shape"] is None else tuple(about["shape"])
        self.space, self.prompt_encoder, self.prompt_dim = about["space"], about["prompt_encoder"], about["prompt_dim"]
        return self
