"""Start noises of a batch that are coupled, or chosen by first predictions: what they gain at equal quality, on mixtures.

    python benchmarks/start_noises.py --seeds 100
    python benchmarks/start_noises.py --page docs/arena/ablations.md       # the tables of what has been measured

Coupled noises are standard normal each, so each image is distributed as without: antithetic (z and -z), orthogonal (random
orthogonal directions), stratified (a Latin hypercube), determinantal (directions of a determinantal point process over 16
times as many, whose kernel no rotation changes). Chosen ones are, for each image in turn, the one of m whose prediction
repels those chosen before it least: order 2, half the median distance of all predictions. "In one call" is a model that is
distilled without loss: its prediction of a noise is what the 30 steps make of it.
Results are kept for each setting and block of five seeds, from which an interrupted run continues.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import pages
from benchmarks.arena.batched import Setting, run
from benchmarks.arena.beds import BEDS
from benchmarks.arena.beds.analytic import Analytic
from benchmarks.arena.beds.base import Case
from benchmarks.easing import PLAIN, judged, measure_settings, table
from kspec_guidance.objectives import SAMPLE_BANDWIDTH

ROOT = Path(__file__).parents[1]
LENGTHS = {"in one call": 1, "4 steps": 4, "30 steps": 30}
POOL = 16  # directions for each that a determinantal point process chooses
GUIDE = 50.0  # variety of the guide below
STOP = {30: 0.65, 4: 0.5}  # the end of its interval, which is shorter in few steps (guidance/term.py)


def normal(z: Tensor, case: Case) -> torch.Generator:
    """A generator of further noise for a case, apart from its own noises."""
    return torch.Generator().manual_seed(10**6 + case.seed)


def antithetic(z: Tensor, case: Case) -> Tensor:
    """The first half of the noises ``[n, d]`` and its negatives."""
    half = len(z) // 2
    return torch.cat([z[:half], -z[:half]])


def orthogonal(z: Tensor, case: Case) -> Tensor:
    """Noises ``[n, d]`` of the same norms, whose directions are orthogonal within blocks of at most d."""
    parts = []
    for block in z.split(z.shape[1]):
        q, r = torch.linalg.qr(block.mT)
        parts.append((q * r.diagonal().sign()).mT * block.norm(dim=1, keepdim=True))
    return torch.cat(parts)


def stratified(z: Tensor, case: Case) -> Tensor:
    """A Latin hypercube: each coordinate of the n noises has one value in each n-th of the normal distribution."""
    n, d = z.shape
    g = normal(z, case)
    places = torch.stack([torch.randperm(n, generator=g) for _ in range(d)], 1)
    u = (places + torch.rand(n, d, generator=g)) / n
    return torch.special.ndtri(u.double().clamp(1e-7, 1 - 1e-7)).float()


def determinantal(z: Tensor, case: Case) -> Tensor:
    """Noises of the same norms, whose directions are a sample of a determinantal point process of n among ``POOL`` n.

    The process of n items has the kernel ``exp(-|u - v|^2)`` of random directions (Kulesza, Taskar 2012, section 5.2).
    """
    n, g = len(z), normal(z, case)
    u = torch.nn.functional.normalize(torch.cat([z, torch.randn((POOL - 1) * n, z.shape[1], generator=g)]), dim=1).double()
    values, vectors = torch.linalg.eigh(torch.exp(-torch.cdist(u, u).square()))
    values, m = values.clamp_min(0), len(u)
    sums = torch.zeros(n + 1, m + 1, dtype=torch.float64)  # elementary symmetric polynomials of the first values
    sums[0] = 1
    for k in range(1, n + 1):
        sums[k, 1:] = (values * sums[k - 1, :-1]).cumsum(0)
    left, kept = n, []
    for i in range(m, 0, -1):
        if left and float(torch.rand((), generator=g)) * sums[left, i] < values[i - 1] * sums[left - 1, i - 1]:
            kept.append(i - 1)
            left -= 1
    basis, picked = vectors[:, kept], []
    while basis.shape[1]:
        row = int(torch.multinomial(basis.square().sum(1).clamp_min(0), 1, generator=g))
        picked.append(row)
        column = int(basis[row].abs().argmax())
        basis = basis - basis[:, column : column + 1] * (basis[row] / basis[row, column])
        basis = basis[:, [k for k in range(basis.shape[1]) if k != column]]
        if basis.shape[1]:
            basis = torch.linalg.qr(basis).Q
    return u[picked].to(z) * z.norm(dim=1, keepdim=True)


COUPLINGS = {"antithetic": antithetic, "orthogonal": orthogonal, "stratified": stratified, "determinantal": determinantal}
# label: coupling, number of candidates, variety of the guide
SETTINGS: dict[str, tuple[str | None, int, float]] = {
    PLAIN: (None, 1, 0.0),
    **{name: (name, 1, 0.0) for name in COUPLINGS},
    **{f"chosen of {m}": (None, m, 0.0) for m in (2, 4, 8)},
    "variety 50": (None, 1, GUIDE),
    **{f"variety 50, {name}": (name, 1, GUIDE) for name in COUPLINGS},
    "variety 50, chosen of 4": (None, 4, GUIDE),
}


def predictions(bed: Analytic, cases: list[Case], start: Tensor, length: str) -> Tensor:
    """What the model predicts from start noises ``[cases, n, d]``."""
    return run(bed, cases, Setting(), start, until=int(length != "in one call"))


def chosen(bed: Analytic, cases: list[Case], start: Tensor, candidates: int, length: str) -> Tensor:
    """For each image one of ``candidates`` noises; the first candidates are those of ``start`` ``[cases, n, d]``."""
    more = [
        torch.randn(candidates - 1, *start.shape[1:], generator=normal(z, case))
        for z, case in zip(start, cases, strict=True)
    ]
    noises = torch.cat([start[:, None], torch.stack(more)], 1)  # [cases, m, n, d]
    x0 = torch.stack([predictions(bed, cases, noises[:, k], length) for k in range(candidates)], 1)
    u = torch.nn.functional.normalize(x0, dim=-1)
    flat = u.flatten(1, 2)
    distances = torch.cdist(flat, flat)
    off = ~torch.eye(flat.shape[1], dtype=torch.bool)
    h = (SAMPLE_BANDWIDTH * distances[:, off].median(1).values).clamp_min(1e-6)
    k2 = torch.exp(-(distances / h[:, None, None]).square())  # squared kernels of all candidates
    n, which = start.shape[1], torch.arange(len(cases))
    repelled = torch.zeros(len(cases), flat.shape[1])  # by those chosen so far
    picked = []
    for i in range(n):
        mine = torch.arange(candidates) * n + i
        best = mine[repelled[:, mine].argmin(1)]
        picked.append(best)
        repelled = repelled + k2[which, best]
    index = torch.stack(picked, 1)
    return noises.flatten(1, 2).gather(1, index[..., None].expand(-1, -1, start.shape[2]))


def measure(bed: Analytic, label: str, length: str, cases: list[Case]) -> dict[str, Any]:
    """The judge's figures of one setting."""
    coupling, candidates, variety = SETTINGS[label]
    start = torch.stack([bed.start(case, bed.images).flatten(1) for case in cases])
    if coupling is not None:
        start = torch.stack([COUPLINGS[coupling](z, case) for z, case in zip(start, cases, strict=True)])
    if candidates > 1:
        start = chosen(bed, cases, start, candidates, length)
    return judged(bed, list(run(bed, cases, Setting(variety, stop=STOP[bed.steps]), start)), cases)


