"""Bring one embedding's kernel close to that of another: a linear adapter in closed form, and a loss for training."""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kspec_guidance.functional.inputs import KernelLike, as_kernel, check_matrix, on_host
from kspec_guidance.kernels import CosineKernel
from kspec_guidance.kernels.distances import as_float, squared_distances

__all__ = ["KernelAlignmentLoss", "LinearAlignment", "align_linear"]


@dataclass(frozen=True)
class LinearAlignment:
    """A linear adapter ``z @ weight`` of features.

    Attributes:
        weight: symmetric, positive semi-definite ``[d, d]``, float64.
        residual: ``|X W W' X' - K|_F / |K|_F`` of the rows that it was fitted to; 0 is exact recovery.
    """

    weight: Tensor
    residual: float

    def __call__(self, z: Tensor) -> Tensor:
        """Adapted rows ``[..., d]``, in the type and on the device of ``z``.

        Raises:
            ValueError: for rows of another length.
        """
        z = as_float(z)
        if z.ndim < 1 or z.shape[-1] != len(self.weight):
            raise ValueError(f"the adapter takes rows of {len(self.weight)} features, got shape {list(z.shape)}")
        return z @ self.weight.to(z)


def align_linear(
    x: Tensor, y: Tensor | None = None, kernel: KernelLike | None = None, kernel_matrix: Tensor | None = None
) -> LinearAlignment:
    """The linear adapter W of features x whose inner products ``X W W' X'`` are closest to the kernel of y.

    ``min |X M X' - K|_F`` over symmetric M has the solution ``M = X^+ K X^+'``, which is positive semi-definite, and
    ``W = M^(1/2)``. If ``K = X M0 X'`` and x has full column rank, M is M0. Directions that x does not contain get 0.

    Args:
        x: features to adapt ``[n, d]``; more rows than features, or the adapter fits noise.
        y: features of the same samples by the other embedding ``[n, p]``; with the linear kernel nothing is n x n.
        kernel: of y; linear by default: ``y y'``.
        kernel_matrix: K ``[n, n]`` itself, instead of y.

    Raises:
        ValueError: unless exactly one of ``y`` and ``kernel_matrix`` is given; for different numbers of rows, NaN, x of
            zeros, or a matrix that is not symmetric and positive semi-definite.

    Warns:
        UserWarning: for no more rows than features.

    >>> x = torch.randn(50, 3, generator=torch.Generator().manual_seed(0))
    >>> bool(torch.allclose(align_linear(x, 2 * x).weight, 2 * torch.eye(3).double(), atol=1e-5))
    True
    """
    if (y is None) == (kernel_matrix is None):
        raise ValueError("give either y, the rows of the other embedding, or kernel_matrix")
    x = check_matrix(x).detach()
    rounding = max(x.shape) * torch.finfo(x.dtype).eps
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"x has {len(x)} rows of {x.shape[1]} features: an adapter of so few rows fits any kernel, and may be "
            "far off for others; give several rows per feature, or fewer features",
            stacklevel=2,
        )
    x = on_host(x)
    name, given = ("y", y) if kernel_matrix is None else ("kernel_matrix", kernel_matrix)
    other = on_host(check_matrix(given, name).detach())  # type: ignore[arg-type]
    if len(x) != len(other):
        raise ValueError(f"x has {len(x)} rows and the other embedding {len(other)}; give features of the same samples")
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    keep = s > rounding * s[0]
    if not bool(s[0] > 0):
        raise ValueError("x is zero, so no adapter gives it a kernel")
    u, inverse = u[:, keep], vh[keep].mT / s[keep]  # X^+ = inverse u'
    if kernel_matrix is None and kernel is None:
        inside = u.mT @ other
        total = other.mT @ other if other.shape[1] < len(other) else other @ other.mT
        core, norm2 = inside @ inside.mT, total.square().sum()
    else:
        k = other if kernel_matrix is not None else as_kernel(kernel).fit(other)(other)
        if k.shape != (len(x), len(x)) or not torch.allclose(k, k.mT, atol=1e-5 * float(k.abs().max())):
            raise ValueError(f"a kernel matrix of {len(x)} samples is symmetric, of shape [n, n]; got {list(k.shape)}")
        core, norm2 = u.mT @ k @ u, k.square().sum()
        if float(torch.linalg.eigvalsh(k)[0]) < -1e-4 * float(k.diagonal().sum()):
            raise ValueError("the kernel matrix is not positive semi-definite")
    m = inverse @ core @ inverse.mT
    l, v = torch.linalg.eigh((m + m.mT) / 2)
    weight = (v * l.clamp_min(0).sqrt()) @ v.mT
    # X M X' is the projection u core u' of K, so the residual is what lies outside of it
    residual = math.sqrt(max(0.0, 1 - float(core.square().sum() / norm2))) if norm2 > 0 else 0.0
    return LinearAlignment(weight, residual)


