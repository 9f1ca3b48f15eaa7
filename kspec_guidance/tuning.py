"""Find a strength for a pipeline by a few short runs: diversity against fidelity, and whether guidance helps at all.

No judge and no reference set is needed. Diversity of a prompt's images is their Vendi score; fidelity is the precision of
guided images against plain ones of other seeds (Kynkaanniemi et al. 2019, arXiv 1904.06991): the share of images that lie
where the pipeline itself puts images. Plain images of further seeds give the value to keep.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.guidance import KernelGuidance
from kspec_guidance.guidance.presets import SPARKE
from kspec_guidance.kernels import GaussianKernel, l2_normalize, median_bandwidth
from kspec_guidance.statistics import Comparison, compare_paired

__all__ = ["Tuning", "TuningPoint", "tune"]

SCALES = (0.15, 0.3, 0.6, 1.2, 2.4)
Embed = Callable[[list[Image.Image]], Tensor]


@dataclass(frozen=True)
class TuningPoint:
    """One strength: means over prompts and batches; ``test`` is of diversity against plain sampling, batch by batch."""

    scale: float
    diversity: float
    fidelity: float
    test: Comparison


@dataclass
class Tuning:
    """What was found. ``scale`` is None where guidance does not help; ``reason`` says why in a sentence."""

    plain_diversity: float
    plain_fidelity: float
    points: list[TuningPoint]
    scale: float | None
    reason: str
    images: list[dict[str, list[Image.Image]]]  # of plain sampling and of every strength, by prompt

    def as_dict(self) -> dict[str, Any]:
        """Plain values, ready for JSON; pictures left out."""
        return {k: v for k, v in asdict(self).items() if k != "images"}

    def plot(self, path: str | Path) -> None:
        """Diversity against fidelity, one dot a strength."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        x = [self.plain_fidelity, *(p.fidelity for p in self.points)]
        y = [self.plain_diversity, *(p.diversity for p in self.points)]
        axes.plot(x, y, "-", color="#9db7d5", lw=1)
        axes.plot(x[0], y[0], "k*", ms=13, label="plain sampling")
        for p in self.points:
            chosen = p.scale == self.scale
            axes.plot(p.fidelity, p.diversity, "o", ms=11 if chosen else 6, color="#c4572e" if chosen else "#2f6fb3")
            axes.annotate(f"{p.scale:g}", (p.fidelity, p.diversity), (7, 5), textcoords="offset points", fontsize=9)
        axes.set_title("no strength helps" if self.scale is None else f"chosen strength: {self.scale:g}", fontsize=11)
        axes.set(
            xlabel="fidelity: share of images where the pipeline puts its own", ylabel="different images in a batch (Vendi)"
        )
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False, loc="best")
        figure.savefig(path, dpi=120)


def choose(points: Sequence[TuningPoint], plain_fidelity: float, loss: float) -> tuple[float | None, str]:
    """The strength of most diversity among those that keep fidelity and differ from plain sampling (p < 0.05)."""
    keep = [p for p in points if p.fidelity >= plain_fidelity - loss]
    if not keep:
        return None, (
            f"every strength loses more than {loss:g} of fidelity: guidance does not help here; try smaller scales, a "
            "lower guidance_scale of the pipeline, or more denoising steps"
        )
    better = [p for p in keep if p.test.difference > 0 and p.test.p_value < 0.05]
    if not better:
        return None, (
            "no strength that keeps fidelity makes the images measurably more varied: guidance does not help here, or "
            "there are too few prompts and batches to see it; the pipeline may be varied enough already"
        )
    best = max(better, key=lambda p: p.diversity)
    return best.scale, (
        f"strength {best.scale:g} gives {best.diversity:.2f} different images a batch in place of {best.test.a:.2f} "
        f"(p = {best.test.p_value:.3f}) at fidelity {best.fidelity:.2f} in place of {plain_fidelity:.2f}"
    )


def tune(
    pipe: Any,
    prompts: Sequence[str],
    make: Callable[[float], KernelGuidance] = SPARKE,
    scales: Sequence[float] = SCALES,
    images: int = 8,
    batches: int = 2,
    *,
    embed: Embed | None = None,
    call: dict[str, Any] | None = None,
    loss: float = 0.05,
    seed: int = 0,
    tick: Callable[[int, int], None] | None = None,
) -> Tuning:
    """Try strengths on a pipeline and choose one.

    Args:
        pipe: any text-to-image pipeline.
        prompts: three or more, of the kind that will be used; with few of them differences cannot be told from chance.
        make: a guide of a strength; ``lambda s: KernelGuidance.preset("vivid", scale=s)`` for instance.
        scales: strengths to try.
        images: of a batch, at least 2.
        batches: of each prompt and strength.
        embed: image features, a callable on pictures returning ``[n, d]``, such as an
            :class:`~kspec_guidance.evaluation.embedders.ImageEmbedder`; the pipeline's own autoencoder by default.
        call: arguments of the pipeline's call.
        loss: fidelity, in 0..1, that may be lost.
        seed: image ``k`` of batch ``b`` is made from ``seed + 1000 b + k``.
        tick: called with the number of batches made and their total.

    Raises:
        ValueError: for no prompts, fewer than two images, or strengths that are not positive.
    """
    prompts, scales = list(prompts), sorted(set(scales))
    if not prompts or not all(isinstance(p, str) and p.strip() for p in prompts):
        raise ValueError("tune needs prompts, a list of texts that are not empty")
    if images < 2 or batches < 1 or not scales or scales[0] <= 0:
        raise ValueError(f"need images >= 2, batches >= 1 and scales above 0, got {images}, {batches} and {scales}")
    if embed is None:
        from kspec_guidance.evaluation.embedders import pipeline_embedder

        embed = pipeline_embedder(pipe)
    total, done = len(prompts) * batches * (len(scales) + 2), 0

    def run(scale: float, first: int) -> tuple[list[Tensor], dict[str, list[Image.Image]]]:
        """Features ``[images, d]`` of every prompt and batch."""
        nonlocal done
        rows: list[Tensor] = []
        pictures: dict[str, list[Image.Image]] = {}
        for batch in range(batches):
            for prompt in prompts:
                generators = [torch.Generator().manual_seed(first + 1000 * batch + k) for k in range(images)]
                arguments = {"num_images_per_prompt": images, "generator": generators, **(call or {})}
                if scale:
                    with make(scale).attach(pipe):
                        made = pipe(prompt, **arguments).images
                else:
                    made = pipe(prompt, **arguments).images
                rows.append(l2_normalize(embed(made).double()))
                pictures.setdefault(prompt, list(made))
                done += 1
                if tick is not None:
                    tick(done, total)
        return rows, pictures

    reference = torch.cat(run(0.0, seed + 500_000)[0])
    plain, shown = run(0.0, seed)
    every = torch.cat(plain)
    kernel = GaussianKernel(median_bandwidth(every))
    nearest = min(3, len(every) - 1)

    def vendi(rows: list[Tensor]) -> list[float]:
        return [float(F.vendi_score(r, kernel)) for r in rows]

    base, fidelity = vendi(plain), F.precision(every, reference, nearest)
    points, pictures = [], [shown]
    for scale in scales:
        rows, shown = run(float(scale), seed)
        pictures.append(shown)
        found = vendi(rows)
        mean = sum(found) / len(found)
        points.append(
            TuningPoint(float(scale), mean, F.precision(torch.cat(rows), reference, nearest), compare_paired(base, found))
        )
    best, reason = choose(points, fidelity, loss)
    return Tuning(sum(base) / len(base), fidelity, points, best, reason, pictures)
