"""Ablations of kernel guidance: one part changed at a time, strength and window tuned for each variant.

    python -m benchmarks.arena.ablations

Every variant gets the same trials by the same optimiser on the tuning half; figures are of the report half: the largest
gain in modes along its front that keeps fidelity within 0.02 of plain sampling.
"""

import argparse
import json
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kspec_guidance.bench.fronts import matched, weights
from kspec_guidance.bench.methods import METHODS
from kspec_guidance.bench.methods.base import Log, Method, Moment, Real, Whole, norms, without
from kspec_guidance.bench.methods.eddy import dot
from kspec_guidance.bench.methods.selection import GroupInference
from kspec_guidance.guidance.spaces import Activations
from kspec_guidance.loop.context import CallContext

from .beds import BEDS
from .beds.base import Bed, Case
from .harness import measure, search

ROOT = Path(__file__).parents[2]


@dataclass
class Variant(Method):
    """Kernel guidance of the batch's clean predictions with all parts exchangeable."""

    name = "variant"
    tuned = {"scale": Log(0.1, 10.0), "stop": Real(0.25, 1.0)}
    strength = "scale"
    scale: float = 0.6
    stop: float = 0.6
    bandwidth: float = 0.5  # in median distances; below 0 a fixed one
    annealed: bool = False
    order: float | str = "rke"  # or the order of the entropy, or "logdet"
    schedule: str = "constant"
    projection: str = "score"
    tangent: bool = True
    size: str = "largest"
    momentum: float = 0.0
    langevin: float = 0.0
    every: int = 1
    start: str = ""
    space: str = "x0"
    target: float = 0.0  # Vendi score at which the controller stops

    def begin(self) -> None:
        self._velocity: Tensor | None = None

    def cfg_direction(self, m: Moment) -> Tensor:
        """Conditional less unconditional output of the denoiser, which the beds' pipelines compute in this order."""
        uncond, cond = m.call.outputs[0][0].chunk(2)
        return cond - uncond

    def kernel(self, u: Tensor, sigma: float) -> tuple[Tensor, float]:
        """Squared distances and the kernel's ``2 b^2``."""
        d2 = torch.cdist(u, u).square()
        median = float(d2[~torch.eye(len(u), dtype=torch.bool)].sqrt().median().clamp_min(1e-9))
        b = -self.bandwidth if self.bandwidth < 0 else self.bandwidth * median
        if self.annealed:
            b *= 0.5 + sigma
        return d2, 2 * b * b

    def ascent(self, u: Tensor, sigma: float) -> Tensor:
        """Direction in unit-norm rows."""
        if self.order == "rke":
            d2, h = self.kernel(u, sigma)
            k = torch.exp(-2 * d2 / h)
            k.fill_diagonal_(0)
            return k.sum(1, keepdim=True) * u - k @ u
        with torch.enable_grad():
            x = u.double().requires_grad_()
            eye = torch.eye(len(u), dtype=x.dtype)
            if self.order == "logdet":
                value = torch.logdet(eye + 10 * x @ x.mT)
            else:
                _, h = self.kernel(u, sigma)
                k = torch.exp(-(x[:, None] - x[None]).square().sum(-1) / h)
                l = torch.linalg.eigvalsh(k / len(u) + 1e-7 * eye).clamp_min(1e-9)
                q = float(self.order)
                value = (
                    -(l * l.log()).sum() if q == 1 else -l.max().log() if q == math.inf else (l**q).sum().log() / (1 - q)
                )
            (g,) = torch.autograd.grad(value, x)
        return torch.nan_to_num(g.to(u.dtype))

    def direction(self, m: Moment) -> Tensor:
        rows, pullback = m.x0.flatten(1), lambda g: g.view(m.x0.shape)
        if self.space == "latents":
            rows = m.x.flatten(1)
        elif self.space == "pooled" and m.x0.ndim == 4 and min(m.x0.shape[-2:]) >= 4:
            side = m.x0.shape[-1] // 2
            rows = torch.nn.functional.avg_pool2d(m.x0, 2).flatten(1)
            blocks = (-1, side, side)
            pullback = lambda g: torch.nn.functional.interpolate(g.unflatten(1, blocks), m.x0.shape[-2:])  # noqa: E731
        elif self.space == "activations":
            rows, to_x = Activations().features(m.x, CallContext(m.pipe), m.call)
            pullback = lambda g: to_x(g).view(m.x0.shape).to(m.x0.dtype)  # noqa: E731
        u = torch.nn.functional.normalize(rows, dim=1)
        g = self.ascent(u, m.sigma)
        g = (g - (g * u).sum(1, keepdim=True) * u) / rows.norm(dim=1, keepdim=True).clamp_min(1e-9)
        return pullback(g)

    def resample(self, m: Moment) -> Tensor | None:
        """Move the start noise along the direction at the first prediction, and predict again."""
        if m.step or self.start != "noise":
            return None
        g = self.direction(m)
        moved = m.x + self.scale * norms(m.x) * g / norms(g).amax().clamp_min(1e-12)
        return moved * norms(m.x) / norms(moved)

    def move(self, m: Moment) -> Tensor | None:
        if m.fraction >= self.stop or m.step % self.every:
            return None
        if self.start == "noise":
            return None
        if self.target:
            u = torch.nn.functional.normalize(m.x0.flatten(1).double(), dim=1)
            _, h = self.kernel(u, 0.0)
            l = torch.linalg.eigvalsh(torch.exp(-torch.cdist(u, u).square() / h) / len(u)).clamp_min(1e-12)
            if float(torch.exp(-(l * l.log()).sum())) >= self.target * len(u):
                return None
        g = self.direction(m)
        if self.tangent:
            g = without(g, m.x0)
        if self.projection != "none":
            along = {"score": m.noise, "velocity": m.x0 - m.noise}.get(self.projection)
            g = without(g, self.cfg_direction(m) if along is None else along)
        if self.size == "each":
            g = g / norms(g)
        else:
            g = g / norms(g).amax().clamp_min(1e-12)
        if self.momentum and self._velocity is not None:
            g = self.momentum * self._velocity + (1 - self.momentum) * g
        self._velocity = g
        reach = m.sigma / math.sqrt(m.alpha**2 + m.sigma**2)
        size = {
            "constant": norms(m.x0), "fade": norms(m.x0) * math.cos(math.pi / 2 * m.fraction / self.stop) ** 2,
            "noise": reach * norms(m.x0), "noise squared": reach**2 * norms(m.x0),
            "score": m.sigma / max(m.alpha, 0.05) * norms(m.noise),
        }[self.schedule]  # fmt: skip
        move = self.scale * size * g
        if self.langevin:  # noise orthogonal to the score, relative to the size of the move
            noise = without(self.noise_like(g), m.noise)
            move = move + self.langevin * norms(move) * noise / norms(noise)
        return move