class KernelAlignmentLoss(nn.Module):
    """Mean squared difference of two embeddings' kernels, with a learnable kernel of the trained one.

    ``w E (k_1(f(x), f(x')) - k_2(g(x), g(x')))^2 + a E |f(x) - f_0(x)|^2`` over pairs of *different* samples (KUEA, arXiv
    2506.02557), with f trained, g the frozen teacher, and f_0 a frozen copy of f against forgetting. The mean over the
    pairs of a batch is unbiased. (The published code's mean counts the diagonal, where the difference is 0, so it is
    smaller by ``1 - 1/n``.) Kernels are normalised to ``k(x, x) = 1``.

    Computed where the features are, in float32 at least, for training.

    Args:
        kernel: of the trained embedding: ``"cosine"`` (no parameters), ``"gaussian"`` with a learnable bandwidth, or
            ``"polynomial"``, ``(gamma x'y + c)^3`` with learnable gamma and c.
        teacher_kernel: of the teacher; cosine by default. An unset bandwidth is fitted by :meth:`fit`.
        weight: w, of the kernels' difference.
        anchor: a, of the distance to the frozen copy.

    Raises:
        ValueError: for another kernel, or negative weights.

    >>> x = torch.randn(8, 4, generator=torch.Generator().manual_seed(0))
    >>> KernelAlignmentLoss("cosine")(x, x).item()
    0.0
    """

    log_bandwidth: nn.Parameter
    log_gamma: nn.Parameter
    log_c: nn.Parameter

    def __init__(
        self, kernel: str = "gaussian", teacher_kernel: KernelLike | None = None, weight: float = 1.0, anchor: float = 0.0
    ):
        super().__init__()
        if kernel not in ("cosine", "gaussian", "polynomial"):
            raise ValueError(f"kernel must be 'cosine', 'gaussian' or 'polynomial', got {kernel!r}")
        if not (0 <= weight < math.inf and 0 <= anchor < math.inf):
            raise ValueError(f"weight and anchor must be finite and at least 0, got {weight} and {anchor}")
        self.kind, self.teacher_kernel, self.weight, self.anchor = kernel, as_kernel(teacher_kernel), weight, anchor
        names = {"cosine": (), "gaussian": ("log_bandwidth",), "polynomial": ("log_gamma", "log_c")}[kernel]
        for name in names:
            self.register_parameter(name, nn.Parameter(torch.zeros(())))

    def kernel(self, x: Tensor) -> Tensor:
        """The learnable kernel's matrix ``[n, n]`` of rows ``[n, d]``."""
        x = as_float(x)
        if self.kind == "cosine":
            return CosineKernel()(x)
        if self.kind == "gaussian":
            return torch.exp(-squared_distances(x) / (2 * (2 * self.log_bandwidth).exp()))
        k = (self.log_gamma.exp() * (x @ x.mT) + self.log_c.exp()) ** 3
        scale = k.diagonal().rsqrt()
        return k * scale[:, None] * scale

    def forward(self, features: Tensor, teacher: Tensor, frozen: Tensor | None = None) -> Tensor:
        """The loss, a scalar.

        Args:
            features: of a batch by the trained embedding ``[n, d]``, n of at least 2.
            teacher: of the same samples by the teacher ``[n, p]``.
            frozen: by the frozen copy ``[n, d]``; needed if there is an anchor.

        Raises:
            ValueError: for fewer than two samples, different numbers of them, NaN, or a missing frozen copy.
        """
        features, teacher = check_matrix(features, "features"), check_matrix(teacher, "teacher")
        n = len(features)
        if n < 2 or len(teacher) != n:
            raise ValueError(f"a loss over pairs needs the same two or more samples twice, got {n} and {len(teacher)}")
        with torch.no_grad():
            k2 = self.teacher_kernel.normalised(teacher)
        difference = (self.kernel(features) - k2.to(features)).square()
        loss = self.weight * (difference.sum() - difference.diagonal().sum()) / (n * (n - 1))
        if self.anchor == 0:
            return loss
        if frozen is None or frozen.shape != features.shape:
            raise ValueError(f"the anchor needs frozen, rows {list(features.shape)} by a frozen copy of the embedding")
        return loss + self.anchor * (features - frozen.detach().to(features)).square().sum(1).mean()

    def fit(self, features: Tensor, teacher: Tensor, steps: int = 50) -> "KernelAlignmentLoss":
        """Set the kernel's parameters by least squares before training, and the teacher's bandwidth if it is unset.

        Args:
            features: ``[n, d]`` by the embedding before training.
            teacher: ``[n, p]`` of the same samples.
            steps: of L-BFGS.

        Returns:
            This loss.

        Raises:
            ValueError: as :meth:`forward`.
        """
        features, teacher = check_matrix(features, "features").detach(), check_matrix(teacher, "teacher").detach()
        self.teacher_kernel = self.teacher_kernel.fit(teacher)
        parameters = list(self.parameters())
        if not parameters:
            return self
        with torch.no_grad():
            if self.kind == "gaussian":
                self.log_bandwidth.fill_(squared_distances(features).mean().sqrt().clamp_min(1e-12).log())
            else:
                self.log_gamma.fill_(-features.square().sum(1).mean().clamp_min(1e-12).log())
                self.log_c.zero_()
        optimizer = torch.optim.LBFGS(parameters, max_iter=steps, line_search_fn="strong_wolfe")
        anchor, self.anchor = self.anchor, 0.0

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = self(features, teacher)
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        try:
            step: Callable[..., object] = optimizer.step
            step(closure)
        finally:
            self.anchor = anchor
        optimizer.zero_grad()
        return self
