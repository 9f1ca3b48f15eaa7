"""The mixtures' exact denoisers with all cases in one batch: a guide is measured on hundreds of cases in seconds.

The step is that of the package (SPARKE on one prompt a batch, DDIM), written once more for tensors ``[cases, n, d]``; a
test holds the two to the same samples.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from kspec_guidance.bench.methods import Method
from kspec_guidance.bench.methods.combined import InInterval
from kspec_guidance.bench.methods.onebyone import OursOneByOne, SPELLOneByOne
from kspec_guidance.guidance.recall import sharpness
from kspec_guidance.guidance.term import FEW_NUMBERS, VARIETY_AT_SCALE_1

from .beds.analytic import Analytic, ExactDenoiser
from .beds.base import CALL_SEEDS, Case

__all__ = ["Batch", "Setting", "run"]

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
        share: the same as a share of what the bed's own weight adds to the prediction with the prompt.
        guard: whether the part of a move against the prompt is left out.
        off_score: whether that along the score is, as in the package.
        unit: whether predictions are compared at norm 1, as in the package, so that no move changes their norm.
        interval: shares of the run between which the weight is the bed's own; it is 1 outside.
        until: share of the run after which the weight is the bed's own again.
        log_det: ascend ``log det(I + 4 G)`` of cosines instead, the objective of OSCAR.
        exponential: that of the kernel :class:`~kspec_guidance.kernels.ExpCosineKernel` in place of cosines.
        early: OSCAR's size of moves, ``scale sigma^2 / alpha`` times the norm of the noise, in place of the fade; and its
            projection off the velocity.
        c: the factor of the kernel in the log determinant.
        dpp: DiverseFlow instead, its gradient through the denoiser, with this ``h``; its weight is ``scale``.
        calls: calls of the pipeline; a memory holds the samples of all calls before.
        sizes: strength of each step in place of the fade, relative to ``scale``.
        by_spread: largest part of classifier-free guidance in a prediction, relative to the median distance of the
            predictions of a prompt without it.
        images: samples of each call; by default the bed's.
        spell: radius of SPELL, from the samples of earlier calls alone; its overcompensation is ``scale``.
        recall: how the memory repels: ``none``, ``all`` or ``nearest``, as in the package; ``all, same step`` compares with
            the predictions of earlier calls at the same step instead, and ``nearest to x0`` asks which rows the clean
            prediction is nearest to, instead of the noisy sample.
    """

    variety: float = 0.0
    scale: float = 0.0
    order: float = 2.0
    stop: float = 0.65
    ease: float | None = None
    weight: float | None = None
    guard: bool = False
    off_score: bool = True
    unit: bool = True
    until: float = 1.0
    log_det: bool = False
    exponential: bool = False
    early: bool = False
    calls: int = 1
    images: int | None = None
    recall: str = "all"
    share: float | None = None
    c: float = 4.0
    dpp: float = 0.0
    sizes: tuple[float, ...] | None = None
    by_spread: float | None = None
    spell: float = 0.0
    interval: tuple[float, float] | None = None


def norms(x: Tensor) -> Tensor:
    return x.norm(dim=-1, keepdim=True)


def along(x: Tensor, direction: Tensor) -> Tensor:
    """The factor of ``direction`` in the projection of ``x`` onto it."""
    return (x * direction).sum(-1, keepdim=True) / direction.square().sum(-1, keepdim=True).clamp_min(1e-30)