@dataclass
class MarginalPreserving(Variant):
    """The repulsion as an antisymmetric drift with its divergence, which keeps the distribution of each image exactly.

    ``b = r |s|^2 - s (r.s) + (s.grad) r + r div s - (r.grad) s - s div r``, derivatives of ``r`` by finite differences in a
    sample's own coordinates, of ``s`` by the denoiser.
    """

    def move(self, m: Moment) -> Tensor | None:
        if m.fraction >= self.stop or m.sigma < 1e-2 or m.alpha < 1e-4:
            return None
        s, d = m.score, m.x[0].numel()
        r = self.direction(m)
        r = r * norms(m.noise).mean() / norms(r).amax().clamp_min(1e-12)
        e = 1e-2 * max(m.sigma, 0.05)
        v = torch.sign(self.noise_like(m.x))
        size = norms(r).amax().clamp_min(1e-12)
        div_s = (m.alpha * dot(v, (m.denoise(m.x + e * v) - m.x0) / e) - d) / m.sigma**2
        s_along_r = (m.alpha * (m.denoise(m.x + e * r / size) - m.x0) * size / e - r) / m.sigma**2
        b = r * dot(s, s) - s * dot(r, s) + r * div_s - s_along_r
        return self.scale * m.sigma / m.alpha * b * m.sigma**2 / d


@dataclass
class ChosenNoise(Variant):
    """Start noises chosen by their first prediction, then guided; costs one extra denoiser call for each candidate."""

    tuned = {"scale": Log(0.1, 10.0), "stop": Real(0.25, 1.0), "candidates": Whole(2, 4)}
    candidates: int = 3

    def sample(self, bed: Bed, case: Case) -> Tensor:
        chosen = GroupInference(candidates=self.candidates, look=1).choose(bed, case)
        with self.attach(bed.pipe):
            return bed.run(case, bed.images, chosen)


