"""Does a push hurt how smoothly a clip moves, and does it help to push all its frames alike? On exact mixtures of clips.

    python benchmarks/clips.py --seeds 5    # then python -m benchmarks.arena.page

A clip shows a glyph that moves along one of 16 paths (the modes, rare and frequent) over a background that varies smoothly
in space and slowly in time; each prompt is a glyph. Clips are Gaussian around their path, so the denoiser is exact and
nothing is trained. A push is used as it is, with only the lowest frequencies in time of each pixel, with its mean over the
frames, or, for contrast, without that mean. It is projected before its size is set, so the largest moves are alike.
Results are kept for each setting and seed, from which an interrupted run continues.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.pipeline import ConditionPipeline, Conditions
from kspec_guidance import SPARKE, KernelGuidance, VendiGuidance
from kspec_guidance import functional as F
from kspec_guidance.bench.fronts import weights
from kspec_guidance.guidance.transforms import TRANSFORMS, TransformState
from kspec_guidance.utils.atomic_io import replacing

ROOT = Path(__file__).parents[1]
FRAMES, SIZE, GLYPH = 8, 12, 5
PROMPTS, PATHS, IMAGES, TRUE = 6, 16, 16, 256
SLOW = 3  # frequencies in time that the low-pass keeps, the constant one among them
BACKGROUND, GRAIN = 0.25, 0.05  # deviations of the background's coefficients, relative to the glyph's norm, and of pixels


def cosines(n: int, number: int) -> Tensor:
    """The lowest ``number`` cosines on ``n`` points, orthonormal ``[number, n]``."""
    k, t = torch.arange(number)[:, None], torch.arange(n)
    waves = torch.cos(math.pi * k * (t + 0.5) / n)
    return waves / waves.norm(dim=1, keepdim=True)


def paths() -> Tensor:
    """Positions of the glyph's corner ``[paths, frames, 2]``: four places, two lines through each, and each line both ways.

    The two ways along a line have the same mean over the frames.
    """
    room = SIZE - GLYPH
    places = torch.tensor([[0.3, 0.3], [0.3, 0.7], [0.7, 0.3], [0.7, 0.7]]) * room
    lines = torch.tensor([[0.5, 0.1], [-0.1, 0.5]]) * room
    time = torch.linspace(-0.5, 0.5, FRAMES)[:, None]
    return torch.stack([place + way * line * time for place in places for line in lines for way in (1, -1)])


def drawn(glyph: Tensor, at: Tensor) -> Tensor:
    """The glyph with its corner at ``at`` ``[..., 2]``, between pixels by bilinear weights ``[..., size, size]``."""
    grid = torch.arange(SIZE)[:, None] - torch.arange(GLYPH)
    across, down = (torch.relu(1 - (grid - at[..., None, None, k]).abs()) for k in (0, 1))
    return down @ glyph @ across.mT


class Clips(nn.Module):
    """The noise in ``x = alpha x0 + sigma noise`` for each prompt's mixture of clips ``[1, frames, size, size]``."""

    shape, dtype = (1, FRAMES, SIZE, SIZE), torch.float32

    def __init__(self, scheduler: Any):
        super().__init__()
        g = torch.Generator().manual_seed(3)
        self.scheduler = scheduler
        centres = torch.stack([drawn(torch.rand(GLYPH, GLYPH, generator=g) + 0.2, paths()) for _ in range(PROMPTS)])
        centres = centres.flatten(2)
        self.centres = centres / centres.norm(dim=2, keepdim=True) * centres.shape[2] ** 0.5  # [prompts, paths, d]
        space, time = cosines(SIZE, 3), cosines(FRAMES, 2)
        self.basis = torch.einsum("at,by,cx->abctyx", time, space, space).flatten(0, 2).flatten(1)  # [18, d]
        d = centres.shape[2]
        self.wide, self.grain = BACKGROUND * (d / len(self.basis)) ** 0.5, GRAIN
        order = torch.stack([torch.randperm(PATHS, generator=g) for _ in range(PROMPTS)])
        shares = torch.logspace(0, -1.6, PATHS)
        self.shares = (shares / shares.sum())[order]  # [prompts, paths]

    def variances(self, alpha: float, sigma: float) -> tuple[float, float]:
        """Of a noisy clip around its path: across the background's directions, and along them."""
        across = (alpha * self.grain) ** 2 + sigma**2
        return across, across + (alpha * self.wide) ** 2

    def away(self, x: Tensor, centres: Tensor, across: float, along: float) -> Tensor:
        """Squared Mahalanobis distances of rows ``[n, d]`` from centres ``[paths, d]``."""
        r = x[:, None] - centres
        return r.square().sum(-1) / across - (r @ self.basis.mT).square().sum(-1) * (1 / across - 1 / along)

    def forward(self, sample: Tensor, timestep: Any, encoder_hidden_states: Tensor, return_dict: bool = True) -> tuple:
        level = float(self.scheduler.alphas_cumprod[int(timestep)])
        alpha, sigma = level**0.5, (1 - level) ** 0.5
        across, along = self.variances(alpha, sigma)
        prompt, x = int(encoder_hidden_states[0, 0].argmax()), sample.flatten(1)
        centres = alpha * self.centres[prompt]
        r = (self.shares[prompt].log() - self.away(x, centres, across, along) / 2).softmax(-1)
        mean = x - r @ centres
        noise = sigma * (mean / across - mean @ self.basis.mT @ self.basis * (1 / across - 1 / along))
        return (noise.view(sample.shape),)

    def draw(self, prompt: int, n: int, generator: torch.Generator) -> Tensor:
        """True clips ``[n, d]``."""
        which = torch.multinomial(self.shares[prompt], n, replacement=True, generator=generator)
        background = self.wide * torch.randn(n, len(self.basis), generator=generator) @ self.basis
        x = self.centres[prompt, which] + background
        return x + self.grain * torch.randn(x.shape, generator=generator)


