"""Search for a guide's scale with a few short runs: diversity against fidelity, and whether guidance helps at all.

No other model and no reference set is needed. Diversity is the Vendi score of a prompt's images; fidelity is the precision
of guided images against plain images of other seeds (Kynkaanniemi et al. 2019, arXiv 1904.06991): the share of images in
the support of the pipeline's own images. Plain images of the same seeds give the reference value.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.kernels import GaussianKernel, l2_normalize, median_bandwidth
from kspec_guidance.statistics import Comparison, compare_paired
from kspec_guidance.utils.arguments import renamed_arguments

__all__ = ["Tuning", "TuningPoint", "tune"]

DEFAULT_SCALES = (0.15, 0.3, 0.6, 1.2, 2.4)
Embed = Callable[[list[Image.Image]], Tensor]


@dataclass(frozen=True)
class TuningPoint:
    """Results of one scale.

    Attributes:
        scale: scale of the guide.
        diversity: mean Vendi score of a batch.
        fidelity: precision against plain images of other seeds, in 0..1.
        test: paired test of diversity against plain sampling, by batch.
    """

    scale: float
    diversity: float
    fidelity: float
    test: Comparison


@dataclass
class Tuning:
    """The result of :func:`tune`.

    Attributes:
        plain_diversity, plain_fidelity: diversity and fidelity of plain sampling.
        points: results of each scale.
        scale: the chosen scale; None if guidance does not help.
        reason: reason of the choice, in one sentence.
        images: images of plain sampling and of each scale, by prompt.
    """

    plain_diversity: float
    plain_fidelity: float
    points: list[TuningPoint]
    scale: float | None
    reason: str
    images: list[dict[str, list[Image.Image]]]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; images left out."""
        return {k: v for k, v in asdict(self).items() if k != "images"}


def choose(points: Sequence[TuningPoint], plain_fidelity: float, max_fidelity_loss: float) -> tuple[float | None, str]:
    """The scale with the largest diversity among those that keep fidelity and differ from plain sampling (p < 0.05)."""
    keep = [p for p in points if p.fidelity >= plain_fidelity - max_fidelity_loss]
    if not keep:
        return None, (
            f"every scale loses more than {max_fidelity_loss:g} of fidelity: guidance does not help here; try smaller "
            "scales, a lower guidance_scale of the pipeline, or more denoising steps"
        )
    better = [p for p in keep if p.test.difference > 0 and p.test.p_value < 0.05]
    if not better:
        return None, (
            "no scale that keeps fidelity increases diversity significantly: guidance does not help here, or there are too "
            "few prompts and batches to detect it; the pipeline may be diverse enough already"
        )
    best = max(better, key=lambda p: p.diversity)
    return best.scale, (
        f"scale {best.scale:g} gives {best.diversity:.2f} different images per batch instead of {best.test.a:.2f} "
        f"(p = {best.test.p_value:.3f}) at fidelity {best.fidelity:.2f} instead of {plain_fidelity:.2f}"
    )


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
    seed: int = 0,
    progress_callback: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Try scales on a pipeline and choose one.

    Args:
        pipe: any text-to-image pipeline.
        prompts: at least three typical prompts; with fewer, differences are rarely significant.
        make: creates a guide with a given scale, such as ``lambda s: SPARKE.preset("vivid", scale=s)``.
        scales: scales to try.
        batch_size: images per batch, at least 2.
        batches: number of batches per prompt and scale.
        embed: image features, a callable on images returning ``[n, d]``, such as an
            :class:`~kspec_guidance.evaluation.embedders.ImageEmbedder`; the pipeline's own autoencoder by default.
        call: further arguments of the pipeline's call.
        max_fidelity_loss: largest accepted loss of fidelity, in 0..1.
        seed: image ``k`` of batch ``b`` uses ``seed + 1000 b + k``.
        progress_callback: called with the number of finished batches and their total.

    Raises:
        ValueError: for no prompts, fewer than two images per batch, no batches, or scales that are not positive.
    """
    prompts, scales = list(prompts), sorted(set(scales))
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("tune needs prompts, a list of non-empty strings")
    if batch_size < 2 or batches < 1 or not scales or scales[0] <= 0:
        raise ValueError(f"need batch_size >= 2, batches >= 1 and scales above 0, got {batch_size}, {batches} and {scales}")
    if embed is None:
        from kspec_guidance.evaluation.embedders import pipeline_embedder

        embed = pipeline_embedder(pipe)
    total, done = len(prompts) * batches * (len(scales) + 2), 0

    def run(scale: float, first: int) -> tuple[list[Tensor], dict[str, list[Image.Image]]]:
        """Features ``[batch_size, d]`` of each batch of each prompt, and the images of the last batch by prompt."""
        nonlocal done
        rows: list[Tensor] = []
        images: dict[str, list[Image.Image]] = {}
        for batch in range(batches):
            for prompt in prompts:
                generators = [torch.Generator().manual_seed(first + 1000 * batch + k) for k in range(batch_size)]
                arguments = {"num_images_per_prompt": batch_size, "generator": generators, **(call or {})}
                if scale:
                    with make(scale).attach(pipe):
                        made = pipe(prompt, **arguments).images
                else:
                    made = pipe(prompt, **arguments).images
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

    base, fidelity = vendi(plain), F.precision_score(plain_rows, reference, nearest)
    points, images = [], [plain_images]
    for scale in scales:
        rows, guided_images = run(float(scale), seed)
        images.append(guided_images)
        found = vendi(rows)
        mean = sum(found) / len(found)
        points.append(
            TuningPoint(
                float(scale), mean, F.precision_score(torch.cat(rows), reference, nearest), compare_paired(base, found)
            )
        )
    best, reason = choose(points, fidelity, max_fidelity_loss)
    return Tuning(sum(base) / len(base), fidelity, points, best, reason, images)
