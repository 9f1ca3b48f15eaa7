"""Comparisons: cases of known answer, cost, random features, KODA on sets without groups, and the effect of candidates.

    OMP_NUM_THREADS=1 python -m benchmarks.comparison [--only NAME ...] [--figure docs/comparison-oracles.png]

Prints a table for each part, and writes its rows to benchmarks/results/comparison.json; parts that are not run keep theirs.
About ten minutes on one core, of which KODA on sets with and without groups takes most. The figure shows four of the cases
of known answer.
"""

import argparse
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.optimize import linprog
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.comparison import (
    ClientMessage,
    ClientScores,
    KernelAlignmentLoss,
    align_linear,
    complete_kernel,
    diversity_gap,
    entropy_projection,
    fid_over_clients,
    kid_over_clients,
    koda,
    max_entropy_mixture,
    max_entropy_weights,
    product_embedder,
    prompt_split,
    spec,
)
from kspec_guidance.comparison.contrast import _direction
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import IMAGE_BANDWIDTH, CosineKernel, GaussianKernel, Kernel, l2_normalize

OUT = Path(__file__).parent / "results" / "comparison.json"
REPEATS = 3
SETS = 200  # of each case of KODA without something to find; a quarter as many with planted groups
G = torch.Generator().manual_seed(0)
CHAINS = {0.1: 0.0050, 0.3: 0.0464, 0.5: 0.1374, 0.6: 0.2080, 0.8: 0.4393, 0.9: 0.6518}
LINES = np.diag([1, 0.8, 0.3, 0.1]), np.diag([1, 0.5, 0.05, 0.02])  # of a problem of KODA whose kernels commute


