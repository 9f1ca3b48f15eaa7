"""RandomFeatureMemory: one sum of random features, in constant size."""

import os

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import l2_normalize
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory.base import Memory, check_finite, exclusive
from kspec_guidance.memory.io import MemoryFileError, read_tensors, write_tensors
from kspec_guidance.utils.devices import transfer
from kspec_guidance.utils.transfer import on_host

__all__ = ["RandomFeatureMemory"]

SCALE = 2.0**40  # fixed-point scale of the sums: integers add exactly, in any order


class RandomFeatureMemory(Memory):
    """``sum_i phi(m_i) psi(s_i)'``: determines kernel sums over all samples, in constant size.

    ``D x D_t`` numbers (``D`` without prompts), for any number of entries. The sums are stored in fixed point, as integers,
    so merging is exact and independent of order; they can hold 8 million entries without overflow. They are computed on
    the host in float64; a guided run copies the ``[n, D]`` sums of its prompts to the device of its samples.

    Args:
        feature_map: the map ``phi`` of the samples (flattened, scaled to norm 1 if ``normalize``).
        prompt_feature_map: the map ``psi`` of the prompts; None ignores prompts.
        normalize: whether samples are scaled to norm 1 first.
        space, prompt_encoder: see :class:`MemoryBank`.

    Raises:
        ValueError: by :meth:`add`, for samples that do not match the memory, or without required prompt features.
    """

    total: Tensor

    def __init__(
        self,
        feature_map: RandomFourierFeatures,
        prompt_feature_map: RandomFourierFeatures | None = None,
        normalize: bool = True,
        space: str | None = None,
        prompt_encoder: str | None = None,
    ):
        super().__init__(space, prompt_encoder)
        self.feature_map, self.prompt_feature_map, self.normalize = feature_map, prompt_feature_map, normalize
        self.clear()

    @exclusive
    def clear(self) -> None:
        """Remove all entries."""
        size = [self.feature_map.num_features]
        if self.prompt_feature_map is not None:
            size.append(self.prompt_feature_map.num_features)
        self.total = torch.zeros(size, dtype=torch.int64, device="cpu")
        self._scaled: tuple[Tensor, Tensor] | None = None  # cache: the sums, and their values in floating point
        self._count = 0
        self.shape = self.prompt_dim = None

    def empty_copy(self) -> "RandomFeatureMemory":
        """A memory with the same feature maps and no entries."""
        return RandomFeatureMemory(
            self.feature_map, self.prompt_feature_map, self.normalize, self.space, self.prompt_encoder
        )

    def __len__(self) -> int:
        return self._count

    def __repr__(self) -> str:
        return f"RandomFeatureMemory({len(self)} entries in {self.total.numel()} numbers, shape={self.shape})"

    @exclusive
    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Add samples ``[n, ...]`` with prompt features ``[n, p]``.

        Raises:
            ValueError: for samples or prompts that do not match the memory, which is then unchanged.
        """
        rows, prompt_features, shape = self._check(x, prompt_features)
        if self.prompt_feature_map is not None and prompt_features is None:
            raise ValueError("this memory weights samples by their prompts; pass prompt_features with the samples")
        rows, total = check_finite(as_float(rows.cpu()), "samples"), torch.zeros_like(self.total)
        for i in range(len(rows)):  # one by one: the rounding of a product depends on its number of rows
            row = rows[i : i + 1].double()
            part = self.feature_map(l2_normalize(row) if self.normalize else row)[0]
            if self.prompt_feature_map is not None and prompt_features is not None:
                part = part[:, None] * self.prompt_feature_map(prompt_features[i : i + 1].double())
            total += (part * SCALE).round().to(torch.int64)
        self.add_total(total, len(rows))
        self.shape, self.prompt_dim = shape, None if prompt_features is None else prompt_features.shape[1]

    @exclusive
    def add_total(self, total: Tensor, count: int) -> None:
        """Add the ``total`` of a memory of ``count`` samples with the same feature maps."""
        self.total = self.total + total.cpu()
        self._count += count

    @exclusive
    def coefficients(self, prompt_features: Tensor | None, like: Tensor) -> Tensor:
        """``sum_i k_T(t, s_i) phi(m_i)`` ``[n or 1, D]`` for prompt features ``[n, p]``, in the dtype of ``like``."""
        if self._scaled is None or self._scaled[0] is not self.total:
            self._scaled = self.total, self.total.double() / SCALE
        total = self._scaled[1]
        if self.prompt_feature_map is None:
            return transfer(total[None], like)
        if prompt_features is None:
            raise ValueError(
                "this memory weights samples by their prompts; pass prompt_features, or set prompt_feature_map=None"
            )
        psi = self.prompt_feature_map(l2_normalize(as_float(on_host(prompt_features)))).double()
        return transfer(psi @ total.mT, like)

    def _key(self) -> list:
        maps = [m for m in (self.feature_map, self.prompt_feature_map) if m is not None]
        return [self.normalize, *[[repr(m.kernel), m.input_dim, m.num_features, m.orthogonal, m.seed] for m in maps]]

    @exclusive
    def merge(self, other: "RandomFeatureMemory") -> "RandomFeatureMemory":
        """Add another memory's entries, exactly.

        Raises:
            TypeError: for a memory of another class.
            ValueError: if the entries or the feature maps are not compatible.
        """
        self._check_mergeable(other)
        if self._key() != other._key():
            raise ValueError(f"memories use different random features: {self._key()} here, {other._key()} there")
        self.add_total(other.total, len(other))
        self._adopt(other)
        return self

    @exclusive
    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum."""
        about = {**self._description(), "count": len(self), "key": self._key()}
        write_tensors(path, "random features", {"total": self.total}, about)

    @exclusive
    def restore(self, path: str | os.PathLike) -> "RandomFeatureMemory":
        """Replace the entries by those of a file that was saved with the same feature maps.

        Raises:
            FileNotFoundError: if there is no such file.
            MemoryFileError: if the file is damaged or has other feature maps; the memory is then unchanged.
        """
        tensors, about = read_tensors(path, "random features")
        if about["key"] != self._key():
            raise MemoryFileError(f"{path} was saved with other random features: {about['key']}, here {self._key()}")
        self.total, self._count = tensors["total"], about["count"]
        self.shape = None if about["shape"] is None else tuple(about["shape"])
        self.space, self.prompt_encoder, self.prompt_dim = about["space"], about["prompt_encoder"], about["prompt_dim"]
        return self
