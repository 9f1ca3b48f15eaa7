"""Explicit feature maps ``phi`` with ``phi(x) @ phi(y).T`` close to ``k(x, y)``, such as random Fourier features."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.kernels import GaussianKernel, Kernel, LaplacianKernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.utils.devices import normal, normal_tensors, transfer
from kspec_guidance.utils.precision import full_precision

__all__ = ["NystromFeatures", "RandomFourierFeatures", "RandomProductProjection", "RandomProjection", "tensor_product"]


class _FeatureMap(nn.Module):
    """A module whose buffers are copied to the dtype and device of an input once, not at every call."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[Any, tuple[Tensor, int | None, Tensor]] = {}

    def _buffer(self, name: str, like: Tensor) -> Tensor:
        """A buffer in the dtype and on the device of ``like``."""
        buffer = getattr(self, name)
        if buffer.dtype == like.dtype and buffer.device == like.device and not buffer.is_inference():
            return buffer
        key, version = (name, like.dtype, like.device), None if buffer.is_inference() else buffer._version
        found = self._copies.get(key)
        if found is None or found[0] is not buffer or found[1] != version:
            with normal_tensors():
                found = self._copies[key] = buffer, version, normal(transfer(buffer, like))
        return found[2]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_FeatureMap":
        def apply(t: Tensor) -> Tensor:
            try:
                return fn(t)
            except TypeError:
                if t.dtype != torch.float64:
                    raise
                return fn(t.float())  # to a device without float64

        self._copies = {}
        with normal_tensors():
            return super()._apply(apply, recurse)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_copies": {}}  # copies of buffers are neither copied nor pickled