def tables(path: Path) -> str:
    """The tables of all beds in a file of results."""
    if not path.exists():
        return "(not measured)"
    found = json.loads(path.read_text("utf-8"))
    return "\n\n".join(table(name, about).replace(" 1 steps,", " in one call,") for name, about in found.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--beds", nargs="*", default=["mixture-8", "mixture-32", "mixture-64"])
    parser.add_argument("--lengths", nargs="*", default=list(LENGTHS), choices=list(LENGTHS))
    parser.add_argument("--seeds", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="settings to measure; all by default")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "arena" / "start_noises.json")
    parser.add_argument("--page", type=Path, help="write the tables into this page")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    for name in args.beds if args.seeds else []:
        for length in args.lengths:
            bed = BEDS[name]()
            assert isinstance(bed, Analytic)
            bed.steps = 30 if length == "in one call" else LENGTHS[length]
            guided = length != "in one call"  # a guide acts between steps
            labels = [s for s in SETTINGS if (not args.only or s in args.only) and (guided or not s.startswith("variety"))]
            found = measure_settings(
                args.out, f"{name}, {length}", bed, "report", args.seeds, labels,
                lambda label, cases, bed=bed, length=length: measure(bed, label, length, cases), LENGTHS[length],
            )  # fmt: skip
            print(table(name, found), flush=True)
    if args.page is not None:
        pages.fill(args.page, {"start noises": tables(args.out)})


if __name__ == "__main__":
    main()
