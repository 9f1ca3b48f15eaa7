"""Every score as a pure function of tensors, differentiable in the samples.

Samples are rows: ``x`` ``[..., n, d]``, prompts ``t`` ``[..., n, p]``; leading dimensions are batches. Results are float64
``[...]`` and are scores (effective numbers of modes) unless the name says entropy. Half precision is computed in float32.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, Kernel, as_float
from kspec_guidance.spectrum import check_order, eigenvalues, renyi_entropy, truncate

__all__ = [
    "conditional_entropy",
    "conditional_rke_score",
    "conditional_vendi_score",
    "information_vendi_score",
    "kernel_entropy",
    "mmd",
    "rke_score",
    "vendi_score",
]

FeatureMap = Callable[[Tensor], Tensor]


def _check(x: Tensor, name: str = "x") -> Tensor:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor of shape [n, d], got {type(x).__name__}")
    if x.ndim < 2:
        raise ValueError(f"{name} must have shape [n, d], got {list(x.shape)}; flatten each sample to one row")
    if x.shape[-2] == 0:
        raise ValueError(f"{name} holds no samples; a score needs at least one row")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} holds NaN or infinite values; remove those rows first")
    return as_float(x)


def _pair(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    x, t = _check(x), _check(t, "t")
    if x.shape[:-1] != t.shape[:-1]:
        raise ValueError(f"x has {list(x.shape[:-1])} samples and t has {list(t.shape[:-1])}; one prompt row per sample")
    return x, t


def _gram(x: Tensor, kernel: Kernel | None) -> Tensor:
    """Kernel matrix ``[..., n, n]`` in float64 with unit diagonal."""
    return (kernel or CosineKernel()).normalised(x.double())  # float32 rounding would look like further modes


def _matrix(x: Tensor, kernel: Kernel | None, feature_map: FeatureMap | None) -> Tensor:
    """The smaller matrix with the spectrum of ``K / n``: the features' second moment, or the kernel matrix."""
    n, phi = x.shape[-2], None
    if feature_map is not None:
        phi = feature_map(x)
    elif (kernel is None or isinstance(kernel, CosineKernel)) and x.shape[-1] < n:
        phi = CosineKernel.unit(x.double())[0]
    if phi is None:
        return _gram(x, kernel) / n
    phi = phi.double()
    return (phi.mT @ phi if phi.shape[-1] < n else phi @ phi.mT) / n


def _entropy(matrix: Tensor, order: float, truncation: int | None = None) -> Tensor:
    """Renyi entropy of a unit-trace matrix; order 2 needs no eigenvalues."""
    if check_order(order) == 2 and truncation is None:
        return -(matrix.square().sum((-2, -1)) / matrix.diagonal(dim1=-2, dim2=-1).sum(-1).square()).log()
    spectrum = eigenvalues(matrix)
    spectrum = spectrum / spectrum.sum(-1, keepdim=True)
    return renyi_entropy(truncate(spectrum, truncation), order)


def kernel_entropy(
    x: Tensor,
    kernel: Kernel | None = None,
    order: float = 1.0,
    truncation: int | None = None,
    feature_map: FeatureMap | None = None,
) -> Tensor:
    """Renyi entropy ``H_q(K / n)`` in nats ``[...]``: the logarithm of :func:`vendi_score`, same arguments."""
    return _entropy(_matrix(_check(x), kernel, feature_map), order, truncation)


def vendi_score(
    x: Tensor,
    kernel: Kernel | None = None,
    order: float = 1.0,
    truncation: int | None = None,
    feature_map: FeatureMap | None = None,
) -> Tensor:
    """Vendi score of order q: the effective number of distinct samples, in [1, n].

    ``exp(H_q)`` of the eigenvalues of ``K / n`` (Friedman, Dieng 2022, arXiv 2210.02410; orders: Pasarkar, Dieng 2023,
    arXiv 2310.12952). Identical samples give 1, n orthogonal ones give n.

    Args:
        x: samples ``[..., n, d]``.
        kernel: cosine by default, by the smaller of ``n x n`` and ``d x d``; a kernel with open bandwidth takes the median
            rule. A diagonal other than 1 is divided out.
        order: q in (0, inf].
        truncation: keep this many eigenvalues (Ospanov, Farnia 2024, arXiv 2410.21719).
        feature_map: maps ``x`` to unit-norm rows ``[..., n, D]`` whose products are the kernel; O(n) time.

    Raises:
        ValueError: for no samples, NaN, or an order outside (0, inf].

    >>> vendi_score(torch.eye(5)).item()
    5.0
    """
    return kernel_entropy(x, kernel, order, truncation, feature_map).exp()


def rke_score(x: Tensor, kernel: Kernel | None = None, feature_map: FeatureMap | None = None) -> Tensor:
    """Renyi kernel entropy score ``n^2 / ||K||_F^2`` (Jalali, Li, Farnia 2023, arXiv 2310.11714): Vendi of order 2.

    >>> rke_score(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 2.0]])).item()  # 9 / 5
    1.8
    """
    return vendi_score(x, kernel, order=2.0, feature_map=feature_map)


