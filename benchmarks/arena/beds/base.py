"""Bed: cases, a pipeline to sample from, and a judge of the samples."""

from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from typing import Any, ClassVar

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.bench.methods import Method
from kspec_guidance.kernels import CosineKernel, GaussianKernel

__all__ = ["BLOCK_SEEDS", "Bed", "Case", "blocks", "common_scores"]

CALL_SEEDS = 100_000  # between the seeds of two calls of one case
BLOCK_SEEDS = 5  # seeds of one prompt whose samples are compared with the truth together


@dataclass(frozen=True)
class Case:
    """One prompt with one seed."""

    prompt: str
    seed: int


def blocks(prompts: list[str]) -> list[list[int]]:
    """Indices of the cases of each block: ``BLOCK_SEEDS`` successive seeds of one prompt, all prompts of a block together.

    Seeds that are left over join the last block.

    >>> blocks(["a", "b"] * 10)[:2]
    [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]
    """
    of = {p: [k for k, q in enumerate(prompts) if q == p] for p in dict.fromkeys(prompts)}
    number = max(1, min(map(len, of.values())) // BLOCK_SEEDS)
    ends = [*range(0, number * BLOCK_SEEDS, BLOCK_SEEDS), None]
    return [mine[a:b] for a, b in pairwise(ends) for mine in of.values()]


def common_scores(rows: Tensor) -> dict[str, float]:
    """Vendi and RKE of unit-norm feature rows, Gaussian kernel of bandwidth 1; the same for all methods."""
    unit = torch.nn.functional.normalize(rows.flatten(1).double(), dim=1)
    kernel = GaussianKernel(1.0)
    return {"vendi": float(F.vendi_score(unit, kernel)), "rke": float(F.rke_score(unit, kernel))}


class Bed:
    """Base class.

    ``diversity`` and ``fidelity`` name the two figures of :meth:`judge` that make the fronts; higher is better for both.
    """

    name: ClassVar[str] = ""
    diversity: ClassVar[str] = "modes"
    fidelity: ClassVar[str] = "valid"
    images: int = 8
    steps: int = 20
    guidance_scale: float = 1.0
    fresh: bool = False  # report on prompts on which nothing was chosen, where a bed has such
    swapped: bool = False  # tune on the prompts of the report, and report on those of tuning
    calls: int = 1  # of the pipeline for a case, with one method that may remember the samples of the last ones
    has: ClassVar[frozenset[str]] = frozenset({"features", "guidance", "images", "prompts"})
    pipe: Any
    workers: Any = None  # processes that measure cases in place of this one

    def prompts(self, half: str) -> list[str]:
        """Prompts of ``"tune"`` or ``"report"``; the two are disjoint."""
        raise NotImplementedError

    def prompts_for(self, half: str) -> list[str]:
        """Prompts of one half, or of the other if the halves are swapped."""
        other = {"tune": "report", "report": "tune"}
        return self.prompts(other[half] if self.swapped else half)

    def cases(self, half: str, seeds: int) -> list[Case]:
        base = 0 if half == "tune" else 10_000
        return [Case(p, base + s) for s in range(seeds) for p in self.prompts_for(half)]

    def fits(self, method: type[Method]) -> bool:
        """Whether the bed has everything that a method needs."""
        return method.needs <= self.has

    def noise(self, case: Case, n: int) -> list[torch.Generator]:
        return [torch.Generator().manual_seed(case.seed * 1000 + k) for k in range(n)]

    def run(self, case: Case, n: int, latents: Tensor | None = None) -> Tensor:
        """Finished samples ``[n, ...]``."""
        start = {"generator": self.noise(case, n)} if latents is None else {"latents": latents}
        return self.pipe(
            case.prompt,
            num_images_per_prompt=n,
            num_inference_steps=self.steps,
            guidance_scale=self.guidance_scale,
            **start,
        )

    def shape(self) -> tuple[int, ...]:
        return self.pipe.shape

    def start(self, case: Case, n: int) -> Tensor:
        """Start noises ``[n, ...]``, as in :meth:`run`."""
        return torch.stack([torch.randn(self.shape(), generator=g) for g in self.noise(case, n)])

    def sample(self, method: Method, case: Case) -> Tensor:
        if self.calls > 1:
            method.remember()
        return self.joined([self._call(method, replace(case, seed=case.seed + CALL_SEEDS * k)) for k in range(self.calls)])

    def _call(self, method: Method, case: Case) -> Tensor:
        method.generator.manual_seed(case.seed)
        return method.sample(self, case)

    def joined(self, parts: list[Tensor]) -> Tensor:
        """Samples of several runs as those of one."""
        return torch.cat(parts)

    _unit: float | None = None

    def radius_unit(self) -> float:
        """Median distance of plain samples of one prompt, of the tuning half; as many as in a usual call."""
        if self._unit is None:
            found, n = [], max(self.images, type(self).images)
            for prompt in self.prompts_for("tune")[:4]:
                rows = self.run(Case(prompt, 77), n).flatten(1)
                d = torch.cdist(rows, rows)
                found.append(float(d[~torch.eye(len(d), dtype=torch.bool)].median()))
            self._unit = sum(found) / len(found)
        return self._unit

    def rows(self, samples: Tensor) -> Tensor:
        """Feature rows ``[n, d]`` of finished samples, which are judged."""
        raise NotImplementedError

    def figures(self, rows: Tensor, case: Case) -> dict[str, float]:
        """The judge's figures of one case's feature rows."""
        raise NotImplementedError

    def truth(self, prompt: str) -> Tensor:
        """Feature rows ``[m, d]`` of true samples of a prompt."""
        raise NotImplementedError

    def distances(self, rows: list[Tensor], cases: list[Case]) -> list[dict[str, float]]:
        """How far each of the :func:`blocks` of cases is from the truth of its prompt.

        Precision, recall, coverage, Frechet distance, and the unbiased squared MMD with a Gaussian kernel at the median
        distance of the truth.
        """
        found = []
        for block in blocks([c.prompt for c in cases]):
            x, y = torch.cat([rows[k] for k in block]).double(), self.truth(cases[block[0]].prompt).double()
            scores = asdict(F.fidelity_scores(x, y))
            found.append(scores | {"mmd": float(F.mmd(x, y, GaussianKernel().fit(y)))})
        return found

    def judge(self, samples: Tensor, case: Case) -> dict[str, float]:
        """All figures of one case's samples."""
        return self.figures(self.rows(samples), case)

    def pooled(self, rows: list[Tensor], cases: list[Case]) -> dict[str, float]:
        """Scores that need many samples, of the rows of all cases together.

        Conditional RKE and Scendi of unit-norm rows and one-hot prompts; precision, recall, coverage and Frechet distance
        to true samples, prompt by prompt, averaged.
        """
        prompts = list(dict.fromkeys(c.prompt for c in cases))
        which = torch.tensor([prompts.index(c.prompt) for c, r in zip(cases, rows, strict=True) for _ in r])
        x = torch.cat(rows).double()
        unit, t = torch.nn.functional.normalize(x, dim=1), torch.nn.functional.one_hot(which).double()
        found = [F.fidelity_scores(x[which == k], self.truth(p).double()) for k, p in enumerate(prompts)]
        names = ("precision", "recall", "coverage", "frechet_distance")
        return {
            "conditional_rke": float(F.conditional_rke_score(unit, t, GaussianKernel(1.0), CosineKernel())),
            "scendi": float(F.scendi_score(unit, t)),
            **{n: sum(getattr(f, n) for f in found) / len(found) for n in names},
        }
