"""Relative error of every closed-form gradient against autograd in float64.

python benchmarks/gradients.py
"""

import torch

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import (
    CosineKernel,
    GaussianKernel,
    LaplacianKernel,
    PolynomialKernel,
    RationalQuadraticKernel,
    median_bandwidth,
)
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import MMD, RKE, ConditionalRKE, Novelty, Vendi


def main() -> None:
    g = torch.Generator().manual_seed(0)
    rows = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    d = 64
    x, t, reference = rows(16, d), rows(16, 8), rows(100, d)
    bank = MemoryBank()
    bank.add(rows(200, d), rows(200, 8))
    prompt = GaussianKernel(3.0)
    objectives = {
        "RKE": lambda k: RKE(k, normalize=False),
        "conditional RKE": lambda k: ConditionalRKE(k, normalize=False, prompt_kernel=prompt),
        "novelty": lambda k: Novelty(k, normalize=False, reference=reference),
        "MMD": lambda k: MMD(reference, k),
        "Vendi, order 1": lambda k: Vendi(k, normalize=False),
        "Vendi, order inf": lambda k: Vendi(k, order=float("inf"), normalize=False),
    }
    kernels = {
        "Gaussian": GaussianKernel(8.0), "cosine": CosineKernel(), "polynomial": PolynomialKernel(),
        "rational quadratic": RationalQuadraticKernel(8.0), "Laplacian": LaplacianKernel(60.0),
    }  # fmt: skip
    print(f"{'':18}" + "".join(f"{k:>20}" for k in kernels))
    for name, make in objectives.items():
        cells = []
        for kernel in kernels.values():
            if name.startswith("Vendi") and isinstance(kernel, PolynomialKernel):
                cells.append("-")
                continue
            objective, z = make(kernel), x.clone().requires_grad_()
            (expected,) = torch.autograd.grad(objective.value(z, t, bank), z)
            error = (objective.gradient(x, t, bank).rows - expected).norm() / expected.norm()
            cells.append(f"{float(error):.1e}")
        print(f"{name:18}" + "".join(f"{c:>20}" for c in cells))


def by_random_features(dim: int = 256, count: int = 2048) -> None:
    """Cosine of the random-feature gradient with the exact one, for a memory of 2,000 clustered unit vectors."""
    g = torch.Generator().manual_seed(0)
    centres = torch.randn(50, dim, generator=g)
    rows = centres[torch.randint(50, (2016,), generator=g)] + 0.7 * torch.randn(2016, dim, generator=g)
    rows = rows / rows.norm(dim=1, keepdim=True)
    x, old = rows[:16], rows[16:]
    median = median_bandwidth(rows)
    for factor in (0.4, 1.0, 1.3, 2.0):  # of the squared kernel's bandwidth, in median distances
        kernel = GaussianKernel(factor * median * 2**0.5)
        exact, coarse = RKE(kernel), RKE(kernel, RandomFourierFeatures(kernel, dim, count))
        banks = [o.make_memory() for o in (exact, coarse)]
        for bank in banks:
            bank.add(old)
        a, b = (o.gradient(x, None, m).rows.flatten() for o, m in zip((exact, coarse), banks, strict=True))
        print(f"{count} features, {dim} dim., {factor} medians: cosine {float(torch.cosine_similarity(a, b, dim=0)):.2f}")


if __name__ == "__main__":
    main()
    by_random_features()
