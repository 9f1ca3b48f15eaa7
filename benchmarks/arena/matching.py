"""Distribution matching: how near a target do samples come, with how many references, and at what fidelity?

    python -m benchmarks.arena.matching

Four batches with one memory make a trial. Strength is chosen on trials of its own, as the one that comes nearest the target
without losing more than 0.02 of the share of valid samples; the figures are of further trials. The target is known: shares
of modes, of classes, or of art styles.
"""

import argparse
import json
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kspec_guidance import MMDGuidance, encode_reference, load_demo_reference
from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, PolynomialKernel

from .beds import BEDS
from .beds.analytic import COUNTS, Analytic
from .beds.base import Bed, Case
from .harness import FIDELITY_LOSS, mean
from .methods.base import Method, Moment, norms

ROOT = Path(__file__).parents[2]
BATCHES = 4


@dataclass
class MeanShift(Method):
    """The batch's mean prediction is moved onto the references' mean."""

    reference: Tensor | None = None
    weight: float = 0.5
    stop: float = 0.6

    def move(self, m: Moment) -> Tensor | None:
        assert self.reference is not None
        if m.fraction >= self.stop:
            return None
        return self.weight * (self.reference.mean(0) - m.x0.mean(0)).expand_as(m.x0)


@dataclass
class Attraction(Method):
    """SPARKE's kernel turned round: every image toward the references near it, ``sum_r k(x, r)^2`` ascended."""

    reference: Tensor | None = None
    weight: float = 0.3
    stop: float = 0.6

    def move(self, m: Moment) -> Tensor | None:
        assert self.reference is not None
        if m.fraction >= self.stop:
            return None
        x, r = m.x0.flatten(1), self.reference.flatten(1).to(m.x0)
        x, r = (torch.nn.functional.normalize(v, dim=1) for v in (x, r))
        d2 = torch.cdist(x, r).square()
        k = torch.exp(-d2 / (0.5 * d2.sqrt().median()) ** 2)
        g = (k @ r - k.sum(1, keepdim=True) * x).view(m.x0.shape)
        return self.weight * norms(m.x0) * g / norms(g).amax().clamp_min(1e-12)


Make = Callable[[Tensor, float], Any]
METHODS: dict[str, tuple[Make, list[float]]] = {
    "plain": (lambda r, s: None, [0.0]),
    "MMD, ours": (lambda r, s: MMDGuidance(r, s), [0.3, 0.7, 1.5, 3.0, 6.0]),
    "MMD, ours, cubic kernel": (lambda r, s: MMDGuidance(r, s, PolynomialKernel()), [0.3, 0.7, 1.5, 3.0, 6.0]),
    "MMD, published": (lambda r, s: MMDGuidance.published(r, s), [1e-3, 1e-2, 0.03, 0.1]),
    "mean shift": (lambda r, s: MeanShift(reference=r, weight=s), [0.2, 0.5, 1.0, 2.0]),
    "attraction": (lambda r, s: Attraction(reference=r, weight=s), [0.1, 0.3, 0.7, 1.5]),
}


@dataclass
class Target:
    """A bed with a target: references of any number, the shares that are aimed at, and those that samples have."""

    bed: Bed
    about: str
    reference: Callable[[int, int], Tensor]  # number, seed
    distance: Callable[[Tensor], float]  # total variation of what samples show to the target
    valid: Callable[[Tensor], float]
    case: Callable[[int], Case]
    sizes: tuple[int, ...] = (16, 64, 256)
    styled: Callable[[Case], Case] | None = None  # the target asked for in words
    exact: bool = True  # whether references are drawn from the target and judged as samples are
    run: Callable[[Case, int], Tensor] | None = None  # in place of the bed's
    more: dict[str, tuple[Make, list[float]]] = field(default_factory=dict)  # methods for this target alone


