"""Kernels on vectors, each with its value and its vector-Jacobian product in closed form.

A kernel takes ``x`` ``[..., n, d]`` and ``y`` ``[..., m, d]`` and returns ``[..., n, m]``. Scores and objectives are
functions of such matrices, so the only derivative needed is that of ``sum_ij w_ij k(x_i, y_j)`` in ``x``:
:meth:`Kernel.vjp`. Half precision is computed in float32, float64 in float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance.kernels.distances import as_float, check_pair

__all__ = ["FunctionKernel", "Kernel", "KernelLike", "ProductKernel", "Weight", "as_kernel"]

Weight = Tensor | Callable[[Tensor], Tensor]


def evaluate(weight: Weight, k: Tensor) -> Tensor:
    """The value of a weight, which may be a function of the kernel matrix."""
    return weight(k) if callable(weight) else weight


class Kernel:
    """Base class: a positive-definite function of two vectors.

    A subclass implements ``__call__`` and, if there is a closed form, ``vjp``. ``fit`` sets the parameters that depend on
    data (for a bandwidth of ``None``, by the median rule). ``k1 * k2`` is the product kernel.
    """

    stationary = False  # whether it depends on x - y alone

    @property
    def open(self) -> bool:
        """Whether :meth:`fit` has parameters to set."""
        return False

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """Kernel matrix ``[..., n, m]``; of ``x`` with itself if ``y`` is None.

        Raises:
            ValueError: for shapes that do not match.
        """
        raise NotImplementedError

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        """``sum_j weight_ij d k(x_i, y_j) / d x_i`` as ``[..., n, d]``, in closed form, with ``y`` constant.

        ``weight`` ``[..., n, m]`` may be a function of the kernel matrix: for a sum of ``f(k)`` pass ``f'``, and the matrix
        is computed once.
        """
        raise TypeError(
            f"{type(self).__name__} has no closed-form gradient; implement vjp(x, y, weight), "
            "or use GaussianKernel, CosineKernel, PolynomialKernel, RationalQuadraticKernel or LaplacianKernel"
        )

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """The kernel and its derivatives in ``p`` and in ``xx`` ``[n, m]``, from inner products and squared norms.

        A sum over many rows then needs one pass over them: the derivative of ``k(x_i, y_j)`` in ``x_i`` is
        ``dk/dp y_j + 2 dk/dxx x_i``.

        Args:
            p: inner products ``x_i . y_j`` ``[n, m]``.
            xx: squared norms of the ``x_i`` ``[n, 1]``.
            yy: squared norms of the ``y_j`` ``[m]``.

        Returns:
            None for kernels that are not functions of inner products. An open bandwidth must be fitted before.
        """
        return None

    def of_distances(self, d2: Tensor) -> tuple[Tensor, Tensor] | None:
        """The kernel of squared distances, and -2 times its derivative in them; None if they do not determine it."""
        return None

    def squared(self) -> "Kernel":
        """``k^2``, in closed form if there is one."""
        return ProductKernel(self, self)

    def fit(self, x: Tensor, y: Tensor | None = None) -> "Kernel":
        """This kernel with its open parameters set from the rows of ``x`` (and ``y``, if given)."""
        return self

    def fit_on_device(self, x: Tensor) -> "Kernel":
        """As :meth:`fit` to the rows of ``x``, for a guided step: parameters on an accelerator are not read by the host."""
        return self.fit(x)

    def diagonal(self, x: Tensor) -> Tensor:
        """``k(x_i, x_i)`` ``[..., n]``."""
        return torch.ones(x.shape[:-1], dtype=as_float(x).dtype, device=x.device)

    def normalised(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        """``k(x, y) / sqrt(k(x, x) k(y, y))``, with unit diagonal as required by entropies."""
        k = self(x, y)
        if type(self).diagonal is Kernel.diagonal:
            return k
        scale_x = self.diagonal(x).rsqrt()
        scale_y = scale_x if y is None else self.diagonal(y).rsqrt()
        return k * scale_x[..., :, None] * scale_y[..., None, :]

    def __mul__(self, other: "Kernel") -> "ProductKernel":
        return ProductKernel(self, other)


@dataclass(frozen=True)
class ProductKernel(Kernel):
    """``first(x, y) * second(x, y)`` on the same vectors."""

    first: Kernel
    second: Kernel

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.first(x, y) * self.second(x, y)

    @property
    def stationary(self) -> bool:  # type: ignore[override]
        return self.first.stationary and self.second.stationary

    @property
    def open(self) -> bool:
        return self.first.open or self.second.open

    def fit(self, x: Tensor, y: Tensor | None = None) -> "ProductKernel":
        return ProductKernel(self.first.fit(x, y), self.second.fit(x, y))

    def fit_on_device(self, x: Tensor) -> "ProductKernel":
        return ProductKernel(self.first.fit_on_device(x), self.second.fit_on_device(x))

    def diagonal(self, x: Tensor) -> Tensor:
        return self.first.diagonal(x) * self.second.diagonal(x)

    def normalised(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        return self.first.normalised(x, y) * self.second.normalised(x, y)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        first, second = self.first.fit(x, y), self.second.fit(x, y)
        a, b = first(x, y), second(x, y)
        w = evaluate(weight, a * b)
        return first.vjp(x, y, w * b) + second.vjp(x, y, w * a)

    def of_products(self, p: Tensor, xx: Tensor, yy: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        first, second = self.first.of_products(p, xx, yy), self.second.of_products(p, xx, yy)
        if first is None or second is None:
            return None
        (a, a_p, a_x), (b, b_p, b_x) = first, second
        return a * b, a_p * b + a * b_p, a_x * b + a * b_x


KernelLike = Kernel | Callable[[Tensor, Tensor], Tensor]
"""A kernel, or a positive-definite function of rows ``[..., n, d]`` and ``[..., m, d]`` that returns ``[..., n, m]``."""


@dataclass(frozen=True, repr=False)
class FunctionKernel(Kernel):
    """A kernel given as a function, with its derivative by autograd."""

    function: Callable[[Tensor, Tensor], Tensor]

    def __call__(self, x: Tensor, y: Tensor | None = None) -> Tensor:
        x, y = check_pair(x, x if y is None else y)
        k, size = self.function(x, y), (*x.shape[:-1], y.shape[-2])
        if not isinstance(k, Tensor) or k.shape != size:
            found = list(k.shape) if isinstance(k, Tensor) else type(k).__name__
            raise TypeError(
                f"a kernel is a function of rows {list(x.shape)} and {list(y.shape)} that returns a tensor {list(size)}; "
                f"this one returned {found}"
            )
        return k.to(x)

    def __repr__(self) -> str:
        return repr(self.function)

    def diagonal(self, x: Tensor) -> Tensor:
        return self(x).diagonal(dim1=-2, dim2=-1)

    def vjp(self, x: Tensor, y: Tensor, weight: Weight) -> Tensor:
        with torch.inference_mode(False), torch.enable_grad():  # tensors of inference mode have no gradients, copies do
            leaf = x.detach().clone().requires_grad_()
            k = self(leaf, y.detach().clone())
            if not k.requires_grad:
                raise TypeError("a kernel function must be differentiable by autograd in its first rows to guide samples")
            (g,) = torch.autograd.grad(k, leaf, evaluate(weight, k.detach()).detach().clone().to(k))
        return g


def as_kernel(kernel: KernelLike) -> Kernel:
    """``kernel``, wrapped if it is a plain function.

    Raises:
        TypeError: if it is neither a kernel nor a function.
    """
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, type) or not callable(kernel):
        found = f"the class {kernel.__name__}" if isinstance(kernel, type) else repr(kernel)
        raise TypeError(
            "kernel must be a kernel such as GaussianKernel(1.0), or a function of rows [n, d] and [m, d] that returns "
            f"[n, m]; got {found}"
        )
    return FunctionKernel(kernel)
