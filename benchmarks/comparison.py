"""Cost and error of comparisons: PromptSplit against n and r, products of embedders against l, KODA against n.

python benchmarks/comparison.py   # a minute on one core; writes benchmarks/results/comparison.json
"""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.comparison import koda, product_embedder, prompt_split, spec
from kspec_guidance.kernels import GaussianKernel, l2_normalize

OUT = Path(__file__).parent / "results" / "comparison.json"
REPEATS = 3


def seconds(call: Callable[[], Any]) -> float:
    """The shortest time of three calls."""
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        call()
        times.append(time.perf_counter() - began)
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


def cost_of_directions() -> list[dict[str, Any]]:
    """Seconds of three directions of KODA, and of SPEC, against n: exact Gaussian kernels, and features."""
    rows = []
    for n, features in ((150, None), (300, None), (600, None), (2400, 200), (9600, 200)):
        g = torch.Generator().manual_seed(0)
        group = torch.arange(n) % 6
        first, second = (l2_normalize(torch.randn(6, 32, generator=g)) for _ in range(2))
        a = l2_normalize(first[group] + 0.05 * torch.randn(n, 32, generator=g))
        b = l2_normalize(second[torch.tensor([0, 0, 2, 2, 4, 5])[group]] + 0.05 * torch.randn(n, 32, generator=g))
        kernel = GaussianKernel(0.5)
        options: dict[str, Any] = {"kernel_a": kernel, "kernel_b": kernel, "features": features}
        found = koda(a, b, eps=1.05 if features is None else n / 100, **options)
        rows.append(
            {
                "n": n,
                "features": features,
                "koda": seconds(lambda a=a, b=b, o=options, e=found.eps * n: koda(a, b, eps=e, **o)),
                "spec": seconds(lambda a=a, b=b, o=options: spec(a, b, **o)),
                "directions": len(found),
                "largest gap": float(found.gap.max()) if len(found) else None,
            }
        )
    return rows


def main() -> None:
    torch.set_num_threads(1)
    result = {"prompt_split": cost_of_prompt_split(), "product": error_of_products(), "koda": cost_of_directions()}
    OUT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    for name, rows in result.items():
        print(f"\n{name}\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
        for row in rows:
            print("|", " | ".join(f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()), "|")


if __name__ == "__main__":
    main()
