"""One step of our implementations against the authors' code, where that runs without their models.

    python -m benchmarks.arena.authors --peers FOLDER

FOLDER holds checkouts of particle-guidance (gcorso), ComfyUI-CADS (asagi4), Contextualized-Vendi-Score-Guidance
(facebookresearch) and sparke-diffusers (mjalali). Their code is inside pipelines and nodes that need old forks, weights or
a user interface, so the statements of the step are extracted from their files through the syntax tree and executed
unchanged, on random data.
"""

import argparse
import ast
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch

from kspec_guidance import functional as F
from kspec_guidance.bench.methods import CADS
from kspec_guidance.bench.methods.base import repulsion
from kspec_guidance.kernels import CosineKernel
from kspec_guidance.memory import MemoryBank
from kspec_guidance.objectives import ConditionalRKE, base

PARTICLE = "stable_diffusion/diffusers/pipelines/stable_diffusion/pipeline_stable_diffusion_particle.py"


def statements(tree: ast.AST, wanted: Any) -> list[ast.stmt]:
    """The first non-empty list of statements that ``wanted(node)`` returns for a node of the tree."""
    return next(found for node in ast.walk(tree) if (found := wanted(node)))


def run(body: list[ast.stmt], names: dict[str, Any]) -> dict[str, Any]:
    exec(compile(ast.Module(body, []), "theirs", "exec"), names)  # from a checkout that the user named
    return names


def particle(folder: Path) -> float:
    """Largest relative difference of the repulsion, their ``coeff sigma`` taken out."""
    tree = ast.parse((folder / PARTICLE).read_text())
    body = statements(tree, lambda n: isinstance(n, ast.If) and getattr(n.test, "id", "") == "svgd" and n.orelse)
    x = torch.randn(6, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    theirs = run(body, {"latents": x, "sigma": 2.0, "coeff": 3.0, "power": 2, "np": np, "torch": torch})["grad_phi"] / 6
    return float((theirs - repulsion(x)).abs().max() / theirs.abs().max())


def cads(folder: Path) -> float:
    """Largest difference of the noised condition of one prompt, at several points of the schedule and three mixings."""
    tree, worst = ast.parse((folder / "__init__.py").read_text()), 0.0
    body = statements(tree, lambda n: isinstance(n, ast.FunctionDef) and n.name == "cads_noise" and [n])
    y, noise = (torch.randn(1, 7, 16, generator=torch.Generator().manual_seed(k)) for k in (1, 2))
    for t in (0.65, 0.8, 0.95):
        for psi in (0.0, 0.5, 1.0):
            ours = CADS(s=0.25, tau1=0.6, tau2=0.9, psi=psi)
            ours.noise_like = lambda x: noise  # type: ignore[method-assign]
            names = {"sqrt": math.sqrt, "noise_scale": 0.25, "rescale": psi, "generator": None, "noise_type": "normal",
                     "generate_noise": lambda *a, **k: noise}  # fmt: skip
            theirs = run(body, names)["cads_noise"](max(0.0, (0.9 - t) / 0.3), y)
            worst = max(worst, float((theirs - ours.condition(y, 1 - t)).abs().max()))
    return worst


def vendi(folder: Path) -> float:
    """Relative difference of the score whose gradient c-VSG ascends."""
    tree = ast.parse((folder / "criteria_guided_sampling.py").read_text())
    body = statements(tree, lambda n: isinstance(n, ast.FunctionDef) and n.name == "get_rank" and [n])
    x = torch.nn.functional.normalize(torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    theirs = float(run(body, {"torch": torch})["get_rank"](None, x @ x.T / len(x)))
    return abs(theirs / float(F.vendi_score(x, CosineKernel())) - 1)


def sparke(folder: Path) -> float:
    """Largest difference of the unit direction in which conditional RKE rises, one image against a memory of 30.

    Their Gaussian form lacks the square of order 2, so the cosine kernel is compared. All rows of the memory are read;
    by default ours leaves out rows that weigh less than a thousandth together.
    """
    base.TOLERANCE = 0.0
    tree = ast.parse((folder / "src/diffusers/pipelines/rke_guidance_utils.py").read_text())
    body = statements(tree, lambda n: isinstance(n, ast.FunctionDef) and n.name == "get_rank" and [n])
    rows = torch.randn(31, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    prompts = torch.nn.functional.normalize(
        torch.randn(31, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
    )
    x = rows[-1:].clone().requires_grad_()
    theirs = run(body, {"torch": torch, "F": torch.nn.functional})["get_rank"]
    me = type("", (), {"algorithm": "cond-rke"})()
    rank = theirs(me, torch.eye(31), feature_m=torch.cat([rows[:-1], x]), feature_t=prompts)
    (g,) = torch.autograd.grad(rank, x)
    bank = MemoryBank()
    bank.add(rows[:-1], prompts[:-1])
    ours = (
        ConditionalRKE(CosineKernel(), normalize=False, prompt_kernel=CosineKernel())
        .gradient(rows[-1:], prompts[-1:], bank)
        .rows
    )
    return float((g / g.norm() - ours / ours.norm()).abs().max())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peers", type=Path, required=True)
    peers = parser.parse_args().peers
    parts = {"particle-guidance": particle, "ComfyUI-CADS": cads, "Contextualized-Vendi-Score-Guidance": vendi,
             "sparke-diffusers": sparke}  # fmt: skip
    for name, compare in parts.items():
        folder = peers / name
        print(f"{name:40}" + (f"largest difference {compare(folder):.1e}" if folder.is_dir() else "not found"))


if __name__ == "__main__":
    main()