MEDIAN = {"bandwidth": 1.0}
GROUPS: dict[str, dict[str, Any]] = {
    "reference": {"half the median, score projected, largest bounded": {}},
    "space": {
        "noisy latents": {"space": "latents"}, "pooled 2 x 2": {"space": "pooled"},
        "denoiser's activations": {"space": "activations"},
    },
    "bandwidth": {
        "a quarter of the median": {"bandwidth": 0.25}, "the median": MEDIAN, "twice the median": {"bandwidth": 2.0},
        "fixed, 0.7": {"bandwidth": -0.7}, "annealed": {"annealed": True},
    },
    "entropy": {
        "order 1 (Vendi), the median": {"order": 1.0, **MEDIAN}, "order 0.5, the median": {"order": 0.5, **MEDIAN},
        "order infinity, the median": {"order": math.inf, **MEDIAN}, "order 1, half the median": {"order": 1.0},
        "log det of I + 10 G": {"order": "logdet"},
    },
    "schedule": {
        "fading to the end of the window": {"schedule": "fade"}, "with the noise": {"schedule": "noise"},
        "with the noise squared": {"schedule": "noise squared"}, "a part of the score": {"schedule": "score"},
        "every second step": {"every": 2},
    },
    "size": {"each rescaled": {"size": "each"}},
    "projection": {
        "none": {"projection": "none"}, "none, not tangent": {"projection": "none", "tangent": False},
        "off the velocity": {"projection": "velocity"}, "off the CFG direction": {"projection": "cfg"},
    },
    "correction": {
        "momentum 0.5": {"momentum": 0.5}, "noise across the score": {"langevin": 0.5},
        "marginal-preserving drift": {"class": MarginalPreserving},
    },
    "first step": {
        "start noise moved, first step repeated": {"start": "noise"},
        "noises chosen by first prediction": {"class": ChosenNoise},
    },
    "controller": {"until Vendi is 0.6 of the batch": {"target": 0.6}},
    "both": {
        "order 0.5, the median, fading": {"order": 0.5, "schedule": "fade", **MEDIAN},
        "log det, fading": {"order": "logdet", "schedule": "fade"},
        "order 1, the median, fading": {"order": 1.0, "schedule": "fade", **MEDIAN},
        "order 1, the median, noise squared": {"order": 1.0, "schedule": "noise squared", **MEDIAN},
        "fading, each rescaled": {"schedule": "fade", "size": "each"},
    },
}  # fmt: skip


def gain(bed: Bed, cls: type[Method], options: dict[str, Any], trials: int, seeds: int, tune_seeds: int) -> dict[str, Any]:
    """Tune on one half; gain at matched fidelity, with its interval, on the other."""
    cases = bed.cases("tune", tune_seeds)
    first = {"scale": 0.6, "stop": 0.6, "candidates": 3}
    base = measure(bed, METHODS["plain"], cases)
    study = search(bed, partial(cls, **options), cls.tuned, first, cases, base, trials, 0)
    best = study.best_params
    report = bed.cases("report", seeds)
    plain = measure(bed, METHODS["plain"], report)
    w = weights([c.prompt for c in report])
    m0, v0 = w @ np.array(plain[bed.diversity]), w @ np.array(plain[bed.fidelity])
    modes, valid, seconds = [], [], []
    for factor in (0.5, 1.0, 2.0):
        found = measure(bed, lambda f=factor: cls(**options, **{**best, "scale": best["scale"] * f}), report)
        modes.append(w @ np.array(found[bed.diversity]))
        valid.append(w @ np.array(found[bed.fidelity]))
        seconds += found["seconds"]
    g = matched(np.stack(modes, 1) / m0[:, None] - 1, np.stack(valid, 1) - v0[:, None])
    low, high = np.quantile(g, [0.025, 0.975])
    time = float(np.median(seconds) / np.median(plain["seconds"]))
    return {"gain": float(g[0]), "low": float(low), "high": float(high), "tuned": best, "time": time}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="+", default=["mixture-32", "mixture-8", "digits", "digits-4", "emoji"])
    parser.add_argument("--groups", nargs="+", default=list(GROUPS), choices=list(GROUPS))
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--tune-seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "ablations.json")
    args = parser.parse_args()
    torch.set_grad_enabled(False)
    done: dict[str, Any] = json.loads(args.out.read_text()) if args.out.exists() else {"beds": {}, "groups": {}}
    for name in args.beds:
        bed = BEDS[name]()
        done["beds"][bed.name] = {"trials": args.trials, "seeds": args.seeds}
        for group in args.groups:
            for label, options in GROUPS[group].items():
                into = done["groups"].setdefault(group, {}).setdefault(label, {})
                settings = dict(options)
                cls = settings.pop("class", Variant)
                if bed.name in into or (settings.get("space") == "activations" and "features" not in bed.has):
                    continue
                into[bed.name] = r = gain(bed, cls, settings, args.trials, args.seeds, args.tune_seeds)
                tuned = {k: round(v, 2) for k, v in r["tuned"].items()}
                print(f"{bed.name:32}{group:12}{label:46}{r['gain']:+.2f} [{r['low']:+.2f}, {r['high']:+.2f}]  "
                      f"x{r['time']:.2f}  {tuned}", flush=True)  # fmt: skip
                args.out.parent.mkdir(parents=True, exist_ok=True)
                args.out.write_text(json.dumps(done, indent=1) + "\n")


if __name__ == "__main__":
    main()
