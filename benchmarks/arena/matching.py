"""Distribution matching: distance of the samples to a target, by number of references, and their fidelity.

    python -m benchmarks.arena.matching

A trial is four batches with one memory. The strength is chosen on separate trials: the one with the smallest distance that
loses at most 0.02 of the share of valid samples. The target is known: shares of modes, of classes, or of art styles.
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
from kspec_guidance.bench.methods.base import Method, Moment, norms
from kspec_guidance.kernels import GaussianKernel, PolynomialKernel

from .beds import BEDS
from .beds.analytic import COUNTS, Analytic
from .beds.base import Bed, Case
from .harness import FIDELITY_LOSS, mean

ROOT = Path(__file__).parents[2]
BATCHES = 4


@dataclass
class MeanShift(Method):
    """Moves the mean prediction of the batch toward the mean of the references."""

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
    """SPARKE's kernel as an attraction: each image toward the nearest references, ``sum_r k(x, r)^2`` ascended."""

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


ONE_BY_ONE = "MMD, authors' code"  # images one after another, with a memory of them
Make = Callable[[Tensor, float], Any]
METHODS: dict[str, tuple[Make, list[float]]] = {
    "plain": (lambda r, s: None, [0.0]),
    "MMD, ours": (lambda r, s: MMDGuidance(r, s), [0.3, 0.7, 1.5, 3.0, 6.0]),
    "MMD, ours, cubic kernel": (lambda r, s: MMDGuidance(r, s, PolynomialKernel()), [0.3, 0.7, 1.5, 3.0, 6.0]),
    ONE_BY_ONE: (lambda r, s: MMDGuidance.published(r, s), [2e-3, 1e-2, 0.03, 0.1]),
    "mean shift": (lambda r, s: MeanShift(reference=r, weight=s), [0.2, 0.5, 1.0, 2.0]),
    "attraction": (lambda r, s: Attraction(reference=r, weight=s), [0.1, 0.3, 0.7, 1.5]),
}


@dataclass
class Target:
    """A bed with a target distribution: references from it, and the distance of samples to it."""

    bed: Bed
    about: str
    reference: Callable[[int, int], Tensor]  # number, seed
    distance: Callable[[Tensor], float]  # total variation between samples and target
    valid: Callable[[Tensor], float]
    case: Callable[[int], Case]
    sizes: tuple[int, ...] = (16, 64, 256)
    styled: Callable[[Case], Case] | None = None  # the case with the target named in its prompt
    exact: bool = True  # whether references are drawn from the target and can be judged like samples
    run: Callable[[Case, int], Tensor] | None = None  # in place of the bed's
    extra_methods: dict[str, tuple[Make, list[float]]] = field(default_factory=dict)  # for this target only


def mixture() -> Target:
    bed = Analytic(32, skewed=True)
    bed.guidance_scale = 1.0
    shares = bed.shares("").flip(0)

    def reference(n: int, seed: int) -> Tensor:
        return bed.draw(shares, n, torch.Generator().manual_seed(seed))

    def distance(x: Tensor) -> float:
        which, inside = bed.assign(bed.rows(x))
        return float((torch.bincount(which[inside], minlength=len(shares)) / len(x) - shares).abs().sum() / 2)

    def valid(x: Tensor) -> float:
        return float(bed.assign(bed.rows(x))[1].float().mean())

    return Target(bed, "weights of 24 modes reversed", reference, distance, valid, lambda s: Case("", s))