class RandomFourierFeatures(_FeatureMap):
    """``phi(x) = [cos(W x), sin(W x)] / sqrt(r)`` with ``r = num_features / 2`` random frequencies (Rahimi, Recht 2007).

    For the Gaussian kernel the rows of ``W`` are ``N(0, I / bandwidth^2)``, made orthogonal in blocks of ``d`` by default
    (Yu et al. 2016, arXiv 1610.09072: less variance at the same cost). For the Laplacian kernel each coordinate is a Cauchy
    variable, drawn independently: its distribution is not invariant to rotations, so rows are not orthogonal. Rows of the
    result have norm 1, so ``k(x, x) = 1`` exactly, and the error of ``k`` decreases as ``num_features ** -0.5``.

    Values are accurate at any bandwidth; *gradients* need a wide kernel and low dimension: see :meth:`reliable`. The result
    is on the device of ``x``, in its dtype (float32 for half precision).

    Args:
        kernel: a Gaussian or Laplacian kernel with a bandwidth.
        input_dim: features per row of ``x``.
        num_features: length of ``phi(x)``, cosines and sines together; even.
        orthogonal: orthogonal blocks of frequencies (Gaussian only).
        seed: seed of the map's own generator; the global random state is neither read nor written.

    Raises:
        ValueError: for an odd or non-positive ``num_features``, another kernel, or a bandwidth of ``None``.

    >>> phi = RandomFourierFeatures(GaussianKernel(1.0), input_dim=2, num_features=4096)
    >>> x = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    >>> bool((phi(x) @ phi(x).T - GaussianKernel(1.0)(x)).abs().max() < 0.05)
    True
    """

    frequencies: Tensor

    def __init__(
        self,
        kernel: GaussianKernel | LaplacianKernel,
        input_dim: int,
        num_features: int,
        orthogonal: bool = True,
        seed: int = 0,
    ):
        super().__init__()
        if not isinstance(kernel, GaussianKernel | LaplacianKernel):
            raise ValueError(f"random features support GaussianKernel and LaplacianKernel, got {kernel!r}")
        if kernel.bandwidth is None:
            raise ValueError("the kernel of random features needs a bandwidth; pass for example kernel.fit(x)")
        if num_features < 2 or num_features % 2:
            raise ValueError(f"num_features counts cosines and sines, so it must be even and positive; got {num_features}")
        if input_dim < 1:
            raise ValueError(f"input_dim must be at least 1, got {input_dim}")
        self.kernel, self.input_dim, self.num_features = kernel, input_dim, num_features
        self.orthogonal, self.seed = orthogonal, seed
        # Drawn at bandwidth 1 in float64 and divided afterwards, so that one seed gives the same map at all bandwidths.
        with normal_tensors():
            generator = torch.Generator().manual_seed(seed)
            self.register_buffer("frequencies", self._draw(num_features // 2, generator) / kernel.bandwidth)

    def _draw(self, r: int, generator: torch.Generator) -> Tensor:
        d = self.input_dim
        if isinstance(self.kernel, LaplacianKernel):
            uniform = torch.rand(r, d, generator=generator, dtype=torch.float64, device="cpu")
            return torch.tan(math.pi * (uniform - 0.5))
        gaussian = torch.randn(r, d, generator=generator, dtype=torch.float64, device="cpu")
        if not self.orthogonal:
            return gaussian
        blocks = []
        for _ in range(math.ceil(r / d)):
            q, upper = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64, device="cpu"))
            blocks.append((q * upper.diagonal().sign()).T)  # with these signs q is uniform over orthogonal matrices
        return torch.cat(blocks)[:r] * gaussian.norm(dim=1, keepdim=True)

    def power(self, p: int) -> "RandomFourierFeatures":
        """Features of ``k ** p``: the same map with a narrower kernel."""
        b = self.kernel.bandwidth
        assert b is not None
        kernel = type(self.kernel)(b / (math.sqrt(p) if isinstance(self.kernel, GaussianKernel) else p))
        return RandomFourierFeatures(kernel, self.input_dim, self.num_features, self.orthogonal, self.seed)

    def _phase(self, x: Tensor) -> Tensor:
        x = as_float(x)
        if x.shape[-1] != self.input_dim:
            raise ValueError(f"the feature map has input_dim={self.input_dim}, got rows of length {x.shape[-1]}")
        return x @ self._buffer("frequencies", x).mT

    def forward(self, x: Tensor) -> Tensor:
        """Features ``[..., n, num_features]`` of ``x`` ``[..., n, input_dim]``."""
        phase = self._phase(x)
        if phase.requires_grad:
            found = torch.cat([phase.cos(), phase.sin()], dim=-1)
        else:  # of many rows a copy takes as long as the sines
            found = phase.new_empty(*phase.shape[:-1], self.num_features)
            torch.cos(phase, out=found[..., : self.num_features // 2])
            torch.sin(phase, out=found[..., self.num_features // 2 :])
        return found.mul_((self.num_features / 2) ** -0.5)

    def vjp(self, x: Tensor, cotangent: Tensor) -> Tensor:
        """``d (cotangent . phi(x)) / d x`` ``[..., n, input_dim]``, in closed form."""
        phase = self._phase(x)
        c, s = cotangent.to(phase.dtype).chunk(2, dim=-1)
        return ((s * phase.cos() - c * phase.sin()) * (self.num_features / 2) ** -0.5) @ self._buffer("frequencies", phase)

    def reliable(self, typical_distance: float) -> bool:
        """Whether gradients of kernel sums by these features have the right direction (cosine above 0.9).

        Empirical rule: at least 8 features per input dimension, and a bandwidth of at least 0.9 typical distances. With
        2,048 features in 256 dimensions the cosine is 0.99 at one median distance and 0.77 at 0.4
        (benchmarks/gradients.py).
        """
        b = self.kernel.bandwidth or 0.0
        return self.num_features >= 8 * self.input_dim and b >= 0.9 * typical_distance

    def extra_repr(self) -> str:
        return f"{self.kernel}, input_dim={self.input_dim}, num_features={self.num_features}, seed={self.seed}"


class RandomProjection(_FeatureMap):
    """``x @ P`` with a seeded Gaussian ``P``; preserves distances to a relative error of about ``output_dim ** -0.5``."""

    matrix: Tensor

    def __init__(self, input_dim: int, output_dim: int, seed: int = 0):
        super().__init__()
        with normal_tensors():
            generator = torch.Generator().manual_seed(seed)
            matrix = torch.randn(input_dim, output_dim, generator=generator, dtype=torch.float32, device="cpu")
            self.register_buffer("matrix", matrix * output_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., input_dim]`` to ``[..., output_dim]``."""
        x = as_float(x)
        with full_precision(x.device):
            return x @ self._buffer("matrix", x)


class RandomProductProjection(_FeatureMap):
    """``(U a) o (V b) / sqrt(l)`` of random signs: ``l`` features of the product of kernels (Kar, Karnick 2012).

    ``E z(a, b) . z(a', b') = (a . a') (b . b')``, for any number of factors, with an error of about ``l ** -0.5`` times the
    norms. Signs have the smallest variance of all entries of unit variance: a row that is one-hot is projected without an
    error, where uniform entries, as published for KrossFuse and PromptSplit, have one.

    Args:
        input_dims: features per row of each factor.
        num_features: ``l``.
        seed: seed of the map's own generator.

    Raises:
        ValueError: for fewer than one feature.
    """

    def __init__(self, input_dims: Sequence[int], num_features: int, seed: int = 0):
        super().__init__()
        if num_features < 1 or not input_dims or min(input_dims) < 1:
            raise ValueError(f"a projection needs at least one feature, got {list(input_dims)} to {num_features}")
        self.input_dims, self.num_features, self.seed = list(input_dims), num_features, seed
        with normal_tensors():
            generator = torch.Generator().manual_seed(seed)
            for k, d in enumerate(input_dims):
                bits = torch.randint(0, 2, (d, num_features), generator=generator, dtype=torch.int8, device="cpu")
                self.register_buffer(f"signs_{k}", bits.float() * 2 - 1)

    def forward(self, *factors: Tensor) -> Tensor:
        """Features ``[..., n, num_features]`` of one tensor ``[..., n, d_k]`` for each factor."""
        widths = [x.shape[-1] for x in factors]
        if widths != self.input_dims:
            raise ValueError(f"the projection has input_dims={self.input_dims}, got rows of lengths {widths}")
        found: Tensor | None = None
        for k, x in enumerate(as_float(x) for x in factors):
            with full_precision(x.device):
                part = x @ self._buffer(f"signs_{k}", x)
            found = part if found is None else found * part
        assert found is not None
        return found * self.num_features**-0.5


def tensor_product(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise outer products ``[..., n, p q]``: the features of the product of two kernels.

    >>> tensor_product(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]]))
    tensor([[ 3.,  5.,  6., 10.]])
    """
    return (a[..., :, None] * b[..., None, :]).flatten(-2)


class NystromFeatures(_FeatureMap):
    """``phi(x) = k(x, Z) K_ZZ^(-1/2)`` of landmarks ``Z``: exact on their span, close where the kernel matrix has low rank.

    Williams, Seeger (2001). With t landmarks it is the alternative method for the t-truncated Vendi score (Ospanov,
    Farnia 2024, arXiv 2410.21719).

    The map is computed in the dtype and on the device of its buffers, at first in float64 on the device of the landmarks:
    small eigenvalues need it. In float32 (``.to(torch.float32)``, or a device without float64) those below its precision
    are left out.

    Args:
        kernel: any kernel, normalised to diagonal 1; an open bandwidth is fitted to the landmarks.
        landmarks: ``[m, d]``, for instance a random subset of the samples.

    Raises:
        ValueError: without landmarks.
    """

    landmarks: Tensor
    whiten: Tensor

    def __init__(self, kernel: Kernel, landmarks: Tensor):
        super().__init__()
        if landmarks.ndim != 2 or not len(landmarks):
            raise ValueError(f"landmarks must have shape [m, d] with m of at least 1, got {list(landmarks.shape)}")
        with normal_tensors():
            self.register_buffer("landmarks", landmarks.detach().cpu().double().clone())
            self.kernel = kernel.fit(self.landmarks)
            self.register_buffer("whiten", self._whitening())
        self.to(landmarks.device)

    @property
    def num_features(self) -> int:
        """Length of ``phi(x)``: the number of eigenvalues of the landmarks' kernel matrix that are not rounding noise."""
        return self.whiten.shape[1]

    def _whitening(self) -> Tensor:
        """``K_ZZ^(-1/2)`` on the eigenvectors whose eigenvalues exceed the rounding noise of the landmarks' dtype."""
        z = as_float(self.landmarks)
        l, v = torch.linalg.eigh(self.kernel.normalised(z.cpu().double()))
        keep = l > len(l) * max(1e-14, torch.finfo(z.dtype).eps) * l.max()
        return transfer(v[:, keep] * l[keep].rsqrt(), z)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NystromFeatures":
        before = self.landmarks.dtype
        super()._apply(fn, recurse)
        if self.landmarks.dtype != before:
            with normal_tensors():
                self.whiten = self._whitening()
        return self

    def forward(self, x: Tensor) -> Tensor:
        """``[n, d]`` to ``[n, num_features]``, in the dtype of the buffers; in that of ``x`` if it is on another device."""
        like = as_float(self.landmarks[:0])
        phi = self.kernel.normalised(transfer(x, like), self._buffer("landmarks", like)) @ self._buffer("whiten", like)
        return phi if phi.device == x.device else transfer(phi, as_float(x))