def distances(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distances of unit rows ``[cases, n, d]`` from others, and the median ``[cases, 1, 1]`` of those of pairs.

    The first n of the others are the rows themselves.
    """
    centre, off = others.mean(1, keepdim=True), ~torch.eye(rows.shape[1], others.shape[1], dtype=torch.bool)
    d2 = torch.cdist(rows - centre, others - centre, compute_mode="donot_use_mm_for_euclid_dist").square()
    d = d2.sqrt()[:, off]
    if not d.shape[1]:
        return d2, torch.ones(len(d2), 1, 1)
    d = torch.where(d > DUPLICATE * d.amax(1, keepdim=True), d, torch.nan)
    return d2, d.nanmedian(1).values.nan_to_num(1.0)[:, None, None]


def ascent(u: Tensor, order: float, memory: Tensor, unit: bool = True) -> Tensor:
    """Ascent direction of the entropy of rows ``[cases, n, d]``, if of norm 1 on the sphere, and of those of a memory."""
    n, z = u.shape[1], torch.cat([u, memory], 1)
    off = ~torch.eye(z.shape[1], dtype=torch.bool)
    if order == 2:
        d2, spread = distances(u, z)
        weights = torch.exp(-d2 / (0.5 * spread).square()) * off[:n]
    else:
        d2, spread = distances(z, z)
        k = torch.exp(-d2.double() / (2 * spread.double().square()))
        values, vectors = torch.linalg.eigh(k / k.shape[-1])
        values = values.clamp_min(1e-10)
        slope = order / (1 - order) * values.pow(order - 1) / values.pow(order).sum(1, keepdim=True)
        weights = (-(vectors * slope[:, None]) @ vectors.mT * k * off).float()[:, :n]
    g = weights.sum(2, keepdim=True) * u - weights @ z
    return g - (g * u).sum(-1, keepdim=True) * u if unit else g


def log_det_ascent(u: Tensor, exponential: bool, memory: Tensor, c: float = 4.0) -> Tensor:
    """Ascent direction of ``log det(I + c K)`` of unit rows, K their cosines or those of ``exp``."""
    n, z = u.shape[1], torch.cat([u, memory], 1).double()
    k = z @ z.mT
    slope = k.exp() if exponential else torch.ones_like(k)
    k = k.expm1() / math.expm1(1) if exponential else k
    inverse = torch.linalg.inv(torch.eye(z.shape[1], dtype=z.dtype) + c * k)
    g = ((inverse * slope)[:, :n] @ z).float()
    return g - (g * u).sum(-1, keepdim=True) * u


def away_from(u: Tensor, seen: Tensor, memory: Tensor, ratio: float) -> Tensor:
    """The way of unit rows from the unit rows of a memory that ``seen`` is nearest to, at this noise-to-signal ratio."""
    z = normalize(seen, dim=-1) @ memory.mT
    z = z - z.mean(-1, keepdim=True)
    z = z / z.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-6)
    mean = (sharpness(ratio) * z).softmax(-1) @ memory
    return (mean * u).sum(-1, keepdim=True) * u - mean


def dpp_ascent(predict: Callable[[Tensor], Tensor], x: Tensor, h: float) -> Tensor:
    """Ascent direction in noisy samples ``[cases, n, d]`` of the likelihood of a determinantal point process.

    It is ``log det L - log det(L + I)`` of the predictions, ``L_ij = exp(-h |x_i - x_j|^2 / (2 median))``.
    """
    off = ~torch.eye(x.shape[1], dtype=torch.bool)
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        x0 = predict(x).double()
        d2 = (x0[:, :, None] - x0[:, None]).square().sum(-1)
        median = d2.detach()[:, off].median(1).values.clamp_min(1e-12)[:, None, None]
        l, eye = torch.exp(-h * d2 / (2 * median)), torch.eye(x.shape[1], dtype=x0.dtype)
        value = torch.logdet(l + 1e-6 * eye) - torch.logdet(l + eye)
        (g,) = torch.autograd.grad(value.sum(), x)
    return torch.nan_to_num(g)


def out_of_balls(rows: Tensor, others: Tensor, radius: float) -> Tensor:
    """SPELL's move of rows ``[cases, n, d]`` out of the balls around others ``[cases, m, d]``."""
    push = torch.relu(radius / torch.cdist(rows, others).clamp_min(1e-6 * radius) - 1)
    return push.sum(-1, keepdim=True) * rows - push @ others


def to_one(g: Tensor) -> Tensor:
    return g / norms(g).amax(1, keepdim=True).clamp_min(1e-30)


def weight_by_spread(bound: float, own: float, with_prompt: Tensor, added: Tensor) -> Tensor:
    """The weight of classifier-free guidance ``[cases, 1, 1]`` at which it adds at most ``bound`` of the spread.

    Args:
        bound: norm of what it adds, relative to the median distance of predictions of a prompt.
        own: the pipeline's weight, which is not exceeded.
        with_prompt: clean predictions with the prompt ``[cases, n, d]``.
        added: those less predictions without the prompt.
    """
    n = with_prompt.shape[1]
    apart = torch.cdist(with_prompt, with_prompt)[:, ~torch.eye(n, dtype=torch.bool)].median(1).values[:, None, None]
    return 1 + (bound * apart / norms(added).mean(1, keepdim=True).clamp_min(1e-30)).clamp_max(own - 1)


def noise_in(x: Tensor, alpha: float, sigma: float, log_shares: Tensor, model: ExactDenoiser) -> Tensor:
    """The noise in ``x = alpha x0 + sigma noise``, as :class:`ExactDenoiser` predicts it."""
    variance = (alpha * model.std) ** 2 + sigma**2
    centres = alpha * model.centres
    away2 = x.square().sum(-1, keepdim=True) - 2 * x @ centres.mT + centres.square().sum(1)
    return sigma / variance * (x - (log_shares - away2 / (2 * variance)).softmax(-1) @ centres)


def run(bed: Analytic, cases: list, setting: Setting, start: Tensor | None = None, until: int = 0) -> Tensor:
    """Finished samples ``[cases, n, d]`` of all cases.

    Args:
        bed: the mixture.
        cases: prompts and seeds.
        setting: the guide.
        start: noises ``[cases, n, d]``, dealt to the calls in order; by default those that the bed itself would use.
        until: return the clean predictions of this step instead, counted from 1.
    """
    found, steps = [], []
    for call in range(setting.calls):
        if start is not None:
            x = start.tensor_split(setting.calls, 1)[call]
        else:
            later = [replace(c, seed=c.seed + CALL_SEEDS * call) for c in cases]
            x = torch.stack([bed.start(c, setting.images or bed.images).flatten(1) for c in later])
        x, predictions = one_call(bed, cases, setting, x, found, steps, until)
        found.append(x)
        steps.append(predictions)
    return torch.cat(found, 1)


def one_call(
    bed: Analytic, cases: list, setting: Setting, x: Tensor, found: list, steps: list, until: int
) -> tuple[Tensor, list[Tensor]]:
    """Finished samples of one call and its clean predictions, given those of the calls before."""
    predictions: list[Tensor] = []
    conditions = bed.pipe.conditions.rows([c.prompt for c in cases])[:, 0]
    with_prompt, without = (bed.model.log_shares(c).detach()[:, None] for c in (conditions, torch.zeros_like(conditions)))
    finished = normalize(torch.cat(found, 1), dim=-1) if found and setting.recall != "none" else x[:, :0]
    scheduler = bed.pipe.scheduler
    scheduler.set_timesteps(bed.steps)
    levels = [float(scheduler.alphas_cumprod[int(t)]) for t in scheduler.timesteps] + [1.0]
    own = bed.guidance_scale
    lower = own if setting.weight is None else setting.weight
    lower = lower if setting.share is None else 1 + setting.share * (lower - 1)
    for k in range(bed.steps):
        alpha, sigma = levels[k] ** 0.5, (1 - levels[k]) ** 0.5
        fraction = k / bed.steps
        fade = math.cos(fraction / setting.stop * math.pi / 2) ** 2 if fraction < setting.stop - 1e-9 else 0.0
        fade = fade if setting.sizes is None else setting.sizes[k]
        usual = own if fraction >= setting.until else lower
        if setting.interval is not None:
            usual = own if setting.interval[0] <= fraction < setting.interval[1] else 1.0
        weight = usual if setting.ease is None else usual - max(usual - setting.ease, 0.0) * fade

        def noises(x: Tensor, alpha: float = alpha, sigma: float = sigma, weight: float = weight) -> tuple[Tensor, ...]:
            cond, uncond = (noise_in(x, alpha, sigma, log_shares, bed.model) for log_shares in (with_prompt, without))
            return cond, uncond, uncond + weight * (cond - uncond)

        cond, uncond, e = noises(x)
        if setting.by_spread is not None:
            bounded = weight_by_spread(setting.by_spread, own, (x - sigma * cond) / alpha, sigma / alpha * (cond - uncond))
            e = uncond + bounded * (cond - uncond)
        x0 = (x - sigma * e) / alpha
        if k + 1 == until:
            return x0, predictions
        strength = 0.0 if setting.dpp or setting.spell else setting.scale or setting.variety
        if setting.dpp:
            g = dpp_ascent(lambda y, a=alpha, s=sigma, at=noises: (y - s * at(y)[2]) / a, x, setting.dpp)
            x0 = x0 + setting.scale * sigma**2 / alpha * norms(e) * to_one(g)
        if setting.spell and found:
            x0 = x0 + setting.scale * out_of_balls(x0, torch.cat(found, 1), setting.spell)
        if (setting.early or fade) and strength:
            u, memory = normalize(x0, dim=-1), finished
            if setting.recall == "all, same step" and found:
                memory = normalize(torch.cat([earlier[k] for earlier in steps], 1), dim=-1)
            recalled = setting.recall.startswith("nearest") and memory.shape[1]
            rows = memory[:, :0] if recalled else memory
            if not setting.unit:
                g = ascent(x0, setting.order, rows, unit=False) * norms(x0)
            elif setting.log_det:
                g = log_det_ascent(u, setting.exponential, rows, setting.c)
            else:
                g = ascent(u, setting.order, rows)
            if recalled:
                seen = x if setting.recall == "nearest" else x0
                g = to_one(g) + to_one(away_from(u, seen, memory, sigma / alpha))
            spread = distances(u, torch.cat([u, memory], 1))[1]
            g = g / norms(x0)
            direction = x0 - e if setting.early else sigma * e
            if setting.off_score:
                g = g - along(g, direction) * direction
            if setting.guard:
                toward = uncond - cond  # of the noise, so that of the prediction with the prompt less that without
                g = g - along(g, toward).clamp_max(0) * toward
            size = setting.scale if setting.scale else setting.variety / VARIETY_AT_SCALE_1 * spread.square()
            size = size * (sigma**2 / alpha * norms(e) if setting.early else fade * norms(x0))
            x0 = x0 + size * to_one(g)
        predictions.append(x0)
        a2, s2 = levels[k + 1] ** 0.5, (1 - levels[k + 1]) ** 0.5
        x = a2 * x0 + s2 * (x - alpha * x0) / sigma
    return x, predictions


class Batch:
    """Measures cases of a mixture in one batch where the method makes images one by one, and others one after another.

    In place of :class:`~benchmarks.arena.workers.Workers`.
    """

    def __init__(self, bed: Analytic):
        self.bed = bed

    def setting(self, method: Method) -> Setting | None:
        """The method as a setting, where it makes images one by one."""
        single: dict[str, Any] = {"calls": self.bed.images, "images": 1}
        if isinstance(method, SPELLOneByOne):
            radius, weight = method.r * self.bed.radius_unit(), getattr(method, "cfg", None)
            return Setting(scale=method.overcompensation, spell=radius, weight=weight, **single)
        if not isinstance(method, OursOneByOne):
            return None
        return Setting(
            scale=method.scale, stop=method.stop, weight=getattr(method, "weight", None), recall="nearest",
            interval=(method.cfg_start, method.cfg_stop) if isinstance(method, InInterval) else None,
            off_score=self.bed.model.dim > FEW_NUMBERS, **single,
        )  # fmt: skip

    def measure(
        self, measure: Callable[..., Any], make: Callable[[], Method], cases: Sequence[Case]
    ) -> Iterator[tuple[Tensor, dict[str, float]]]:
        """``measure(bed, make, case)`` of each case, in order."""
        setting = self.setting(make())
        if setting is None:
            yield from (measure(self.bed, make, case) for case in cases)
            return
        began = time.perf_counter()
        start = torch.stack([self.bed.start(case, self.bed.images).flatten(1) for case in cases])
        found = run(self.bed, list(cases), setting, start)
        seconds = (time.perf_counter() - began) / len(cases)
        for samples, case in zip(found, cases, strict=True):
            rows = self.bed.rows(torch.nan_to_num(samples, 0.0, 1e3, -1e3))
            yield rows, {**self.bed.figures(rows, case), "seconds": seconds}