def _joint(
    x: Tensor, t: Tensor, kernel: Kernel | None, prompt_kernel: Kernel | None, maps: tuple[FeatureMap, FeatureMap] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Unit-trace matrices of x, of t, and of both (the Hadamard product)."""
    x, t = _pair(x, t)
    n = x.shape[-2]
    if maps is None:
        k, kt = _gram(x, kernel), _gram(t, prompt_kernel)
    else:
        a, b = maps[0](x).double(), maps[1](t).double()
        k, kt = a @ a.mT, b @ b.mT
    return k / n, kt / n, k * kt / n


def conditional_entropy(
    x: Tensor,
    t: Tensor,
    kernel: Kernel | None = None,
    prompt_kernel: Kernel | None = None,
    order: float = 1.0,
    feature_map: tuple[FeatureMap, FeatureMap] | None = None,
) -> Tensor:
    """``H_q(X | T) = H_q(K o K_T / n) - H_q(K_T / n)`` in nats ``[...]`` (Jalali et al. 2024, arXiv 2411.02817)."""
    _, kt, joint = _joint(x, t, kernel, prompt_kernel, feature_map)
    return _entropy(joint, order) - _entropy(kt, order)


def conditional_vendi_score(
    x: Tensor,
    t: Tensor,
    kernel: Kernel | None = None,
    prompt_kernel: Kernel | None = None,
    order: float = 1.0,
    feature_map: tuple[FeatureMap, FeatureMap] | None = None,
) -> Tensor:
    """Conditional-Vendi: the effective number of distinct samples *per prompt*, at least 1 for ``order >= 1``.

    The exponential of :func:`conditional_entropy`. With one prompt for all it is the Vendi score of ``x``; with prompts that
    are orthogonal, one for each sample, it is 1.

    Args:
        x: samples ``[..., n, d]``.
        t: prompt features ``[..., n, p]``.
        kernel, prompt_kernel: cosine by default.
        order: q in (0, inf].
        feature_map: one map for ``x`` and one for ``t``, instead of the kernels.

    >>> conditional_vendi_score(torch.eye(4), torch.ones(4, 2)).item()
    4.0
    """
    return conditional_entropy(x, t, kernel, prompt_kernel, order, feature_map).exp()


def information_vendi_score(
    x: Tensor,
    t: Tensor,
    kernel: Kernel | None = None,
    prompt_kernel: Kernel | None = None,
    order: float = 1.0,
    feature_map: tuple[FeatureMap, FeatureMap] | None = None,
) -> Tensor:
    """Information-Vendi ``exp(H(X) + H(T) - H(X, T))``: how much of the variety the prompts explain.

    The Vendi score of ``x`` is Conditional-Vendi times this one (Jalali et al. 2024, arXiv 2411.02817).
    """
    k, kt, joint = _joint(x, t, kernel, prompt_kernel, feature_map)
    return (_entropy(k, order) + _entropy(kt, order) - _entropy(joint, order)).exp()


def conditional_rke_score(
    x: Tensor, t: Tensor, kernel: Kernel | None = None, prompt_kernel: Kernel | None = None
) -> Tensor:
    """Conditional RKE ``||K_T||_F^2 / ||K o K_T||_F^2``: Conditional-Vendi of order 2, without eigenvalues.

    The objective that SPARKE ascends (Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173).
    """
    return conditional_vendi_score(x, t, kernel, prompt_kernel, order=2.0)


def mmd(x: Tensor, y: Tensor, kernel: Kernel, unbiased: bool = True) -> Tensor:
    """Squared maximum mean discrepancy ``[...]`` of samples ``x`` ``[..., n, d]`` and ``y`` ``[..., m, d]``.

    Gretton et al. (2012), equation 3 (unbiased; can be below 0) or 5 (biased). With ``PolynomialKernel()`` on Inception
    features the unbiased value is KID.

    Raises:
        ValueError: if the unbiased estimate is asked for with fewer than two samples on a side.
    """
    x, y = _check(x).double(), _check(y, "y").double()
    n, m = x.shape[-2], y.shape[-2]
    if unbiased and min(n, m) < 2:
        raise ValueError(f"the unbiased MMD needs two samples on each side, got {n} and {m}; pass unbiased=False")
    kernel = kernel.fit(torch.cat([x, y], dim=-2))
    kxx, kyy, kxy = kernel(x), kernel(y), kernel(x, y)

    def mean(k: Tensor, count: int) -> Tensor:
        if not unbiased:
            return k.mean((-2, -1))
        return (k.sum((-2, -1)) - k.diagonal(dim1=-2, dim2=-1).sum(-1)) / (count * (count - 1))

    return mean(kxx, n) + mean(kyy, m) - 2 * kxy.mean((-2, -1))
