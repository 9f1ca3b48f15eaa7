"""Search for a guide's scale with a few short runs: diversity against fidelity, and whether guidance helps at all.

No other model and no reference set is needed. Diversity is the Vendi score of a prompt's images; fidelity is the precision
of guided images against plain images of other seeds (Kynkaanniemi et al. 2019, arXiv 1904.06991): the share of images in
the support of the pipeline's own images. Plain images of the same seeds give the reference value.
"""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from statistics import fmean as mean
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.functional.fidelity import in_manifold
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.kernels import GaussianKernel, l2_normalize, median_bandwidth
from kspec_guidance.statistics import Comparison, compare_paired
from kspec_guidance.synthesis import RunFailedError
from kspec_guidance.synthesis.generator import check_call
from kspec_guidance.utils.arguments import renamed_arguments

__all__ = ["HELPS", "NO_HELP", "TOO_FEW", "Difference", "Tuning", "TuningPoint", "tune"]

DEFAULT_SCALES = (0.15, 0.3, 0.6, 1.2, 2.4)
MAX_BATCHES = 100_000  # of an advice
POWER = 0.8  # with which a difference of the size `detectable` is found
HELPS, NO_HELP, TOO_FEW = "helps", "does not help", "too few images to tell"
Embed = Callable[[list[Image.Image]], Tensor]


