"""KrossFuse: two embedders as one, whose kernel is the product of theirs."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.comparison.joint import JointFeatures, check_counts, unit_rows
from kspec_guidance.features import tensor_product
from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix
from kspec_guidance.kernels import SAME_DISTANCE, CosineKernel, Kernel, l2_normalize
from kspec_guidance.utils.hashing import hash_json

__all__ = ["Embedder", "ProductEmbedder", "product_embedder"]

Embedder = Callable[..., Tensor]
"""Maps images, texts or other samples to feature rows ``[n, d]``; those of the package have a name and a fingerprint."""


class ProductEmbedder:
    """The product of two embedders; :func:`product_embedder` makes it.

    It has the attributes of an image embedder where its first factor has them, so that folders of images are read with it.

    Attributes:
        name, fingerprint: of both factors and the projection.
        size, mean, std, fit: of the factor with the larger input, at which folders of images are read; the other factor
            resizes from there.
    """

    same_distance = SAME_DISTANCE
    measured = False

    def __init__(
        self,
        first: Embedder,
        second: Embedder,
        features: int | None,
        seed: int,
        other: Embedder | None,
        constant: float,
        kernels: tuple[Kernel, Kernel],
    ):
        self.first, self.second, self.features, self.seed, self.kernels = first, second, features, seed, kernels
        self.constant = constant if other is not None else None
        self._text = other
        self._maps: dict[tuple[int, int], JointFeatures] = {}  # random features by the widths of the factors
        names = [str(getattr(e, "name", getattr(e, "__name__", type(e).__name__))) for e in (first, second)]
        self.name = " x ".join(names)
        prints = [getattr(e, "fingerprint", name) for e, name in zip((first, second), names, strict=True)]
        kinds = [] if all(isinstance(k, CosineKernel) for k in kernels) else [repr(k) for k in kernels]
        self.fingerprint = hash_json([*names, *prints, features, seed, self.constant, *kinds], 12)
        sized = [e for e in (first, second) if hasattr(e, "size")]
        if sized:
            larger: Any = max(sized, key=lambda e: e.size)
            self.size, self.fit, self.mean, self.std = larger.size, larger.fit, larger.mean, larger.std

    @property
    def other(self) -> Embedder | None:
        """Embedder of the second modality of the one-sided form, in the same space; None otherwise."""
        return None if self._text is None else self._embed_other

    def __mul__(self, other: Embedder) -> "ProductEmbedder":
        return product_embedder(self, other, features=self.features, seed=self.seed + 1)

    def __call__(self, samples: Any, *args: Any, **options: Any) -> Tensor:
        """Features ``[n, D]`` of the samples, whose inner products are the product kernel; arguments of the factors."""
        a, b = self._factors(samples, *args, **options)
        if self.constant is None:
            return self._product(a, b)
        return torch.cat([self.constant**0.5 * a, self._product(a, b)], 1) / (1 + self.constant) ** 0.5

    def kernel(self, samples: Any, others: Any = None, **options: Any) -> Tensor:
        """The exact product kernel ``[n, m]`` of samples, without a projection; of them with themselves by default."""
        rows = self._factors(samples, **options)
        pairs = zip(rows, rows if others is None else self._factors(others, **options), self.kernels, strict=True)
        first, second = (k.normalised(a, b) for a, b, k in pairs)
        return first * second if self.constant is None else first * (self.constant + second) / (1 + self.constant)

    def _factors(self, samples: Any, *args: Any, **options: Any) -> tuple[Tensor, Tensor]:
        embedders = zip((self.first, self.second), self.kernels, strict=True)
        a, b = (_unit(e(samples, *args, **options), k) for e, k in embedders)
        if len(a) != len(b):
            raise ValueError(f"the embedders returned {len(a)} and {len(b)} rows for the same samples")
        return a, b

    def _embed_other(self, samples: Any, *args: Any, **options: Any) -> Tensor:
        assert self._text is not None
        assert self.constant is not None
        assert self.features is not None
        rows = _unit(self._text(samples, *args, **options), self.kernels[0]) * (self.constant / (1 + self.constant)) ** 0.5
        return torch.nn.functional.pad(rows, (0, self.features))

    def _product(self, a: Tensor, b: Tensor) -> Tensor:
        if self.features is None:
            return tensor_product(a, b)
        widths = a.shape[1], b.shape[1]
        if widths not in self._maps:
            self._maps[widths] = JointFeatures(widths, self.kernels, self.features, seed=self.seed)
        return self._maps[widths](a, b)


def _unit(rows: Tensor, kernel: Kernel) -> Tensor:
    rows = check_matrix(rows, "the embedder's result")
    return unit_rows(rows, "the embedder's result") if isinstance(kernel, CosineKernel) else l2_normalize(rows)


def product_embedder(
    embedder_a: Embedder,
    embedder_b: Embedder,
    features: int | None = 3000,
    other: Embedder | None = None,
    constant: float = 1.0,
    seed: int = 0,
    kernel_a: KernelLike | None = None,
    kernel_b: KernelLike | None = None,
) -> ProductEmbedder:
    """An embedder whose kernel is the product of two: samples are alike if both find them so (KrossFuse, 2025).

    With u and v the rows of both, scaled to norm 1, its rows are ``(U u) o (V v) / sqrt(l)`` of l random signs: inner
    products are ``(u . u') (v . v')`` on average, with an error of about ``l ** -0.5``. The published program divides by
    ``sqrt(l)`` twice, so that its inner products are too small by a factor of l. ``embedder_a * embedder_b`` is short for
    this function.

    For two Gaussian kernels, or two Laplacian ones, of these rows, its rows are random Fourier features of both rows
    together, each divided by its bandwidth; for a cosine and a Gaussian one, projections as above of u and of the Fourier
    features of v.

    With ``other``, the embedder of a second modality in the space of ``embedder_a`` (CLIP's texts, where ``embedder_b``
    sees images alone), the form is one-sided: ``k_a (C + k_b) / (1 + C)`` between images, and ``C k_a / (1 + C)`` between
    an image and a text or two texts. The rows ``[sqrt(C) u, (U u) o (V v) / sqrt(l)]`` of images, and ``[sqrt(C) t, 0]`` of
    texts, do that; inner products of images and texts are exact, so that every zero-shot ranking stays.

    Args:
        embedder_a: maps samples to rows ``[n, d]``; for instance an ``ImageEmbedder``, a ``TextEmbedder``, or a function.
        embedder_b: the same samples to rows ``[n, e]``.
        features: l; None for the exact rows of width ``d e``. ``kernel`` of the result is exact for any l.
        other: embedder of the second modality; the result has one of its own in the new space, as ``result.other``.
        constant: C, weight of the first kernel alone, above 0; cross-validated from 1e-3 to 1e3 in the paper.
        seed: of the signs or frequencies.
        kernel_a: of the rows of ``embedder_a``; cosine by default, else with a bandwidth.
        kernel_b: of the rows of ``embedder_b``.

    Raises:
        TypeError: for what is not callable, or no kernel.
        ValueError: for a number of features below 1, a constant that is not positive, ``other`` without ``features`` or
            with another ``kernel_a``, a kernel without a bandwidth, or one that has no random features.

    >>> both = product_embedder(lambda x: x[:, :2], lambda x: x[:, 2:], features=None)
    >>> x = torch.tensor([[1.0, 0.0, 0.6, 0.8], [2.0, 0.0, 3.0, 0.0]])
    >>> round(float(both(x)[0] @ both(x)[1]), 4)
    0.6
    """
    for embedder in (embedder_a, embedder_b, *([] if other is None else [other])):
        if not callable(embedder):
            raise TypeError(f"an embedder is a function of samples that returns rows [n, d], got {embedder!r}")
    check_counts(features=features)
    if not 0 < constant < math.inf:
        raise ValueError(f"constant must be positive and finite, got {constant}")
    if other is not None and features is None:
        raise ValueError("the one-sided form needs a number of features, which the rows of both modalities then share")
    kernels = as_kernel(kernel_a), as_kernel(kernel_b)
    if features is None and not all(isinstance(k, CosineKernel) for k in kernels):
        raise ValueError(f"only cosine kernels have exact rows of finite width, got {list(kernels)}; give features")
    if any(k.open for k in kernels):
        raise ValueError(f"a kernel of an embedder needs a bandwidth, got {list(kernels)}: each batch would fit its own")
    if other is not None and not isinstance(kernels[0], CosineKernel):
        raise ValueError(f"the one-sided form needs the cosine kernel of embedder_a, got {kernels[0]!r}")
    if features is not None:
        JointFeatures((1, 1), kernels, features, seed=seed)  # refuses kernels that have none
    return ProductEmbedder(embedder_a, embedder_b, features, seed, other, constant, kernels)