def mixture() -> Target:
    bed = Analytic(32, skewed=True)
    bed.guidance_scale = 1.0
    shares = bed.shares("").flip(0)

    def reference(n: int, seed: int) -> Tensor:
        return bed.draw(shares, n, torch.Generator().manual_seed(seed))

    def distance(x: Tensor) -> float:
        which, inside = bed.places(bed.rows(x))
        return float((torch.bincount(which[inside], minlength=len(shares)) / len(x) - shares).abs().sum() / 2)

    def valid(x: Tensor) -> float:
        return float(bed.places(bed.rows(x))[1].float().mean())

    return Target(bed, "weights of 24 modes reversed", reference, distance, valid, lambda s: Case("", s))


def prompts() -> Target:
    """Two prompts in every batch; each is to show its own modes in equal shares."""
    bed = Analytic(32, skewed=True)
    bed.guidance_scale, bed.name = 1.0, "mixture, two prompts"
    asked = bed.prompts("report")[:2]
    own = [(bed.shares(p) >= COUNTS).float() for p in asked]
    shares = [o / o.sum() for o in own]
    features = torch.cat([bed.pipe.conditions.rows([p])[:, 0] for p in asked]).detach()

    def reference(n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.cat([bed.draw(q, n // 2, g) for q in shares])

    def distance(x: Tensor) -> float:
        """Samples come batch by batch, in each the first prompt's before the second's."""
        which, inside = bed.places(bed.rows(x))
        first = torch.arange(len(x)) % bed.images < bed.images // 2
        found = [
            torch.bincount(which[inside & m], minlength=len(q)) / int(m.sum())
            for m, q in zip((first, ~first), shares, strict=True)
        ]
        return mean([float((f - q).abs().sum() / 2) for f, q in zip(found, shares, strict=True)])

    def valid(x: Tensor) -> float:
        return float(bed.places(bed.rows(x))[1].float().mean())

    def run(case: Case, n: int) -> Tensor:
        return bed.pipe(asked, n // 2, bed.steps, 1.0, bed.noise(case, n))

    def aware(r: Tensor, s: float) -> MMDGuidance:
        return MMDGuidance(r, s, reference_prompts=features.repeat_interleave(len(r) // 2, 0))

    about = "two prompts in a batch, each to show its modes in equal shares, mean of the two"
    return Target(
        bed, about, reference, distance, valid, lambda s: Case("", s), (16, 64, 512), run=run,
        more={"MMD, ours, prompt-aware": (aware, [0.3, 0.7, 1.5, 3.0, 6.0])},
    )  # fmt: skip


def digits() -> Target:
    """Classes in equal shares, from a model that was shown some 25 times as often as others."""
    bed = BEDS["digits-any"]()
    made: list[Tensor] = []

    def reference(n: int, seed: int) -> Tensor:
        if not made:  # the model's own digits of every class, asked for by name
            asked = [f"digit {k}" for k in range(10)]
            g = torch.Generator().manual_seed(999)
            made.append(bed.pipe(asked, 52, 8, 2.0, g).unflatten(0, (10, 52)).transpose(0, 1).flatten(0, 1))
        order = torch.randperm(len(made[0]) // 10, generator=torch.Generator().manual_seed(seed))
        return made[0].unflatten(0, (-1, 10))[order].flatten(0, 1)[:n]

    def kinds(x: Tensor) -> Tensor:
        return bed.judge_(bed.pictures(x)).argmax(1)

    def distance(x: Tensor) -> float:
        return float((torch.bincount(kinds(x), minlength=10) / len(x) - 0.1).abs().sum() / 2)

    about = "ten classes in equal shares"
    return Target(
        bed, about, reference, distance, lambda x: bed.judge(x, Case("", 0))["valid"], lambda s: Case("", s), (16, 64, 512)
    )


def emoji() -> Target:
    """People in the Noto style, from 32 references of other prompts' pictures."""
    bed = BEDS["emoji"]()
    latents = encode_reference(bed.pipe, load_demo_reference("noto"))
    people = ["firefighter", "farmer", "cook", "student", "swimmer"]
    noto = bed.table["styles"].index("noto style")

    def reference(n: int, seed: int) -> Tensor:
        return latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))[:n]]

    def distance(x: Tensor) -> float:
        p = bed.judge_(bed.pictures(x))["style"].softmax(1)
        return 1 - float(p[:, noto].mean())

    last: list[Case] = []

    def case(seed: int) -> Case:
        last[:] = [Case(people[seed % len(people)], seed)]
        return last[0]

    def valid(x: Tensor) -> float:
        return bed.judge(x, Case(last[0].prompt.split(",")[0], 0))["valid"]

    about = "Noto style; the judge's mean probability of the other style"
    return Target(bed, about, reference, distance, valid, case, (16, len(latents)),
                  lambda c: Case(f"{c.prompt}, noto style", c.seed), exact=False)  # fmt: skip


def trial(target: Target, make: Make, size: int, strength: float, seed: int, styled: bool = False) -> dict[str, float]:
    """Four batches with one memory."""
    bed, out, valid = target.bed, [], []
    guide = make(target.reference(size, seed), strength)
    for batch in range(BATCHES):
        case = target.case(10 * seed + batch)
        asked = target.styled(case) if styled and target.styled is not None else case
        with nullcontext() if guide is None else guide.attach(bed.pipe):
            x = torch.nan_to_num((target.run or bed.run)(asked, bed.images), 0.0, 1e3, -1e3)
        out.append(x)
        valid.append(target.valid(x))
    x = torch.cat(out)
    far = target.reference(min(512, max(target.sizes)), 12345)
    kernel = GaussianKernel(float(torch.cdist(far.flatten(1), far.flatten(1)).median()))
    return {
        "distance": target.distance(x), "valid": mean(valid),
        "mmd": float(F.mmd(x.flatten(1).double(), far.flatten(1).double(), kernel)),
    }  # fmt: skip


def interval(values: list[float], name: str) -> dict[str, float]:
    rng = np.random.default_rng(0)
    draws = np.array(values)[rng.integers(len(values), size=(2000, len(values)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return {name: mean(values), f"{name}_low": float(low), f"{name}_high": float(high)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--beds", nargs="+", default=["mixture", "prompts", "digits", "emoji"])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "matching.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.beds:
        target = {"mixture": mixture, "prompts": prompts, "digits": digits, "emoji": emoji}[name]()
        base = [trial(target, METHODS["plain"][0], 16, 0.0, s) for s in range(2)]
        floor = mean([b["valid"] for b in base]) - FIDELITY_LOSS
        methods: dict[str, Any] = {}
        every = {**METHODS, **target.more}
        if target.styled is not None:
            every["asked for in words"] = (METHODS["plain"][0], [0.0])
        for label, (make, scales) in every.items():
            fixed = label in ("plain", "asked for in words")
            for size in target.sizes[:1] if fixed else target.sizes:
                tried = []
                for s in scales:
                    found = [trial(target, make, size, s, k) for k in range(2)] if len(scales) > 1 else base
                    lost = max(0.0, floor - mean([f["valid"] for f in found]))
                    tried.append((mean([f["distance"] for f in found]) + 10 * lost, s))
                best = min(tried)[1]
                words = label == "asked for in words"
                seeds = range(100, 100 + args.trials)
                found = [trial(target, make, size, best, k, words) for k in seeds]
                said: dict[str, float] = {"strength": best}
                for k in ("distance", "valid", "mmd"):
                    said |= interval([f[k] for f in found], k)
                methods.setdefault(label, {})["-" if fixed else str(size)] = said
                print(f"{name:10}{label:26}{size:5}  strength {best:<6g} distance {said['distance']:.3f} "
                      f"valid {said['valid']:.3f} mmd {said['mmd']:.4f}", flush=True)  # fmt: skip
        about = target.about
        if target.exact:  # total variation of as many true samples as a trial makes
            n = target.bed.images
            drawn = [torch.cat([target.reference(n, 777 + BATCHES * k + b) for b in range(BATCHES)]) for k in range(20)]
            floor = mean([target.distance(x) for x in drawn])
            about += f"; {BATCHES * n} references, laid out in batches, are {floor:.2f} away themselves"
        results[target.bed.name] = {"about": about, "figures": ["distance", "valid", "mmd"], "methods": methods}
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