@dataclass(frozen=True)
class Difference:
    """Mean difference of a score between guided and plain batches of the same prompts and seeds.

    Attributes:
        mean: of the differences.
        low, high: ends of its interval, by Student's t; infinite for one batch. It holds with 95% for all differences
            that are compared together (Bonferroni).
        detectable: the smallest true difference that so many batches find with a power of 80% (Bloom 1995, Evaluation
            Review 19: minimum detectable effect); infinite for one batch.
        batches: number of pairs of batches.
        comparisons: number of differences, one of each scale, that are compared together.
    """

    mean: float
    low: float
    high: float
    detectable: float
    batches: int
    comparisons: int = 1

    @classmethod
    def of(cls, plain: Sequence[float], guided: Sequence[float], comparisons: int = 1) -> "Difference":
        """The difference of scores, one of each batch, in the same order."""
        d = torch.tensor(guided, dtype=torch.float64) - torch.tensor(plain, dtype=torch.float64)
        n, mean = len(d), float(d.mean())
        if n < 2:
            return cls(mean, -math.inf, math.inf, math.inf, n, comparisons)
        se = float(d.std()) / math.sqrt(n)
        half, detectable = (q * se for q in _quantiles(n, comparisons))
        return cls(mean, mean - half, mean + half, detectable, n, comparisons)

    def relative(self, base: float) -> str:
        """The mean and its interval in percent of ``base``, for messages."""
        return f"{self.mean / base:+.0%} [{self.low / base:+.0%}, {self.high / base:+.0%}]"

    def batches_for(self, size: float) -> float:
        """About how many batches find a true difference of this size, if they vary as these do; infinite if unknown."""
        if not (size > 0 and math.isfinite(self.detectable)):
            return math.inf
        deviation = self.detectable / _quantiles(self.batches, self.comparisons)[1] * math.sqrt(self.batches)
        n = 2
        while n < MAX_BATCHES and _quantiles(n, self.comparisons)[1] * deviation / math.sqrt(n) > size:
            n += max(1, n // 50)
        return n if n < MAX_BATCHES else math.inf


def _quantiles(n: int, comparisons: int = 1) -> tuple[float, float]:
    """Half the width of an interval from n pairs, and the smallest difference that is found, in standard errors."""
    from scipy.stats import t

    half = float(t.ppf(1 - 0.025 / comparisons, n - 1))
    return half, half + float(t.ppf(POWER, n - 1))


@dataclass(frozen=True)
class TuningPoint:
    """Results of one scale.

    Attributes:
        scale: scale of the guide.
        diversity: mean Vendi score of a batch.
        fidelity: precision against plain images of other seeds, in 0..1.
        test: paired test of diversity against plain sampling, by batch.
        gain: difference of diversity from plain sampling.
        loss: difference of fidelity, plain minus guided.
    """

    scale: float
    diversity: float
    fidelity: float
    test: Comparison
    gain: Difference
    loss: Difference


@dataclass
class Tuning:
    """The result of :func:`tune`.

    Attributes:
        plain_diversity, plain_fidelity: diversity and fidelity of plain sampling.
        points: results of each scale.
        scale: the chosen scale; None if guidance does not help, or if there are too few images to tell.
        verdict: ``helps``, ``does not help`` or ``too few images to tell``.
        reason: reason of the verdict, in a few sentences.
        detectable_gain: the smallest relative gain in diversity that would have been found with a power of 80%.
        batches_needed: batches of each prompt to decide, if there are too few now; None if there are enough, or if no
            number can be given.
        images: images of plain sampling and of each scale, by prompt.
    """

    plain_diversity: float
    plain_fidelity: float
    points: list[TuningPoint]
    scale: float | None
    verdict: str
    reason: str
    detectable_gain: float
    batches_needed: int | None
    images: list[dict[str, list[Image.Image]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; images left out."""
        return {k: v for k, v in asdict(self).items() if k != "images"}


@dataclass(frozen=True)
class Decision:
    """What :func:`decide` finds; see :class:`Tuning`."""

    scale: float | None
    verdict: str
    reason: str
    detectable_gain: float
    batches_needed: int | None = None


def decide(
    points: Sequence[TuningPoint],
    plain_diversity: float,
    plain_fidelity: float,
    max_fidelity_loss: float,
    min_gain: float,
    prompts: int,
    batch_size: int,
) -> Decision:
    """Choose a scale, or tell whether guidance does not help or there are too few images to know.

    A scale is accepted if it keeps fidelity and the interval of its gain lies above 0; the one of largest diversity is
    chosen. It is ruled out if its interval lies below ``min_gain``, or if that of its loss lies above
    ``max_fidelity_loss``. If none is accepted and not all are ruled out, there are too few images.
    """
    least = min_gain * plain_diversity
    keeps = [p for p in points if p.fidelity >= plain_fidelity - max_fidelity_loss]
    accepted = [p for p in keeps if p.gain.low > 0]
    best = max(accepted or keeps or points, key=lambda p: p.diversity)
    detectable = best.gain.detectable / plain_diversity
    if accepted:
        reason = (
            f"scale {best.scale:g} gives {best.diversity:.2f} different images per batch instead of {plain_diversity:.2f} "
            f"({best.gain.relative(plain_diversity)}) at fidelity {best.fidelity:.2f} instead of {plain_fidelity:.2f}"
        )
        return Decision(best.scale, HELPS, reason, detectable)
    small, lossy = [p for p in points if p.gain.high < least], [p for p in points if p.loss.low > max_fidelity_loss]
    unsure = [p for p in points if p not in small and p not in lossy]
    if not unsure and not small:
        return Decision(
            None,
            NO_HELP,
            f"every scale loses more than {max_fidelity_loss:g} of fidelity: guidance does not help here; try smaller "
            "scales, a lower guidance_scale of the pipeline, or more denoising steps",
            detectable,
        )
    if not unsure:
        return Decision(
            None,
            NO_HELP,
            f"no scale that keeps fidelity gains {min_gain:.0%} of diversity (scale {best.scale:g}: "
            f"{best.gain.relative(plain_diversity)}): guidance does not help here; the pipeline may be diverse enough "
            "already",
            detectable,
        )
    open_point = max(unsure, key=lambda p: (p in keeps, p.diversity))
    return _undecided(open_point, plain_diversity, max_fidelity_loss, min_gain, prompts, batch_size)


def _undecided(
    point: TuningPoint, plain_diversity: float, max_fidelity_loss: float, min_gain: float, prompts: int, batch_size: int
) -> Decision:
    """The decision if there are too few images to tell whether this scale helps."""
    gain, loss = point.gain, point.loss
    images = f"{gain.batches * batch_size} images of each scale ({gain.batches} batches of {batch_size})"
    advice = "give more prompts, or more batches of each (--batches)"
    if gain.batches < 2:
        reason = f"{TOO_FEW}: one batch of each scale shows no variation; {advice}"
        return Decision(None, TOO_FEW, reason, gain.detectable)
    detectable = gain.detectable / plain_diversity
    if gain.low > 0:  # what is open is the loss
        found = (
            f"scale {point.scale:g} changes fidelity by {-loss.mean:+.2f} [{-loss.high:+.2f}, {-loss.low:+.2f}], where a "
            f"loss of {max_fidelity_loss:g} is accepted. With {images}, a change of {loss.detectable:.2f} or more would "
            "have been found (power 80%)"
        )
        size = loss.mean - max_fidelity_loss
        needed, wanted = loss.batches_for(size), f"a loss that is larger than this by {size:.2g}"
    else:
        found = (
            f"scale {point.scale:g} gains {gain.relative(plain_diversity)} of diversity. With {images}, a gain of "
            f"{detectable:.0%} or more would have been found (power 80%)"
        )
        needed, wanted = gain.batches_for(min_gain * plain_diversity), f"one of {min_gain:.0%}"
    per_prompt = None if math.isinf(needed) else max(math.ceil(needed / prompts), gain.batches // prompts + 1)
    if per_prompt is not None:
        advice = (
            f"to find {wanted}, about {per_prompt * prompts * batch_size} images of each scale are needed: --batches "
            f"{per_prompt}, or {math.ceil(per_prompt / (gain.batches / prompts))} times as many prompts"
        )
    return Decision(None, TOO_FEW, f"{TOO_FEW}: {found}; {advice}", detectable, per_prompt)


@renamed_arguments(images="batch_size", loss="max_fidelity_loss", tick="progress_callback")
def tune(
    pipe: Any,
    prompts: Sequence[str],
    make: Callable[[float], KernelGuidance] = SPARKE,
    scales: Sequence[float] = DEFAULT_SCALES,
    batch_size: int = 8,
    batches: int = 2,
    *,
    embed: Embed | None = None,
    call: dict[str, Any] | None = None,
    max_fidelity_loss: float = 0.05,
    min_gain: float = 0.1,
    seed: int = 0,
    progress_callback: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Try scales on a pipeline and choose one.

    Args:
        pipe: any text-to-image pipeline.
        prompts: typical prompts. Their batches are the sample of the intervals, so that more prompts decide more.
        make: creates a guide with a given scale, such as ``lambda s: SPARKE.preset("vivid", scale=s)``.
        scales: scales to try.
        batch_size: images per batch, at least 2.
        batches: number of batches per prompt and scale.
        embed: image features, a callable on images returning ``[n, d]``, such as an
            :class:`~kspec_guidance.evaluation.embedders.ImageEmbedder`; the pipeline's own autoencoder by default.
        call: further arguments of the pipeline's call.
        max_fidelity_loss: largest accepted loss of fidelity, in 0..1.
        min_gain: smallest gain in diversity that matters, relative to plain sampling: 0.1 is 10%. Guidance does not help
            if the intervals of all scales that keep fidelity lie below it.
        seed: image ``k`` of batch ``b`` uses ``seed + 1000 b + k``.
        progress_callback: called with the number of finished batches and their total.

    Raises:
        ValueError: for no prompts, fewer than two images per batch, no batches, scales that are not positive, or limits
            outside their ranges.
        SynthesisError: for a pipeline that takes no prompt, or not all of ``call``.
        RunFailedError: if the pipeline fails, with the prompt and the seeds.
    """
    prompts, scales = list(prompts), sorted(set(scales))
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("tune needs prompts, a list of non-empty strings")
    if batch_size < 2 or batches < 1 or not scales or scales[0] <= 0:
        raise ValueError(f"need batch_size >= 2, batches >= 1 and scales above 0, got {batch_size}, {batches} and {scales}")
    if not 0 <= max_fidelity_loss <= 1 or not 0 < min_gain < math.inf:
        raise ValueError(f"need max_fidelity_loss in 0..1 and min_gain above 0, got {max_fidelity_loss} and {min_gain}")
    check_call(pipe, call or {})
    if embed is None:
        from kspec_guidance.evaluation.embedders import pipeline_embedder

        embed = pipeline_embedder(pipe)
    total, done = len(prompts) * batches * (len(scales) + 2), 0

    def run(scale: float, first: int) -> tuple[list[Tensor], dict[str, list[Image.Image]]]:
        """Features ``[batch_size, d]`` of each batch of each prompt, and the images of the first batch by prompt."""
        nonlocal done
        rows: list[Tensor] = []
        images: dict[str, list[Image.Image]] = {}
        for batch in range(batches):
            for prompt in prompts:
                generators = [torch.Generator().manual_seed(first + 1000 * batch + k) for k in range(batch_size)]
                arguments = {"num_images_per_prompt": batch_size, "generator": generators, **(call or {})}
                try:
                    with make(scale).attach(pipe) if scale else nullcontext():
                        made = pipe(prompt, **arguments).images
                except Exception as error:
                    start = first + 1000 * batch
                    raise RunFailedError(
                        f"{type(pipe).__name__} failed for {prompt!r} with seeds {start} to {start + batch_size - 1}: "
                        f"{type(error).__name__}: {' '.join(str(error).split())}"
                    ) from error
                rows.append(l2_normalize(on_host(embed(made))))
                images.setdefault(prompt, list(made))
                done += 1
                if progress_callback is not None:
                    progress_callback(done, total)
        return rows, images

    reference = torch.cat(run(0.0, seed + 500_000)[0])
    plain, plain_images = run(0.0, seed)
    plain_rows = torch.cat(plain)
    kernel = GaussianKernel(median_bandwidth(plain_rows))
    nearest = min(3, len(plain_rows) - 1)

    def vendi(rows: list[Tensor]) -> list[float]:
        return [float(F.vendi_score(r, kernel)) for r in rows]

    def precision(rows: list[Tensor]) -> list[float]:
        return in_manifold(torch.cat(rows), reference, nearest).double().view(-1, batch_size).mean(1).tolist()

    base, fidelities = vendi(plain), precision(plain)
    diversity, fidelity = mean(base), mean(fidelities)
    points, images = [], [plain_images]
    for scale in scales:
        rows, guided_images = run(float(scale), seed)
        images.append(guided_images)
        found, kept = vendi(rows), precision(rows)
        gain, loss = (Difference.of(*pair, len(scales)) for pair in ((base, found), (kept, fidelities)))
        points.append(TuningPoint(float(scale), mean(found), mean(kept), compare_paired(base, found), gain, loss))
    decision = decide(points, diversity, fidelity, max_fidelity_loss, min_gain, len(prompts), batch_size)
    return Tuning(
        diversity, fidelity, points, decision.scale, decision.verdict, decision.reason, decision.detectable_gain,
        decision.batches_needed, images,
    )  # fmt: skip
