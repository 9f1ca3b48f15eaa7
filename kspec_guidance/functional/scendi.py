"""Scendi: what of the images' variety is their own, and what their prompts explain, by a Schur complement."""

import torch
from torch import Tensor

from kspec_guidance.functional.inputs import FeatureMap, check_paired, check_samples, map_rows
from kspec_guidance.kernels import CosineKernel, l2_normalize
from kspec_guidance.kernels.spectrum import eigenvalues

__all__ = ["prompt_vendi_score", "remove_prompt", "scendi_matrices", "scendi_score", "unnormalised_score"]

CUTOFF = 1e-10  # eigenvalues of C_TT below this share of the largest are dependencies between features, not prompts


def unnormalised_score(matrix: Tensor) -> Tensor:
    """``exp(-sum l log(l / sum l))`` ``[...]``: the weights are the eigenvalues, which may sum to less than 1."""
    l = eigenvalues(matrix)
    mass = l.sum(-1, keepdim=True)
    alive = l > l.shape[-1] * torch.finfo(l.dtype).eps
    safe = torch.where(alive, l, 1.0)
    share = torch.where(alive, safe / torch.where(mass > 0, mass, 1.0), 1.0)
    return (-torch.where(alive, safe * share.log(), 0.0).sum(-1)).exp()


def _features(x: Tensor, t: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None):
    x, t = check_paired(x, t)
    if feature_map is None:
        return CosineKernel.features(x.double()), CosineKernel.features(t.double())
    maps = feature_map if isinstance(feature_map, tuple) else (feature_map, feature_map)
    if isinstance(feature_map, Tensor):
        raise ValueError("feature_map as rows needs a pair (rows of x, rows of t)")
    return map_rows(maps[0], x), map_rows(maps[1], t)


def regression(c_xt: Tensor, c_tt: Tensor) -> Tensor:
    """``C_XT C_TT^+`` ``[..., d, p]``: the best linear prediction of image features from prompt features."""
    return c_xt @ torch.linalg.pinv(c_tt, rtol=CUTOFF, hermitian=True)


def schur_parts(c_xx: Tensor, c_xt: Tensor, c_tt: Tensor) -> tuple[Tensor, Tensor]:
    """``C_XX - C_XT C_TT^+ C_TX`` and ``C_XT C_TT^+ C_TX``."""
    explained = regression(c_xt, c_tt) @ c_xt.mT
    return c_xx - explained, explained


def scendi_matrices(
    x: Tensor, t: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = None
) -> tuple[Tensor, Tensor]:
    """The images' own part and the prompts' part ``[..., d, d]`` of the second moment of ``x``; they add up to it.

    Args: as :func:`scendi_score`.
    """
    a, b = _features(x, t, feature_map)
    n = a.shape[-2]
    return schur_parts(a.mT @ a / n, a.mT @ b / n, b.mT @ b / n)


def scendi_score(x: Tensor, t: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = None) -> Tensor:
    """Scendi ``[...]``: variety of the images that the prompts do not explain (Ospanov et al. 2024, arXiv 2412.18645).

    ``exp(-sum l log(l / sum l))`` over the eigenvalues of ``S = C_XX - C_XT C_TT^+ C_TX``, the matrices being second
    moments. It is 1 when the prompts determine the images, and the Vendi score of ``x`` when both are uncorrelated.

    Args:
        x, t: image and prompt features ``[..., n, d]`` and ``[..., n, p]``.
        feature_map: unit rows of ``x`` and ``t`` by default (for CLIP-like embeddings); one map for both, or a pair of maps
            or rows, e.g. random Fourier features.

    Raises:
        ValueError: for no samples, NaN, or different numbers of samples and prompts.
    """
    return unnormalised_score(scendi_matrices(x, t, feature_map)[0])


def prompt_vendi_score(
    x: Tensor, t: Tensor, feature_map: FeatureMap | tuple[FeatureMap, FeatureMap] | None = None
) -> Tensor:
    """The same score of ``C_XT C_TT^+ C_TX``: the variety of the images that comes from their prompts."""
    return unnormalised_score(scendi_matrices(x, t, feature_map)[1])


def remove_prompt(x: Tensor, t: Tensor, fit: tuple[Tensor, Tensor] | None = None) -> Tensor:
    """Image embeddings with their prompts' influence taken out: ``x - C_XT C_TT^+ t`` on unit rows, ``[..., n, d]``.

    What remains is uncorrelated with the prompts.

    Args:
        x, t: image and prompt embeddings of the pairs to be cleaned.
        fit: a larger set of pairs ``(x, t)`` to estimate the moments from; by default the pairs themselves.
    """
    x, t = check_paired(x, t)
    a, b = l2_normalize(x.double()), l2_normalize(t.double())
    if fit is None:
        p, q = a, b
    else:
        p, q = (l2_normalize(check_samples(z, "fit").double()) for z in check_paired(*fit))
    w = regression(p.mT @ q, q.mT @ q)
    return (a - b @ w.mT).to(x.dtype)