def prompts() -> Target:
    """Two prompts in every batch, each with its own modes in equal shares as the target."""
    bed = Analytic(32, skewed=True)
    bed.guidance_scale, bed.name = 1.0, "mixture, two prompts"
    pair = bed.prompts("report")[:2]
    own = [(bed.shares(p) >= COUNTS).float() for p in pair]
    shares = [o / o.sum() for o in own]
    features = torch.cat([bed.pipe.conditions.rows([p])[:, 0] for p in pair]).detach()

    def reference(n: int, seed: int) -> Tensor:
        g = torch.Generator().manual_seed(seed)
        return torch.cat([bed.draw(q, n // 2, g) for q in shares])

    def distance(x: Tensor) -> float:
        """Samples are in order of batches, and in each batch those of the first prompt come first."""
        which, inside = bed.assign(bed.rows(x))
        first = torch.arange(len(x)) % bed.images < bed.images // 2
        found = [
            torch.bincount(which[inside & m], minlength=len(q)) / int(m.sum())
            for m, q in zip((first, ~first), shares, strict=True)
        ]
        return mean([float((f - q).abs().sum() / 2) for f, q in zip(found, shares, strict=True)])

    def valid(x: Tensor) -> float:
        return float(bed.assign(bed.rows(x))[1].float().mean())

    def run(case: Case, n: int) -> Tensor:
        return bed.pipe(pair, n // 2, bed.steps, 1.0, bed.noise(case, n))

    def aware(r: Tensor, s: float) -> MMDGuidance:
        return MMDGuidance(r, s, reference_prompts=features.repeat_interleave(len(r) // 2, 0))

    about = "two prompts in a batch, each to show its modes in equal shares, mean of the two"
    return Target(
        bed, about, reference, distance, valid, lambda s: Case("", s), (16, 64, 512), run=run,
        extra_methods={"MMD, ours, prompt-aware": (aware, [0.3, 0.7, 1.5, 3.0, 6.0])},
    )  # fmt: skip


def digits() -> Target:
    """Classes in equal shares, from a model trained on some classes 25 times as often as on others."""
    bed = BEDS["digits-any"]()
    cache: list[Tensor] = []

    def reference(n: int, seed: int) -> Tensor:
        if not cache:  # the model's own digits of all classes, by their prompts
            named = [f"digit {k}" for k in range(10)]
            g = torch.Generator().manual_seed(999)
            cache.append(bed.pipe(named, 52, 8, 2.0, g).unflatten(0, (10, 52)).transpose(0, 1).flatten(0, 1))
        order = torch.randperm(len(cache[0]) // 10, generator=torch.Generator().manual_seed(seed))
        return cache[0].unflatten(0, (-1, 10))[order].flatten(0, 1)[:n]

    def kinds(x: Tensor) -> Tensor:
        return bed.judge_(bed.decode(x)).argmax(1)

    def distance(x: Tensor) -> float:
        return float((torch.bincount(kinds(x), minlength=10) / len(x) - 0.1).abs().sum() / 2)

    about = "ten classes in equal shares"
    return Target(
        bed, about, reference, distance, lambda x: bed.judge(x, Case("", 0))["valid"], lambda s: Case("", s), (16, 64, 512)
    )


def emoji() -> Target:
    """People in the Noto style, from 32 references of other prompts."""
    bed = BEDS["emoji"]()
    latents = encode_reference(bed.pipe, load_demo_reference("noto"))
    people = ["firefighter", "farmer", "cook", "student", "swimmer"]
    noto = bed.judge_.classes["style"].index("noto style")

    def reference(n: int, seed: int) -> Tensor:
        return latents[torch.randperm(len(latents), generator=torch.Generator().manual_seed(seed))[:n]]

    def distance(x: Tensor) -> float:
        p = bed.judge_.network(bed.decode(x))["style"].softmax(1)
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


def samples(
    target: Target, make: Make, size: int, strength: float, seed: int, styled: bool = False, single: bool = False
) -> tuple[Tensor, float]:
    """Four batches with one memory, and their validity; with ``single`` as many images, one by one."""
    bed, out, valid = target.bed, [], []
    guide = make(target.reference(size, seed), strength)
    for batch in range(BATCHES):
        case = target.case(10 * seed + batch)
        case = target.styled(case) if styled and target.styled is not None else case
        with nullcontext() if guide is None else guide.attach(bed.pipe):
            if single:
                x = torch.cat([bed.run(case, 1, noise[None]) for noise in bed.start(case, bed.images)])
            else:
                x = (target.run or bed.run)(case, bed.images)
            x = torch.nan_to_num(x, 0.0, 1e3, -1e3)
        out.append(x)
        valid.append(target.valid(x))
    return torch.cat(out), mean(valid)


def trial(
    target: Target, make: Make, size: int, strength: float, seed: int, styled: bool = False, single: bool = False
) -> dict[str, float]:
    """Figures of four batches with one memory."""
    x, valid = samples(target, make, size, strength, seed, styled, single)
    far = target.reference(min(512, max(target.sizes)), 12345)
    kernel = GaussianKernel(float(torch.cdist(far.flatten(1), far.flatten(1)).median()))
    return {
        "distance": target.distance(x), "valid": valid,
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
    parser.add_argument("--methods", nargs="+", help="of each bed; by default all")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "matching.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    results: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {}
    for name in args.beds:
        target = {"mixture": mixture, "prompts": prompts, "digits": digits, "emoji": emoji}[name]()
        base = [trial(target, METHODS["plain"][0], 16, 0.0, s) for s in range(2)]
        floor = mean([b["valid"] for b in base]) - FIDELITY_LOSS
        methods: dict[str, Any] = results.get(target.bed.name, {}).get("methods", {}) if args.methods else {}
        methods_of_bed = {**METHODS, **target.extra_methods}
        if target.styled is not None:
            methods_of_bed["asked for in words"] = (METHODS["plain"][0], [0.0])
        for label, (make, scales) in methods_of_bed.items():
            if (args.methods and label not in args.methods) or (label == ONE_BY_ONE and target.run is not None):
                continue
            fixed = label in ("plain", "asked for in words")
            single = label == ONE_BY_ONE
            for size in target.sizes[:1] if fixed else target.sizes:
                tried = []
                for s in scales:
                    found = [trial(target, make, size, s, k, single=single) for k in range(2)] if len(scales) > 1 else base
                    lost = max(0.0, floor - mean([f["valid"] for f in found]))
                    tried.append((mean([f["distance"] for f in found]) + 10 * lost, s))
                best = min(tried)[1]
                by_prompt = label == "asked for in words"
                seeds = range(100, 100 + args.trials)
                found = [trial(target, make, size, best, k, by_prompt, single) for k in seeds]
                figures: dict[str, float] = {"strength": best}
                for k in ("distance", "valid", "mmd"):
                    figures |= interval([f[k] for f in found], k)
                methods.setdefault(label, {})["-" if fixed else str(size)] = figures
                print(f"{name:10}{label:26}{size:5}  strength {best:<6g} distance {figures['distance']:.3f} "
                      f"valid {figures['valid']:.3f} mmd {figures['mmd']:.4f}", flush=True)  # fmt: skip
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
