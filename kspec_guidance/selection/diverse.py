"""DAKUCB: for each prompt a generator, or a mixture, whose samples are good and differ from those of similar prompts."""

from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, Kernel
from kspec_guidance.kernels.settings import kernel_from_json, kernel_to_json
from kspec_guidance.selection.base import check_choice, check_number, check_row
from kspec_guidance.selection.contextual import PAKUCB
from kspec_guidance.selection.quadratic import minimise_quadratic

__all__ = ["DAKUCB"]


class DAKUCB(PAKUCB):
    """DAK-UCB: reward and diversity by context (arXiv 2603.23140).

    The label of a sample ``(t, x)`` of arm g toward arm m is its mean likeness to the samples ``(t', x')`` of m,
    ``k_T(t, t')^2 k_X(x, x')^2`` for ``jrke`` (the inverse joint RKE score), without itself if m is g. Kernel ridge
    regressions of the labels on t give ``D_gm(t)``, those of the rewards ``s_g(t)``. The arm is
    ``argmax s + exploration sigma - diversity (D_gg - exploration sigma)``; with ``mixture`` it is drawn from the weights
    that maximise ``w'(s + exploration sigma) - diversity w'(D - exploration diag sigma)w``, with ``D`` symmetric and its
    negative eigenvalues set to 0.

    ``jkd``: likeness is ``k_T(t, t') [k(x, x') + k(y, y') - k(x, y') - k(y, x')]``, with ``y`` the reference output of a
    prompt, so that ``w'Dw`` is the squared MMD of pairs (prompt, output) to those of the references; give them as
    ``tell(..., reference=)``.

    Labels are kept up to date by one kernel row for each new sample.

    Args:
        arms, seed, kwargs: see :class:`PAKUCB`; ``kernel`` is that of contexts.
        start: samples of each arm first.
        objective: ``jrke`` or ``jkd``.
        sample_kernel: of samples; cosine by default.
        diversity: weight of the likeness; 0 is PAK-UCB.
        mixture: draw from weights.

    Raises:
        ValueError: for arguments out of range.
    """

    needs = ("features", "reward", "context")

    def __init__(
        self,
        arms: int,
        seed: int = 0,
        *,
        start: int = 2,
        objective: str = "jrke",
        sample_kernel: Kernel | None = None,
        diversity: float = 1.0,
        mixture: bool = False,
        **kwargs: Any,
    ):
        super().__init__(arms, seed, start=start, **kwargs)
        self.objective = check_choice(objective, "objective", ("jrke", "jkd"))
        self.sample_kernel = CosineKernel() if sample_kernel is None else sample_kernel
        if self.sample_kernel.open:
            raise ValueError(f"{self.sample_kernel!r} needs a bandwidth; pass for example kernel.fit(features)")
        self.diversity, self.mixture = check_number(diversity, "diversity"), bool(mixture)
        self.samples: list[list[Tensor | None]] = [[] for _ in range(arms)]  # None for a pull without a sample
        self.references: list[list[Tensor | None]] = [[] for _ in range(arms)]
        self.likeness: list[list[Tensor]] = [[torch.zeros(0, dtype=torch.float64)] * arms for _ in range(arms)]
        self._reference: Tensor | None = None

    def tell(  # type: ignore[override]
        self,
        arm: int,
        features: Any = None,
        reward: Any = None,
        context: Any = None,
        cost: Any = None,
        kept: bool = True,
        reference: Any = None,
    ) -> None:
        """As :meth:`Selector.tell`, with the reference output ``[d]`` of the prompt for ``jkd``."""
        if (reference is not None) != (self.objective == "jkd" and kept):
            raise ValueError(
                "objective 'jkd' compares with the reference output of the prompt; call tell(arm, reference=...)"
                if reference is None
                else "reference is for samples of objective 'jkd' only"
            )
        width = self.widths.get("features")
        if reference is not None and width is None and features is not None:
            width = check_row(features, "features", None).shape[0]
        self._reference = None if reference is None else check_row(reference, "reference", width)
        super().tell(arm, features, reward, context, cost, kept)

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        return x

    def _learn(self, arm: int, x: Tensor | None, reward: float | None, context: Tensor | None, kept: bool) -> None:
        super()._learn(arm, x, reward, context, kept)
        assert context is not None
        self._add(arm, x, self._reference, context)

    def _alike(self, x: Tensor, y: Tensor | None, t: Tensor, arm: int) -> Tensor:
        """Likeness of a sample to each of an arm's ``[n]``; 0 for pulls without a sample."""
        found = torch.zeros(len(self.samples[arm]), dtype=torch.float64)
        kept = [k for k, other in enumerate(self.samples[arm]) if other is not None]
        if not kept:
            return found
        rows = torch.stack([self.samples[arm][k] for k in kept])  # type: ignore[misc]
        prompts = self.kernel.normalised(t[None], self.told_rows[arm].x[kept])[0]
        k = self.sample_kernel
        if self.objective == "jrke":
            found[kept] = (prompts * k.normalised(x[None], rows)[0]).square()
        else:
            others = torch.stack([self.references[arm][k] for k in kept])  # type: ignore[misc]
            assert y is not None
            found[kept] = prompts * (k(x[None], rows) + k(y[None], others) - k(x[None], others) - k(y[None], rows))[0]
        return found

    def _add(self, arm: int, x: Tensor | None, y: Tensor | None, t: Tensor) -> None:
        """Add a sample to the labels of all others, and its own labels."""
        zero = torch.zeros(1, dtype=torch.float64)
        own = []
        for g in range(self.arms):
            rows = len(self.samples[g])
            told = self._alike(x, y, t, g) if x is not None else torch.zeros(rows, dtype=torch.float64)
            self.likeness[g][arm] = self.likeness[g][arm] + told  # of arm g's samples toward this arm
            own.append(told.sum())
        for m in range(self.arms):
            self.likeness[arm][m] = torch.cat([self.likeness[arm][m], zero + own[m]])
        self.samples[arm].append(x)
        self.references[arm].append(y)

    def _labels(self, g: int, m: int) -> Tensor:
        """Mean likeness of arm g's samples toward arm m ``[n_g]``, itself left out."""
        n = float(self.kept[m]) - (1.0 if g == m else 0.0)
        return self.likeness[g][m] / max(n, 1.0)

    def likeness_at(self, context: Any) -> Tensor:
        """Estimated likeness ``D`` ``[arms, arms]`` at a context ``[p]``, symmetric; 0 for arms without samples."""
        row, found = self._row(context), torch.zeros(self.arms, self.arms, dtype=torch.float64)
        for g in range(self.arms):
            if not len(self.told_rows[g]):
                continue
            labels = torch.stack([self._labels(g, m) for m in range(self.arms)], dim=1)
            found[g] = self.told_rows[g].predict(row, self.told_rows[g].weights(labels))
        return (found + found.mT) / 2

    def weights(self, context: Any) -> Tensor:
        """Weights of the arms ``[arms]`` at a context ``[p]``; one of them is 1 without ``mixture``."""
        s, bonus = self._optimistic(context)
        d = self.likeness_at(context)
        if not self.diversity:
            d = torch.zeros_like(d)
        if self.mixture:
            return minimise_quadratic(self.diversity * (d - torch.diag(bonus)), s)
        found = torch.zeros(self.arms, dtype=torch.float64)
        found[self._best(s - self.diversity * (d.diagonal() - bonus))] = 1.0
        return found

    def _pick(self, row: Tensor) -> int | None:
        w = self.weights(row)
        return self._pull(self._systematic(w, 1)[0] if self.mixture else int(w.argmax()))

    def _grow(self) -> None:
        super()._grow()
        for g, row in enumerate(self.likeness):
            row.append(torch.zeros(len(self.samples[g]), dtype=torch.float64))
        self.likeness.append([torch.zeros(0, dtype=torch.float64)] * self.arms)
        self.samples.append([])
        self.references.append([])

    def _merge(self, other: "DAKUCB") -> None:  # type: ignore[override]
        super()._merge(other)
        for arm in range(self.arms):
            for x, y, t in zip(other.samples[arm], other.references[arm], other.told_rows[arm].x, strict=True):
                self._add(arm, x, y, t)

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "objective": self.objective,
            "sample_kernel": kernel_to_json(self.sample_kernel),
            "diversity": self.diversity,
            "mixture": self.mixture,
        }

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> Any:
        return super()._from_settings({**settings, "sample_kernel": kernel_from_json(settings["sample_kernel"])})

    def _arrays(self) -> dict[str, Any]:
        more = {"samples": self.samples, "references": self.references, "likeness": self.likeness}
        return {**super()._arrays(), **more}

    def _restore(self, arrays: dict[str, Any]) -> None:
        super()._restore(arrays)
        self.samples, self.references = arrays["samples"], arrays["references"]
        self.likeness = arrays["likeness"]
