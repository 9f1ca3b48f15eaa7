"""Scendi: diversity of images that their prompts do not explain, by a Schur complement."""

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import FeatureMap, check_paired, map_rows, on_host
from kspec_guidance.kernels import CosineKernel, l2_normalize
from kspec_guidance.kernels.spectrum import (
    cholesky_factor,
    cross_products,
    eigenvalues,
    inverse_of_factor,
    own_products,
    times_factor,
)

__all__ = ["prompt_vendi_score", "remove_prompt", "scendi_matrices", "scendi_score", "unnormalised_score"]

WELL_CONDITIONED = 1e8  # largest condition number of C_TT, by its bound, for which its Cholesky factor is used
CUTOFF = 1e-10  # smaller eigenvalues of C_TT, relative to the largest, are treated as 0


def unnormalised_score(matrix: Tensor) -> Tensor:
    """``exp(-sum l log(l / sum l))`` ``[...]``: weighted by the eigenvalues, which may sum to less than 1."""
    l = eigenvalues(matrix)
    mass = l.sum(-1, keepdim=True)
    nonzero = l > l.shape[-1] * torch.finfo(l.dtype).eps
    safe = torch.where(nonzero, l, 1.0)
    share = torch.where(nonzero, safe / torch.where(mass > 0, mass, 1.0), 1.0)
    return (-torch.where(nonzero, safe * share.log(), 0.0).sum(-1)).exp()


def _features(x: Tensor, prompt_features: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None):
    x, prompt_features = check_paired(x, prompt_features)
    if feature_map is None:
        return CosineKernel.features(on_host(x)), CosineKernel.features(on_host(prompt_features))
    maps = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    if isinstance(feature_map, Tensor):
        raise ValueError("feature_map as rows needs a pair (rows of x, rows of prompt_features)")
    return map_rows(maps[0], x), map_rows(maps[1], prompt_features)


def regression(c_xt: Tensor, c_tt: Tensor) -> Tensor:
    """``C_XT C_TT^+`` ``[..., d, p]``: the best linear prediction of image features from prompt features."""
    return c_xt @ torch.linalg.pinv(c_tt, rtol=CUTOFF, hermitian=True)


def _whitened(c: Tensor, b: Tensor) -> Tensor:
    """``W b`` with ``W' W = C^+``, for a semi-definite ``C`` ``[p, p]``; eigenvalues below the cutoff are treated as 0.

    By the Cholesky factor L if the smallest eigenvalue, which is at least ``1 / |L^-1|_F^2``, is far above the cutoff: then
    both routes agree, within ``p`` rounding units times the condition number, of at most 1e8.
    """
    factor = cholesky_factor(c)
    if factor is not None:
        w = inverse_of_factor(factor)
        if float(w.square().sum()) * float(c.trace()) < WELL_CONDITIONED:
            return times_factor(w, b)
    l, v = torch.linalg.eigh(c)
    keep = l > CUTOFF * l.abs().amax()
    return l[keep].rsqrt()[:, None] * (v[:, keep].mT @ b)


def schur_parts(c_xx: Tensor, c_xt: Tensor, c_tt: Tensor) -> tuple[Tensor, Tensor]:
    """``C_XX - C_XT C_TT^+ C_TX`` and ``C_XT C_TT^+ C_TX``."""
    if c_tt.ndim == 2 and not (torch.is_grad_enabled() and any(c.requires_grad for c in (c_xx, c_xt, c_tt))):
        explained = own_products(_whitened(c_tt, c_xt.mT))
    else:  # the pseudo-inverse has a gradient also where eigenvalues are equal
        explained = regression(c_xt, c_tt) @ c_xt.mT
    return c_xx - explained, explained


def scendi_matrices(
    x: Tensor, prompt_features: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = None
) -> tuple[Tensor, Tensor]:
    """The second moment of ``x`` in two parts ``[..., d, d]``: not explained by the prompts, and explained.

    Arguments and errors are those of :func:`scendi_score`.
    """
    a, b = _features(x, prompt_features, feature_map)
    n = a.shape[-2]
    return schur_parts(own_products(a) / n, cross_products(a, b) / n, own_products(b) / n)


def scendi_score(
    x: Tensor, prompt_features: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = None
) -> Tensor:
    """Scendi ``[...]``: diversity of the images that the prompts do not explain (Ospanov et al. 2024, arXiv 2412.18645).

    ``exp(-sum l log(l / sum l))`` over the eigenvalues of ``S = C_XX - C_XT C_TT^+ C_TX``, where the matrices are second
    moments. It is 1 when the prompts determine the images, and the Vendi score of ``x`` when both are uncorrelated.

    Args:
        x: image features ``[..., n, d]``.
        prompt_features: ``[..., n, p]``.
        feature_map: by default rows scaled to norm 1, for embeddings such as CLIP's; else one map for both, or a pair of
            maps or rows, such as random Fourier features.

    Raises:
        ValueError: for an empty set, NaN, or different numbers of samples and prompts.
    """
    return unnormalised_score(scendi_matrices(x, prompt_features, feature_map)[0])


def prompt_vendi_score(
    x: Tensor, prompt_features: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = None
) -> Tensor:
    """The score of ``C_XT C_TT^+ C_TX``: diversity of the images that their prompts explain."""
    return unnormalised_score(scendi_matrices(x, prompt_features, feature_map)[1])


def remove_prompt(x: Tensor, prompt_features: Tensor, fit: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Image embeddings ``[..., n, d]`` without what their prompts predict: ``x - C_XT C_TT^+ t`` on rows of norm 1.

    The result is uncorrelated with the prompt embeddings ``t``. It has the device of ``x``, and its dtype, or float32 for
    half precision.

    Args:
        x: image embeddings ``[..., n, d]``.
        prompt_features: prompt embeddings ``[..., n, p]``.
        fit: a larger set ``(x, prompt_features)`` to estimate the moments from; by default the same pairs.
    """
    x, prompt_features = check_paired(x, prompt_features)
    a, b = l2_normalize(on_host(x)), l2_normalize(on_host(prompt_features))
    if fit is None:
        p, q = a, b
    else:
        p, q = (l2_normalize(on_host(z)) for z in check_paired(*fit))
    w = regression(p.mT @ q, q.mT @ q)
    return (a - b @ w.mT).to(x)