def changes(x: Tensor) -> Tensor:
    """Mean squared difference between consecutive frames of clips ``[n, d]``."""
    return x.unflatten(1, (FRAMES, -1)).diff(dim=1).square().mean((1, 2))


def still(x: Tensor) -> Tensor:
    """Mean square of the mean over the frames of clips ``[n, d]``."""
    return x.unflatten(1, (FRAMES, -1)).mean(1).square().mean(1)


def judged(bed: Clips, x: Tensor, prompt: int) -> dict[str, float]:
    """Figures of the clips ``[n, d]`` of one call.

    ``valid`` is the share within the radius of 99.9% of a path's mass (Wilson and Hilferty 1931), ``modes`` counts paths
    with a valid clip; ``coverage`` is that of true clips. ``motion`` is the change between frames relative to that of the
    nearest true clip. Of what is left of a clip without its path, relative to true clips, ``flicker`` is the change between
    frames, and ``still`` the energy of the mean over frames.
    """
    d, truth = x.shape[1], bed.draw(prompt, TRUE, torch.Generator().manual_seed(7))
    centres, at_end = bed.centres[prompt], bed.variances(1.0, 0.0)
    away, which = bed.away(x, centres, *at_end).min(1)
    valid = away < d * (1 - 2 / (9 * d) + 3.09 * math.sqrt(2 / (9 * d))) ** 3
    nearest = truth[torch.cdist(x, truth).argmin(1)]
    of_truth = bed.away(truth, centres, *at_end).argmin(1)
    left, left_of_truth = x - centres[which], truth - centres[of_truth]
    return {
        "modes": float(len(set(which[valid].tolist()))),
        "valid": float(valid.float().mean()),
        "coverage": F.neighbour_scores(x.double(), truth.double()).coverage,
        "motion": float((changes(x) / changes(nearest)).mean()),
        "flicker": float(changes(left).mean() / changes(left_of_truth).mean()),
        "still": float(still(left).mean() / still(left_of_truth).mean()),
    }


def kept(frequencies: int) -> Callable[[Tensor, TransformState], Tensor]:
    """The transform that keeps the lowest frequencies in time of a move."""
    waves = cosines(FRAMES, frequencies)

    def project(move: Tensor, state: TransformState) -> Tensor:
        return (waves.mT @ (waves @ move.unflatten(1, (FRAMES, -1)))).flatten(1)

    return project


def halved(move: Tensor, state: TransformState) -> Tensor:
    return (move + kept(1)(move, state)) / 2


def without_mean(move: Tensor, state: TransformState) -> Tensor:
    return move - kept(1)(move, state)


