"""Cases of known answer of mixtures, completion, alignment, clients, diversity gaps and candidates: error and cost.

    python -m benchmarks.comparison_oracles [--figure docs/comparison-oracles.png]

Prints a row for each system: the oracle, the worst error over its cases, and the time of a case of the size given. The
figure shows four of the cases.
"""

import argparse
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.comparison import (
    ClientMessage,
    KernelAlignmentLoss,
    align_linear,
    complete_kernel,
    diversity_gap,
    entropy_projection,
    fid_over_clients,
    kid_over_clients,
    max_entropy_mixture,
    max_entropy_weights,
)
from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import CosineKernel, GaussianKernel

G = torch.Generator().manual_seed(0)
CHAINS = {0.1: 0.0050, 0.3: 0.0464, 0.5: 0.1374, 0.6: 0.2080, 0.8: 0.4393, 0.9: 0.6518}


def normal(*shape: int) -> Tensor:
    """Normal numbers in float64."""
    return torch.randn(*shape, generator=G, dtype=torch.float64)


def seconds(function: Callable[[], object]) -> float:
    """Time of one call, after one that is not counted."""
    function()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


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
    axes[2].plot(scales, [1 + (s - 1) ** 2 for s in scales], label="mean over clients")
    axes[2].plot(scales, [(s - math.sqrt(2)) ** 2 for s in scales], label="all clients")
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


def main() -> None:
    """Print the table, and draw the figure if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--figure")
    path = parser.parse_args().figure
    print("| system | oracle | worst error | cost |\n|---|---|---|---|")
    for system in (mixture, completion, adapter, loss, clients, gap, candidates):
        oracle, error, cost = system()
        print(f"| {system.__name__} | {oracle} | {error:.1e} | {cost} |", flush=True)
    if path is not None:
        draw(path)


if __name__ == "__main__":
    main()