def normal(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def seconds(call: Callable[[], object]) -> float:
    """The shortest processor time of three calls, which other programs lengthen little."""
    times = []
    for _ in range(REPEATS):
        began = time.process_time()
        call()
        times.append(time.process_time() - began)
    return min(times)


def models(n: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two models with n samples each, of 30 prompts, which differ in prompts 4, 11 and 20."""
    g = torch.Generator().manual_seed(seed)
    prompt = torch.arange(n) % 30
    centres, other, t = (torch.randn(30, d, generator=g) for d in (64, 64, 32))
    changed = centres.clone()
    changed[[4, 11, 20]] = other[[4, 11, 20]]
    x_a, x_b = (c[prompt] + 0.2 * torch.randn(n, 64, generator=g) for c in (centres, changed))
    return x_a, t[prompt], x_b, t[prompt], prompt


def cost_of_prompt_split() -> list[dict[str, Any]]:
    """Seconds against n and r, with the prompts found, and the constant of n r^2 + r^3."""
    rows = []
    for n, r in ((500, None), (1000, None), (4000, 250), (8000, 250), (16000, 250), (8000, 500), (8000, 1000)):
        *sets, prompt = models(n)
        found = prompt_split(*sets, features=r)
        took = seconds(lambda sets=sets, r=r: prompt_split(*sets, features=r))
        work = (2 * n) ** 3 if r is None else 2 * n * r**2 + r**3
        right = {int(prompt[i]) for k in found.indices_a for i in k} == {4, 11, 20}
        rows.append({"n": n, "features": r, "seconds": took, "ns per operation": 1e9 * took / work, "right": right})
    return rows


def error_of_products() -> list[dict[str, Any]]:
    """Root mean square error of the product kernel against l, over ten seeds; times sqrt(l) it is constant."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(100, 96, generator=g)
    factors = (lambda z: z[:, :64]), (lambda z: z[:, 64:])
    exact = product_embedder(*factors).kernel(x)
    rows = []
    for l in (250, 1000, 4000, 16000):
        embedders = [product_embedder(*factors, features=l, seed=s) for s in range(10)]
        off = torch.stack([(z := e(x)) @ z.T for e in embedders]) - exact
        error, bias = float(off.square().mean().sqrt()), float(off.mean())
        rows.append({"features": l, "rmse": error, "rmse sqrt(l)": error * l**0.5, "mean error": bias})
    return rows


def linear_program(bound: float) -> float:
    """The optimum of ``LINES``: shares of the four eigenvectors."""
    a, b = (np.diag(m) for m in LINES)
    return -float(linprog(-a, b[None], [bound], np.ones((1, 4)), [1.0]).fun)


def published_search(bound: float) -> float:
    """The largest ``x' A x`` among the leading eigenvectors of ``A - lam B`` within the bound, lam on a fine grid."""
    a, b = (np.diag(m) for m in LINES)
    tops = {int(np.argmax(a - lam * b)) for lam in np.linspace(0, 50, 5001)}
    return max(float(a[k]) for k in tops if b[k] <= bound)


def bounds() -> list[dict[str, Any]]:
    """The optimum of KODA where kernels commute, beside the published search."""
    rows = []
    for bound in (0.7, 0.3, 0.1):
        y, _, gap = _direction(*LINES, bound)  # type: ignore[misc]
        rows.append(
            {
                "bound": bound, "linear program": linear_program(bound), "koda": float(y @ LINES[0] @ y), "gap": gap,
                "published": published_search(bound),
            }
        )  # fmt: skip
    return rows


def merged(n: int) -> tuple[Tensor, Tensor]:
    """n samples of six groups by two embeddings, of which the second merges two and two of them."""
    g = torch.Generator().manual_seed(0)
    group = torch.arange(n) % 6
    first, second = (l2_normalize(torch.randn(6, 32, generator=g)) for _ in range(2))
    a = l2_normalize(first[group] + 0.05 * torch.randn(n, 32, generator=g))
    b = l2_normalize(second[torch.tensor([0, 0, 2, 2, 4, 5])[group]] + 0.05 * torch.randn(n, 32, generator=g))
    return a, b


def cost_of_directions() -> list[dict[str, Any]]:
    """Seconds of three directions of KODA, and of SPEC, against n: exact Gaussian kernels, and features."""
    rows = []
    for n, features in ((150, None), (300, None), (600, None), (2400, 200), (9600, 200)):
        a, b = merged(n)
        kernel, eps = GaussianKernel(0.5), 1.05 if features is None else n / 100
        options: dict[str, Any] = {"kernel_a": kernel, "kernel_b": kernel, "features": features}
        found = koda(a, b, eps=eps, **options)
        rows.append(
            {
                "n": n,
                "features": features,
                "koda": seconds(lambda a=a, b=b, o=options, e=eps: koda(a, b, eps=e, **o)),
                "spec": seconds(lambda a=a, b=b, o=options: spec(a, b, **o)),
                "directions": len(found),
                "largest gap": float(found.gap.max()) if len(found) else None,
            }
        )
    return rows


def disagreement() -> tuple[str, float, str]:
    t, x = torch.eye(5).repeat_interleave(4, 0), torch.eye(3)[[0] * 20]
    found = prompt_split(x, t, torch.eye(3)[[0] * 16 + [1] * 4], t, modes=2)
    values = torch.cat([found.values, found.reverse.values])  # type: ignore[union-attr]
    error = float((values - torch.tensor([0.2, 0, 0.2, 0], dtype=torch.float64)).abs().max())
    *sets, _ = models(8000)
    return (
        "one of five prompts",
        error,
        f"{seconds(lambda: prompt_split(*sets, features=250)):.2f} s, 8,000 of each, r = 250",
    )


def directions() -> tuple[str, float, str]:
    a, b = LINES
    errors = []
    for bound in (0.7, 0.3, 0.1):
        y, _, _ = _direction(a, b, bound)  # type: ignore[misc]
        errors.append(abs(float(y @ a @ y) - linear_program(bound)))
    return (
        "linear program of commuting kernels",
        max(errors),
        f"{seconds(lambda: koda(*merged(600))):.2f} s, 600 rows of 32",
    )


def difference() -> tuple[str, float, str]:
    z = torch.eye(3).repeat_interleave(10, 0)
    found = spec(z, torch.eye(3)[[0, 0, 2]].repeat_interleave(10, 0), modes=1)
    error = float((found.values - torch.tensor([1 / 3, -1 / 3], dtype=torch.float64)).abs().max())
    return "B merges two of three groups", error, f"{seconds(lambda: spec(*merged(600))):.3f} s, 600 rows of 32"


def product() -> tuple[str, float, str]:
    x = normal(1000, 96)
    both = product_embedder(lambda z: z[:, :64], lambda z: z[:, 64:], features=None)
    error = float((both(x[:50]) @ both(x[:50]).T - both.kernel(x[:50])).abs().max())
    random = product_embedder(both.first, both.second)
    return "rows of the product kernel", error, f"{1000 * seconds(lambda: random(x)):.0f} ms, 1,000 to 3,000 features"


def mixture() -> tuple[str, float, str]:
    spectra = torch.zeros(3, 9, dtype=torch.float64)
    spectra[0, :2], spectra[1, 2:5], spectra[2, 5:] = 1 / 2, normal(3).softmax(0), 1 / 4
    vendi = torch.special.entr(spectra).sum(1).exp()
    found = max_entropy_weights(torch.diag_embed(spectra))
    error = float((found.weights - vendi / vendi.sum()).abs().max())
    sets = [normal(2000, 256) for _ in range(3)]
    took = seconds(lambda: max_entropy_mixture(sets))
    return "weights of orthogonal supports in proportion to Vendi scores", error, f"{took:.2f} s, 3 x [2000, 256]"


def chain(a: float) -> Tensor:
    """The kernel matrix of three samples with the pair of the outer ones unknown."""
    return torch.tensor([[1, a, math.nan], [a, 1, a], [math.nan, a, 1]], dtype=torch.float64)


def completion() -> tuple[str, float, str]:
    error = max(abs(float(complete_kernel(chain(a), ~chain(a).isnan())[0, 2]) - x) for a, x in CHAINS.items())
    k, mask = GaussianKernel(3.0)(normal(100, 8)), torch.rand(100, 100, generator=G) < 0.2
    took = seconds(lambda: complete_kernel(k, mask))
    return "six chains of three, printed with four digits", error, f"{took:.2f} s, n = 100, 36 % observed"


def adapter() -> tuple[str, float, str]:
    x, root = normal(2000, 64), normal(64, 64)
    found = align_linear(x, x @ root)
    error = float((found.weight @ found.weight - root @ root.T).abs().max() / (root @ root.T).abs().max())
    return "recovery of X M X', relative", error, f"{seconds(lambda: align_linear(x, x @ root)):.3f} s, [2000, 64]"


def loss() -> tuple[str, float, str]:
    x, y, module = normal(24, 4), normal(24, 3), KernelAlignmentLoss("gaussian").double()
    pairs = [module(x[[i, j]], y[[i, j]]).detach() for i in range(24) for j in range(i)]
    error = abs(float(torch.stack(pairs).mean() - module(x, y).detach()))
    a, b = torch.randn(256, 512, generator=G).requires_grad_(), torch.randn(256, 512, generator=G)
    single = KernelAlignmentLoss("gaussian")
    took = seconds(lambda: single(a, b).backward())
    return "mean over all batches of two is that of the batch", error, f"{1000 * took:.1f} ms, [256, 512] with gradient"


def clients() -> tuple[str, float, str]:
    parts, models = [normal(100, 8) + i for i in range(3)], [s * normal(100, 8) for s in (0.5, 1.0, 2.0, 4.0)]
    differences = [kid_over_clients(x, parts).difference for x in models]
    error = (max(differences) - min(differences)) / abs(differences[0])
    error = max(error, abs(fid_over_clients(models[2], parts).over_all - F.frechet_distance(models[2], torch.cat(parts))))
    rows, features = normal(2000, 256), RandomFourierFeatures(GaussianKernel(16.0), 256, 1024)
    messages = [ClientMessage.of(normal(2000, 256), features) for _ in range(4)]
    took = seconds(lambda: (kid_over_clients(rows, messages, feature_map=features), fid_over_clients(rows, messages)))
    return "one KID difference for 4 models; FID of pooled rows", error, f"{took:.2f} s, 4 messages of 256 features"


def gap() -> tuple[str, float, str]:
    errors = []
    for _ in range(20):
        few, many = (torch.eye(20).double()[torch.randint(m, (400,), generator=G)] for m in (5, 10))
        found = diversity_gap(few, many, sizes=[400]).scores["rke"]
        errors.append([found.generated / 5 - 1, found.held_out / 10 - 1])
    error = float(torch.tensor(errors).mean(0).abs().max())
    took = seconds(lambda: diversity_gap(normal(400, 64), normal(400, 64), GaussianKernel(11.0)))
    return "5 and 10 equal modes, unbiased RKE, mean of 20 draws, relative", error, f"{took:.1f} s, 400 of each"


def candidates() -> tuple[str, float, str]:
    x, t = normal(60, 5), normal(15, 3).repeat_interleave(4, 0)
    k = CosineKernel()(x) * CosineKernel()(t)
    w = entropy_projection(x, t, 4, 0.3).clamp_min(1e-12).requires_grad_()
    change = w / 15 - 1 / 60
    value = change @ k @ change - 0.3 * F.matrix_vendi_score(k, weights=w).log()
    (slope,) = torch.autograd.grad(value, w)
    blocks, slope = w.detach().view(15, 4), slope.view(15, 4)
    error = float(((blocks * slope).sum(1) - slope.amin(1)).sum())
    rows, prompts = normal(1000, 16), normal(100, 8)
    took = seconds(lambda: entropy_projection(rows, prompts, 10))
    return "KKT conditions by autograd", error, f"{took:.1f} s, 100 prompts of 10"


def fid_of_scale(s: float) -> ClientScores:
    """FID of N(0, s^2) to clients N(1, 1) and N(-1, 1), by messages with exactly these moments."""

    def message(mean: float, variance: float) -> ClientMessage:
        empty = torch.zeros(0).double()
        moments = (torch.tensor(v).double() for v in (2.0, [mean], [[variance]]))
        return ClientMessage(*moments, empty, torch.tensor(0.0).double(), empty)

    return fid_over_clients(message(0, s * s), [message(1, 1), message(-1, 1)], [0.5, 0.5])


def ranking_of_fid() -> list[dict[str, Any]]:
    """Two models that FID ranks by all data, and not by the mean over clients."""
    scales = {"N(0, 1.96)": 1.4, "N(0, 0.36)": 0.6}
    return [{"model": m, "mean": (f := fid_of_scale(s)).average, "all clients": f.over_all} for m, s in scales.items()]


SETTINGS: dict[str, tuple[Kernel, float]] = {  # of the function, with a narrow kernel, and of the command
    "cosine, eps 1.05": (CosineKernel(), 1.05),
    "Gaussian 0.5, eps 1.05": (GaussianKernel(0.5), 1.05),
    "Gaussian of the median, eps 4": (GaussianKernel(), 4.0),
}


def centres(k: int, d: int, g: torch.Generator) -> Tensor:
    """Random unit rows ``[k, d]``."""
    return l2_normalize(torch.randn(k, d, generator=g, dtype=torch.float64))


def unrelated(n: int, d: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows without groups by both embeddings."""
    return centres(n, d, g), centres(n, d, g)


def shared(d: int, noise: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Five groups of 40 that both embeddings see."""
    z = centres(5, d, g).repeat_interleave(40, 0)
    a, b = (l2_normalize(z + noise * torch.randn(200, d, generator=g, dtype=torch.float64)) for _ in range(2))
    return a, b


def planted(size: int, noise: float, g: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Six groups: B merges 0 and 1, and 2 and 3, and scatters 4; both see 5."""
    group = torch.arange(6).repeat_interleave(size)
    first, second = centres(6, 32, g), centres(6, 32, g)[torch.tensor([0, 0, 2, 2, 4, 5])]
    a, b = (l2_normalize(z[group] + noise * torch.randn(6 * size, 32, generator=g)) for z in (first, second))
    b[group == 4] = centres(size, 32, g)
    return a, b, group


def false_findings() -> list[dict[str, Any]]:
    """The share of sets in which KODA finds a direction although there is none, by the rule that stops it."""
    cases: dict[str, Callable[[torch.Generator], tuple[Tensor, Tensor]]] = {}
    for n, d in (
        (60, 32),
        (100, 32),
        (200, 32),
        (100, 64),
        (200, 64),
        (100, 512),
        (100, 16),
        (200, 16),
        (100, 8),
        (200, 8),
    ):
        cases[f"no groups, n = {n}, d = {d}"] = lambda g, n=n, d=d: unrelated(n, d, g)  # type: ignore[misc]
    for d, noise in ((64, 0.1), (64, 0.2), (32, 0.05), (32, 0.1), (32, 0.2), (16, 0.1), (16, 0.2)):
        cases[f"groups that both see, d = {d}, noise {noise}"] = lambda g, d=d, s=noise: shared(d, s, g)  # type: ignore[misc]
    rows = []
    for name, draw_sets in cases.items():
        sets = [draw_sets(torch.Generator().manual_seed(seed)) for seed in range(SETS)]
        rates = {
            setting: sum(len(koda(a, b, 1, eps, kernel_a=kernel, kernel_b=kernel)) for a, b in sets) / SETS
            for setting, (kernel, eps) in SETTINGS.items()
        }
        rows.append({"case": name, **rates})
        print("|", " | ".join(map(str, rows[-1].values())), "|", flush=True)
    return rows


def misses() -> list[dict[str, Any]]:
    """Five planted groups of the kinds above: the share that KODA misses, and of sets in which it finds another one.

    A group is found if at least half of its samples are listed.
    """
    rows = []
    for size in (50, 20, 10):
        for noise in (0.02, 0.05, 0.1, 0.15):
            row: dict[str, Any] = {"samples of a group": size, "noise": noise}
            for setting, (kernel, eps) in SETTINGS.items():
                missed, invented = 0, 0
                for seed in range(SETS // 4):
                    a, b, group = planted(size, noise, torch.Generator().manual_seed(seed))
                    found = koda(a, b, 8, eps, kernel_a=kernel, kernel_b=kernel, rotate=True)
                    seen = set()
                    for p, n in zip(found.positive, found.negative, strict=True):
                        seen |= {k for k in range(6) if int((group[p + n] == k).sum()) >= size / 2}
                    missed += len(set(range(5)) - seen)
                    invented += len(found) > 3 or 5 in seen
                row |= {f"missed, {setting}": missed / (5 * (SETS // 4)), f"invented, {setting}": invented / (SETS // 4)}
            rows.append(row)
            print("|", " | ".join(map(str, row.values())), "|", flush=True)
    return rows


def effect_of_candidates() -> list[dict[str, Any]]:
    """RKE of the eight images of a prompt with one and with four candidates of each, mean over prompts.

    By the embedder that chooses, and by another one.
    """
    from kspec_guidance import SPARKE, load_demo_pipeline
    from kspec_guidance.evaluation import load_images
    from kspec_guidance.evaluation.embedders import image_embedder
    from kspec_guidance.synthesis import synthesize

    pipe = load_demo_pipeline()
    pipe.set_progress_bar_config(disable=True)
    prompts, kernel = ["heart", "runner", "cat face", "man"], GaussianKernel(IMAGE_BANDWIDTH)
    chooser, other = image_embedder("demo"), image_embedder("efficientnet-lite0")
    rows = []
    for guide in ("none", "SPARKE"):
        for candidates in (1, 4):
            began = time.perf_counter()
            with tempfile.TemporaryDirectory() as out:
                synthesize(
                    prompts, out, pipe, SPARKE(0) if guide == "none" else SPARKE(), 8, 16, candidates=candidates,
                    call={"num_inference_steps": 8, "guidance_scale": 5.0}, embedder=chooser, report=False,
                )  # fmt: skip
                took, scores = time.perf_counter() - began, {}
                for embedder in (chooser, other):
                    images = load_images(out, embedder)
                    x, texts = l2_normalize(images.features.double()), np.array(images.prompts)
                    each = [float(F.rke_score(x[torch.from_numpy(texts == p)], kernel)) for p in prompts]
                    scores[f"RKE by {embedder.name.split(' ')[0]}"] = sum(each) / len(each)
            rows.append({"guide": guide, "candidates": candidates, **scores, "seconds": took})
    return rows


def draw(path: str) -> None:
    """Four cases as a figure."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 4, figsize=(13, 3), layout="constrained")
    kind = torch.arange(6).repeat_interleave(20)
    a, b = torch.eye(4)[torch.tensor([0, 0, 0, 1, 2, 3])[kind]], torch.eye(4)[torch.tensor([0, 1, 2, 3, 3, 3])[kind]]
    shares = torch.linspace(0, 1, 41).tolist()
    kernels = CosineKernel()(a), CosineKernel()(b)
    axes[0].plot(shares, [float(F.matrix_vendi_score(w * kernels[0] + (1 - w) * kernels[1])) for w in shares])
    best = max_entropy_mixture([a, b])
    axes[0].plot([float(best.weights[0])], [math.exp(best.entropy)], "o")
    axes[0].set(title="Mixture of two embeddings", xlabel="weight of the first", ylabel="Vendi score")
    values = [i / 50 for i in range(50)]
    axes[1].plot(values, [float(complete_kernel(chain(v), ~chain(v).isnan())[0, 2]) for v in values], label="entropy")
    axes[1].plot(values, [v * v for v in values], "--", label="determinant")
    axes[1].set(title="Missing entry of a chain", xlabel="observed a", ylabel="completed")
    axes[1].legend(frameon=False)
    scales = [0.3 + 0.05 * i for i in range(35)]
    axes[2].plot(scales, [fid_of_scale(s).average for s in scales], label="mean over clients")
    axes[2].plot(scales, [fid_of_scale(s).over_all for s in scales], label="all clients")
    axes[2].set(title="FID of N(0, s²), clients N(±1, 1)", xlabel="s", ylabel="FID")
    axes[2].legend(frameon=False)
    found = diversity_gap(0.8 * normal(600, 6), normal(600, 6), GaussianKernel(1.0))
    for curve, label in ((found.held_out_curve, "held out"), (found.generated_curve, "generated")):
        axes[3].plot(curve.x, curve.mean["Vendi"], "o-", markersize=3, label=label)
    axes[3].set(title="Diversity against n", xlabel="samples", ylabel="Vendi score", xscale="log")
    axes[3].legend(frameon=False)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=80)


def oracles() -> list[dict[str, Any]]:
    """The worst error of each system on cases of known answer, and the time of a case of the size given."""
    systems = (
        disagreement, directions, difference, product, mixture, completion, adapter, loss, clients, gap, candidates
    )  # fmt: skip
    return [dict(zip(("system", "oracle", "worst error", "cost"), (s.__name__, *s()), strict=True)) for s in systems]


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "oracles": oracles,
    "bounds": bounds,
    "fid": ranking_of_fid,
    "prompt_split": cost_of_prompt_split,
    "product": error_of_products,
    "koda": cost_of_directions,
    "false_findings": false_findings,
    "misses": misses,
    "candidates": effect_of_candidates,
}


def main() -> None:
    """Run the parts, print their tables, and draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name in args.only:
        rows = PARTS[name]()
        print(f"\n{name}\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print("|", " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), "|", flush=True)
        result = (json.loads(OUT.read_text(encoding="utf-8")) if OUT.exists() else {}) | {name: rows}
        OUT.write_text(json.dumps({k: result[k] for k in PARTS if k in result}, indent=1) + "\n", encoding="utf-8")
    if args.figure is not None:
        draw(args.figure)


if __name__ == "__main__":
    main()
