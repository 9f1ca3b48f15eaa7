"""A bed: cases, a pipeline to sample from, and a judge that knows the truth."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel

from ..methods import Method
from ..methods.selection import GroupInference

__all__ = ["Bed", "Case", "common_scores"]


@dataclass(frozen=True)
class Case:
    """One prompt with one seed."""

    prompt: str
    seed: int


def common_scores(rows: Tensor) -> dict[str, float]:
    """Vendi and RKE of unit-norm feature rows, Gaussian kernel of bandwidth 1: one yardstick for all methods."""
    unit = torch.nn.functional.normalize(rows.flatten(1).double(), dim=1)
    kernel = GaussianKernel(1.0)
    return {"vendi": float(F.vendi_score(unit, kernel)), "rke": float(F.rke_score(unit, kernel))}


class Bed:
    """Base class.

    ``diversity`` and ``fidelity`` name the two figures, among those that :meth:`judge` returns, that make the fronts; both
    grow with what they are named for.
    """

    name: ClassVar[str] = ""
    diversity: ClassVar[str] = "modes"
    fidelity: ClassVar[str] = "valid"
    images: int = 8
    steps: int = 20
    guidance_scale: float = 1.0
    has_features: ClassVar[bool] = True
    has_guidance: ClassVar[bool] = True
    pipe: Any

    def prompts(self, half: str) -> list[str]:
        """Prompts of ``"tune"`` or ``"report"``; the two are disjoint."""
        raise NotImplementedError

    def cases(self, half: str, seeds: int) -> list[Case]:
        base = 0 if half == "tune" else 10_000
        return [Case(p, base + s) for s in range(seeds) for p in self.prompts(half)]

    def fits(self, method: type[Method]) -> bool:
        """Whether the bed has what a method needs."""
        return (self.has_features or not method.needs_features) and (self.has_guidance or not method.needs_guidance)

    def noise(self, case: Case, n: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(case.seed * 1000 + k) for k in range(n)]

    def run(self, case: Case, n: int, latents: Tensor | None = None) -> Tensor:
        """Finished samples ``[n, ...]``."""
        more = {"generator": self.noise(case, n)} if latents is None else {"latents": latents}
        return self.pipe(
            case.prompt, num_images_per_prompt=n, num_inference_steps=self.steps, guidance_scale=self.guidance_scale, **more
        )

    def shape(self) -> tuple[int, ...]:
        return self.pipe.shape

    def sample(self, method: Method, case: Case) -> Tensor:
        """``images`` samples by a method; one that chooses among start noises gets as many as it asks for."""
        method.generator.manual_seed(case.seed)
        if hasattr(method, "radius_unit"):
            method.radius_unit = self.radius_unit()
        if isinstance(method, GroupInference):
            m = self.images * method.candidates
            start = torch.stack([torch.randn(self.shape(), generator=g) for g in self.noise(case, m)])
            chosen = method.choose(self.pipe, start, lambda x: self.run(case, m, x), self.images)
            return self.run(case, self.images, chosen)
        with method.attach(self.pipe):
            return self.run(case, self.images)

    _unit: float | None = None

    def radius_unit(self) -> float:
        """Median distance of plain samples of one prompt, of the tuning half."""
        if self._unit is None:
            found = []
            for prompt in self.prompts("tune")[:4]:
                rows = self.run(Case(prompt, 77), self.images).flatten(1)
                d = torch.cdist(rows, rows)
                found.append(float(d[~torch.eye(len(d), dtype=torch.bool)].median()))
            self._unit = sum(found) / len(found)
        return self._unit

    def judge(self, samples: Tensor, case: Case) -> dict[str, float]:
        raise NotImplementedError
