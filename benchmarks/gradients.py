"""Relative error of every closed-form gradient against autograd in float64.   python benchmarks/gradients.py"""

import torch

from kspec_guidance.kernels import (
    CosineKernel,
    GaussianKernel,
    LaplacianKernel,
    PolynomialKernel,
    RationalQuadraticKernel,
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
        "RKE": lambda k: RKE(k, unit=False),
        "conditional RKE": lambda k: ConditionalRKE(k, unit=False, prompt_kernel=prompt),
        "novelty": lambda k: Novelty(k, unit=False, reference=reference),
        "MMD": lambda k: MMD(reference, k),
        "Vendi, order 1": lambda k: Vendi(k, unit=False),
        "Vendi, order inf": lambda k: Vendi(k, order=float("inf"), unit=False),
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
            error = (objective.gradient(x, t, bank) - expected).norm() / expected.norm()
            cells.append(f"{float(error):.1e}")
        print(f"{name:18}" + "".join(f"{c:>20}" for c in cells))


if __name__ == "__main__":
    main()