PROJECTIONS = {
    "as it is": None,
    f"{SLOW} of {FRAMES} frequencies": kept(SLOW),
    "mean over the frames": kept(1),
    "mean, and half of the rest": halved,
    "without that mean": without_mean,
}
GUIDES: dict[str, Callable[..., KernelGuidance]] = {
    "variety 50": lambda **k: SPARKE(variety=50, **k),
    "variety 100": lambda **k: SPARKE(variety=100, **k),
    "vivid": lambda **k: VendiGuidance(1.5, stop=0.65, order=0.5, **k),
}
PLAIN = "plain"
STEPS = (30, 8)


def measure(steps: int, guide: str, projection: str, seed: int) -> dict[str, list[float]]:
    """Figures of each prompt."""
    scheduler = DDIMScheduler(clip_sample=False, set_alpha_to_one=True, beta_schedule="scaled_linear",
                              beta_start=0.00085, beta_end=0.012)  # fmt: skip
    bed = Clips(scheduler)
    names = [f"glyph {k}" for k in range(PROMPTS)]
    vectors = torch.cat([torch.eye(PROMPTS), torch.zeros(1, PROMPTS)])
    pipe, found = ConditionPipeline(bed, scheduler, Conditions(names, vectors)), {}
    for k, name in enumerate(names):
        noise = [torch.Generator().manual_seed(1000 * seed + i) for i in range(IMAGES)]
        call = {"num_images_per_prompt": IMAGES, "num_inference_steps": steps, "generator": noise}
        if guide == PLAIN:
            x = pipe(name, **call)
        else:
            transform = PROJECTIONS[projection]
            TRANSFORMS["projected"] = transform or (lambda move, state: move)
            made = GUIDES[guide](transforms=("tangent", "off_score", "projected", "bound", "fade"))
            made.calibration = 1.0
            with made.attach(pipe):
                x = pipe(name, **call)
            del TRANSFORMS["projected"]
        for figure, value in judged(bed, x.flatten(1), k).items():
            found.setdefault(figure, []).append(value)
    return found


def settings() -> list[tuple[int, str, str]]:
    """Steps, guide and projection of all that is measured."""
    guided = [(guide, projection) for guide in GUIDES for projection in PROJECTIONS]
    return [(steps, *each) for steps in STEPS for each in [(PLAIN, "as it is"), *guided]]


def tables(done: dict[str, Any]) -> str:
    """A table for each number of steps, of the seeds that all settings have; intervals are over prompts and seeds."""
    parts, names = [], ("modes", "valid", "coverage", "motion", "flicker", "still")
    for steps in STEPS:
        of = {(g, p): done.get(f"{steps}, {g}, {p}", {}) for s, g, p in settings() if s == steps}
        seeds = sorted(set.intersection(*(set(by) for by in of.values())), key=int)
        if not seeds:
            continue
        w = weights([str(k) for _ in seeds for k in range(PROMPTS)])
        means = {key: {n: w @ np.concatenate([by[s][n] for s in seeds]) for n in names} for key, by in of.items()}
        base, rows = means[PLAIN, "as it is"], []
        for (guide, projection), found in means.items():
            ratio = found["modes"] / base["modes"]
            low, high = np.quantile(ratio, [0.025, 0.975])
            cells = ["" if guide == PLAIN else projection]
            cells.append(f"{base['modes'][0]:.2f}" if guide == PLAIN else f"x{ratio[0]:.2f} [{low:.2f}, {high:.2f}]")
            cells += [f"{found['valid'][0]:.3f}", f"{found['coverage'][0]:.2f}"]
            for n in ("motion", "flicker", "still"):
                low, high = np.quantile(found[n], [0.025, 0.975])
                cells.append(f"{found[n][0]:.2f} [{low:.2f}, {high:.2f}]")
            rows.append([guide, *cells])
        title = f"{steps} steps, {len(seeds) * PROMPTS} runs of {IMAGES} clips"
        parts.append(pages.table([title, "pushes", *names], rows))
    return "\n\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "clips.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for seed in range(args.seeds):
        for steps, guide, projection in settings():
            by = done.setdefault(f"{steps}, {guide}, {projection}", {})
            if str(seed) not in by:
                found = measure(steps, guide, projection, seed)
                by[str(seed)] = {k: [float(f"{v:.5g}") for v in values] for k, values in found.items()}
                with replacing(args.out) as fresh:
                    fresh.write_text(json.dumps(done, separators=(",", ":")) + "\n", encoding="utf-8")
    print(tables(done))


if __name__ == "__main__":
    main()
