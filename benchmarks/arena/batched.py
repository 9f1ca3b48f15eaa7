"""The mixtures' exact denoisers with all cases in one batch: a guide is measured on hundreds of cases in seconds.

The step is that of the package (SPARKE on one prompt a batch, DDIM), written once more for tensors ``[cases, n, d]``; a
test holds the two to the same samples.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kspec_guidance.guidance.term import VARIETY_AT_SCALE_1

from .beds.analytic import Analytic, ExactDenoiser

__all__ = ["Setting", "run"]

DUPLICATE = 1e-3  # share of the largest distance below which two rows count as one point, as in the package


@dataclass(frozen=True)
class Setting:
    """A guide, and classifier-free guidance beside it.

    Attributes:
        variety: strength of SPARKE, from 0.
        scale: a strength relative to the norm of the prediction instead, if not 0.
        order: 2 for SPARKE's gradient at half the median distance, else the order of the entropy, at the median distance.
        stop: end of the guided interval.
        ease: weight of classifier-free guidance where the push is strongest; it returns to the bed's as the push fades.
        weight: weight of classifier-free guidance for the whole run.
        guard: whether the part of a move against the prompt is left out.
        until: share of the run after which the weight is the bed's own again.
        log_det: ascend ``log det(I + 4 G)`` of cosines instead, the objective of OSCAR.
        exponential: that of the kernel :class:`~kspec_guidance.kernels.ExpCosineKernel` in place of cosines.
        early: OSCAR's size of moves, ``scale sigma^2 / alpha`` times the norm of the noise, in place of the fade; and its
            projection off the velocity.
    """

    variety: float = 0.0
    scale: float = 0.0
    order: float = 2.0
    stop: float = 0.65
    ease: float | None = None
    weight: float | None = None
    guard: bool = False
    until: float = 1.0
    log_det: bool = False
    exponential: bool = False
    early: bool = False


def norms(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def along(x: Tensor, direction: Tensor) -> Tensor:
    """The factor of ``direction`` in the projection of ``x`` onto it."""
    return (x * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30)


def ascent(x0: Tensor, order: float) -> tuple[Tensor, Tensor]:
    """Ascent direction of the entropy of predictions ``[cases, n, d]``, and their median distance ``[cases, 1, 1]``."""
    u = normalize(x0, dim=-1)
    centred, off = u - u.mean(1, keepdim=True), ~torch.eye(u.shape[1], dtype=torch.bool)
    d2 = torch.cdist(centred, centred, compute_mode="donot_use_mm_for_euclid_dist").square()
    d = d2.sqrt()[:, off]
    d = torch.where(d > DUPLICATE * d.amax(1, keepdim=True), d, torch.nan)
    spread = d.nanmedian(1).values.nan_to_num(1.0)[:, None, None]
    if order == 2:
        weights = torch.exp(-d2 / (0.5 * spread).square()) * off
    else:
        k = torch.exp(-d2.double() / (2 * spread.double().square()))
        values, vectors = torch.linalg.eigh(k / k.shape[-1])
        values = values.clamp_min(1e-10)
        slope = order / (1 - order) * values.pow(order - 1) / values.pow(order).sum(1, keepdim=True)
        weights = (-(vectors * slope[:, None]) @ vectors.mT * k * off).float()
    g = weights.sum(2, keepdim=True) * u - weights @ u
    return (g - (g * u).sum(-1, keepdim=True) * u) / norms(x0), spread


def log_det_ascent(x0: Tensor, exponential: bool = False) -> Tensor:
    """Ascent direction of ``log det(I + 4 K)`` of predictions ``[cases, n, d]``, K their cosines or those of ``exp``.

    What is along a prediction is not removed.
    """
    u = normalize(x0, dim=-1).double()
    k = u @ u.mT
    slope = k.exp() if exponential else torch.ones_like(k)
    k = k.expm1() / math.expm1(1) if exponential else k
    inverse = torch.linalg.inv(torch.eye(u.shape[1], dtype=u.dtype) + 4 * k)
    return ((inverse * slope) @ u).float() / norms(x0)


def noise_in(x: Tensor, alpha: float, sigma: float, log_shares: Tensor, model: ExactDenoiser) -> Tensor:
    """The noise in ``x = alpha x0 + sigma noise``, as :class:`ExactDenoiser` predicts it."""
    variance = (alpha * model.std) ** 2 + sigma**2
    centres = alpha * model.centres
    away2 = x.square().sum(-1, keepdim=True) - 2 * x @ centres.mT + centres.square().sum(1)
    return sigma / variance * (x - (log_shares - away2 / (2 * variance)).softmax(-1) @ centres)


def run(bed: Analytic, cases: list, setting: Setting, start: Tensor | None = None, first: bool = False) -> Tensor:
    """Finished samples ``[cases, n, d]`` of all cases.

    Args:
        bed: the mixture.
        cases: prompts and seeds.
        setting: the guide.
        start: noises ``[cases, n, d]``; by default those that the bed itself would use.
        first: return the clean predictions of the first step instead.
    """
    conditions = bed.pipe.conditions.rows([c.prompt for c in cases])[:, 0]
    with_prompt, without = (bed.model.log_shares(c).detach()[:, None] for c in (conditions, torch.zeros_like(conditions)))
    x = torch.stack([bed.start(case, bed.images).flatten(1) for case in cases]) if start is None else start
    scheduler = bed.pipe.scheduler
    scheduler.set_timesteps(bed.steps)
    levels = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps] + [1.0]
    own = bed.guidance_scale
    lower = own if setting.weight is None else setting.weight
    for k in range(bed.steps):
        alpha, sigma = levels[k] ** 0.5, (1 - levels[k]) ** 0.5
        fraction = k / bed.steps
        fade = math.cos(fraction / setting.stop * math.pi / 2) ** 2 if fraction < setting.stop - 1e-9 else 0.0
        cond, uncond = (noise_in(x, alpha, sigma, log_shares, bed.model) for log_shares in (with_prompt, without))
        usual = own if fraction >= setting.until else lower
        weight = usual if setting.ease is None else usual - max(usual - setting.ease, 0.0) * fade
        e = uncond + weight * (cond - uncond)
        x0 = (x - sigma * e) / alpha
        if first:
            return x0
        strength = setting.scale or setting.variety
        if (setting.early or fade) and strength:
            g, spread = (
                (log_det_ascent(x0, setting.exponential), norms(x0)) if setting.log_det else ascent(x0, setting.order)
            )
            g = g - along(g, x0) * x0
            direction = x0 - e if setting.early else sigma * e
            g = g - along(g, direction) * direction
            if setting.guard:
                toward = uncond - cond  # of the noise, so that of the prediction with the prompt less that without
                g = g - along(g, toward).clamp_max(0) * toward
            size = setting.scale if setting.scale else setting.variety / VARIETY_AT_SCALE_1 * spread.square()
            size = size * (sigma**2 / alpha * norms(e) if setting.early else fade * norms(x0))
            x0 = x0 + size * g / norms(g).amax(1, keepdim=True).clamp_min(1e-30)
        a2, s2 = levels[k + 1] ** 0.5, (1 - levels[k + 1]) ** 0.5
        x = a2 * x0 + s2 * (x - alpha * x0) / sigma
    return x
