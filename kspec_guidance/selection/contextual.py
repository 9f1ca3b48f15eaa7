"""PAKUCB, RFFUCB: for each prompt the generator of the largest expected reward, by kernel ridge regressions."""

import math
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel
from kspec_guidance.kernels.settings import kernel_from_json, kernel_to_json
from kspec_guidance.metrics.base import StreamMap
from kspec_guidance.selection.base import Selector, check_number

__all__ = ["Contextual", "GrownFactor", "PAKUCB", "RFFUCB", "random_features"]

KERNEL = GaussianKernel(0.5)  # of contexts; embeddings of norm 1 are at most 2 apart


def random_features(kernel: Kernel, num_features: int) -> StreamMap:
    """The map of contexts of any width ``[n, p]`` to random features ``[n, num_features]``.

    Raises:
        ValueError: for a kernel that is not Gaussian or Laplacian with a bandwidth.
    """
    if isinstance(kernel, CosineKernel):
        raise ValueError(f"random features support GaussianKernel and LaplacianKernel, got {kernel!r}")
    return StreamMap(kernel, num_features, 0)


class GrownFactor:
    """Cholesky factor of ``K + a I`` for a growing list of rows, one row at a time."""

    def __init__(self, kernel: Kernel, ridge: float):
        self.kernel, self.ridge = kernel, ridge
        self.x = torch.zeros(0, 0, dtype=torch.float64)
        self.factor = torch.zeros(0, 0, dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.factor)

    def copy(self) -> "GrownFactor":
        """A copy that grows on its own."""
        found = GrownFactor(self.kernel, self.ridge)
        found.x, found.factor = self.x, self.factor
        return found

    def solve_lower(self, rows: Tensor) -> Tensor:
        """``L^-1 k(x, rows)`` ``[n, m]``."""
        return torch.linalg.solve_triangular(self.factor, self.kernel(self.x, rows), upper=False)

    def append(self, row: Tensor) -> None:
        """One more row ``[p]``."""
        n, own = len(self), float(self.kernel.diagonal(row[None])[0]) + self.ridge
        grown = torch.zeros(n + 1, n + 1, dtype=torch.float64)
        grown[:n, :n] = self.factor
        if n:
            column = self.solve_lower(row[None])[:, 0]
            grown[n, :n] = column
            own -= float(column @ column)
        grown[n, n] = math.sqrt(max(own, 1e-12))
        self.x = torch.cat([self.x, row[None]]) if n else row[None]
        self.factor = grown

    def variance(self, row: Tensor) -> float:
        """``k(t, t) - k'(K + a I)^-1 k`` at a row ``[p]``."""
        found = float(self.kernel.diagonal(row[None])[0])
        if len(self):
            found -= float(self.solve_lower(row[None]).square().sum())
        return max(found, 0.0)

    def weights(self, labels: Tensor) -> Tensor:
        """``(K + a I)^-1 y`` for labels ``[n, ...]``."""
        y = labels if labels.ndim == 2 else labels[:, None]
        found = torch.cholesky_solve(y, self.factor)
        return found if labels.ndim == 2 else found[:, 0]

    def predict(self, row: Tensor, weights: Tensor) -> Tensor:
        """``k' (K + a I)^-1 y`` at a row ``[p]``."""
        return self.kernel(row[None], self.x)[0] @ weights


class Contextual(Selector):
    """Base class of the methods that choose by context, one pull after another, with pending pulls kept by context."""

    needs: tuple[str, ...] = ("reward", "context")

    def __init__(
        self,
        arms: int,
        seed: int,
        *,
        kernel: Kernel | None,
        exploration: float | None,
        cost_weight: float,
        ridge: float = 1.0,
        **kwargs: Any,
    ):
        super().__init__(arms, seed, **kwargs)
        self.kernel = kernel
        self.ridge = check_number(ridge, "ridge", above=True)
        self.exploration = None if exploration is None else check_number(exploration, "exploration")
        self.cost_weight = check_number(cost_weight, "cost_weight")
        self.waiting: list[list[Tensor]] = [[] for _ in range(arms)]  # contexts of pending pulls

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[Any]:
        found: list[int | None] = []
        for row in contexts or []:
            forced = self._forced(1)
            arm = forced[0] if forced else self._pick(row)
            if arm is not None:
                self._wait(arm, row)
            found.append(arm)
        return found

    def _pick(self, row: Tensor) -> int | None:
        """The arm of a pull with this context, which is then pending; None for none."""
        raise NotImplementedError

    def _wait(self, arm: int, row: Tensor) -> None:
        self.waiting[arm].append(row)
        self._changed(arm)

    def _set_waiting(self, arms: list[int], contexts: list[Tensor]) -> None:
        waiting: list[list[Tensor]] = [[] for _ in range(self.arms)]
        for arm, row in zip(arms, contexts, strict=True):
            waiting[arm].append(row)
        for arm, (old, new) in enumerate(zip(self.waiting, waiting, strict=True)):
            if len(old) != len(new) or not all(map(torch.equal, old, new)):
                self.waiting[arm] = new
                self._changed(arm)

    def _learn(self, arm: int, x: Tensor | None, reward: float | None, context: Tensor | None, kept: bool) -> None:
        assert reward is not None
        assert context is not None
        waiting = self.waiting[arm]
        if waiting:  # the pending pull of this context, or the oldest one
            same = [k for k, other in enumerate(waiting) if torch.equal(other, context)]
            waiting.pop(same[0] if same else 0)
        self._record(arm, reward, context)
        self._changed(arm)

    def _record(self, arm: int, reward: float, context: Tensor) -> None:
        """Learn the reward of a pull."""
        raise NotImplementedError

    def _changed(self, arm: int) -> None:
        """Forget what was computed from the pulls of an arm."""

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        return None

    def _row(self, context: Any) -> Tensor:
        """One context ``[p]``, checked."""
        (row,) = self._contexts(1, context) or []
        return row

    def _grow(self) -> None:
        self.waiting.append([])

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "kernel": kernel_to_json(self.kernel),
            "ridge": self.ridge,
            "exploration": self.exploration,
            "cost_weight": self.cost_weight,
        }

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> Any:
        return super()._from_settings({**settings, "kernel": kernel_from_json(settings["kernel"])})


class _KernelUCB(Contextual):
    """Pull the arm of the largest ``mu(t) + exploration sigma(t) - cost_weight cost`` at the context t."""

    def __init__(
        self,
        arms: int,
        seed: int = 0,
        *,
        kernel: Kernel | None = None,
        exploration: float | None = 0.5,
        delta: float = 0.05,
        cost_weight: float = 0.0,
        centred: bool = True,
        **kwargs: Any,
    ):
        kernel = KERNEL if kernel is None else kernel
        if kernel.open:
            raise ValueError(f"{kernel!r} needs a bandwidth; pass for example kernel.fit(contexts)")
        super().__init__(arms, seed, kernel=kernel, exploration=exploration, cost_weight=cost_weight, **kwargs)
        self.kernel: Kernel
        self.delta, self.centred = check_number(delta, "delta", above=True), bool(centred)

    @property
    def beta(self) -> float:
        """The factor of the standard deviation: ``exploration``, or ``(2 log(2 arms / delta))^(1/2)``."""
        if self.exploration is not None:
            return self.exploration
        return math.sqrt(max(0.0, 2 * math.log(2 * self.arms / self.delta)))

    def predict(self, context: Any) -> tuple[Tensor, Tensor]:
        """Expected reward and its standard deviation (in units of the noise) of each arm ``[arms]`` at a context."""
        row = self._row(context)
        found = [self._predict(i, row) for i in range(self.arms)]
        return torch.tensor([m for m, _ in found]).double(), torch.tensor([s for _, s in found]).double()

    def _prior(self) -> float:
        """The mean reward of all arms: what is expected where an arm was not tried."""
        return float(self.reward_sum.sum() / self.told.sum().clamp_min(1)) if self.centred else 0.0

    def _predict(self, arm: int, row: Tensor) -> tuple[float, float]:
        raise NotImplementedError

    def _optimistic(self, context: Any) -> tuple[Tensor, Tensor]:
        """``mu + exploration sigma - cost_weight cost`` and ``exploration sigma`` of each arm ``[arms]`` at a context."""
        mean, deviation = self.predict(context)
        bonus = self.beta * deviation
        values = mean + bonus
        return (values - self.cost_weight * self.costs() if self.cost_weight else values), bonus

    def _pick(self, row: Tensor) -> int | None:
        return self._pull(self._best(self._optimistic(row)[0]))

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "delta": self.delta, "centred": self.centred}


class PAKUCB(_KernelUCB):
    """PAK-UCB: a kernel ridge regression of the reward on the context for each arm (arXiv 2410.13287).

    ``mu = k(t)'(K + a I)^-1 y`` and ``sigma = a^(-1/2) (k(t, t) - k(t)'(K + a I)^-1 k(t))^(1/2)``; pull the arm of the
    largest ``mu + exploration sigma``. Pending pulls count in ``sigma``. The time of a choice grows with the square of
    an arm's pulls; that of :class:`RFFUCB` is constant.

    Args:
        arms: their number.
        seed: of ties.
        kernel: of contexts; Gaussian of bandwidth 0.5 by default, for embeddings of norm 1.
        ridge: a.
        exploration: factor of ``sigma``, in units of the reward; None for ``(2 log(2 arms / delta))^(1/2)``, which is the
            bound of the paper for noise of size 1.
        delta: probability that a bound is wrong.
        cost_weight: what a unit of cost takes from the reward.
        costs: known costs of the arms.
        start: samples of each arm first.
        centred: expect the mean reward of all arms where an arm was not tried; False expects 0, as the paper.

    Raises:
        ValueError: for arguments out of range, or a kernel without a bandwidth.
    """

    def __init__(self, arms: int, seed: int = 0, **kwargs: Any):
        super().__init__(arms, seed, **kwargs)
        self.told_rows = [GrownFactor(self.kernel, self.ridge) for _ in range(arms)]
        self.rewards: list[list[float]] = [[] for _ in range(arms)]
        self._weights: dict[int, Tensor] = {}
        self._with_pending: dict[int, GrownFactor] = {}

    def _predict(self, arm: int, row: Tensor) -> tuple[float, float]:
        rows, mean = self.told_rows[arm], self._prior()
        if len(rows):
            if arm not in self._weights:
                y = torch.tensor(self.rewards[arm], dtype=torch.float64)
                self._weights[arm] = rows.weights(torch.stack([y, torch.ones_like(y)], dim=1))
            reward, one = rows.predict(row, self._weights[arm]).tolist()
            mean = reward + (1 - one) * mean
        return mean, math.sqrt(self._pending_factor(arm).variance(row) / self.ridge)

    def _pending_factor(self, arm: int) -> GrownFactor:
        """The factor of the rows told and pending: the variance does not depend on rewards."""
        if arm not in self._with_pending:
            grown = self.told_rows[arm].copy()
            for row in self.waiting[arm]:
                grown.append(row)
            self._with_pending[arm] = grown
        return self._with_pending[arm]

    def _record(self, arm: int, reward: float, context: Tensor) -> None:
        self.told_rows[arm].append(context)
        self.rewards[arm].append(reward)
        self._weights.pop(arm, None)

    def _changed(self, arm: int) -> None:
        self._with_pending.pop(arm, None)

    def _grow(self) -> None:
        super()._grow()
        self.told_rows.append(GrownFactor(self.kernel, self.ridge))
        self.rewards.append([])

    def _merge(self, other: "PAKUCB") -> None:
        for arm in range(self.arms):
            for row, reward in zip(other.told_rows[arm].x, other.rewards[arm], strict=True):
                self._record(arm, reward, row)
        self._with_pending.clear()

    def _arrays(self) -> dict[str, Any]:
        return {"contexts": [f.x for f in self.told_rows], "rewards": self.rewards, "waiting": self.waiting}

    def _restore(self, arrays: dict[str, Any]) -> None:
        self.waiting, self.rewards = arrays["waiting"], arrays["rewards"]
        for factor, rows in zip(self.told_rows, arrays["contexts"], strict=True):
            for row in rows:  # in the same order, by the same operations, so to the same bits
                factor.append(row)


class RFFUCB(_KernelUCB):
    """RFF-UCB: as :class:`PAKUCB` by random Fourier features, at a constant cost of a pull (arXiv 2410.13287).

    ``A = sum f f' + a I``, ``mu = f' A^-1 sum y f`` and ``sigma = (f' A^-1 f)^(1/2)`` with the features ``f`` of the
    contexts, which are drawn once. The sums of several processes add up.

    Args:
        arms, seed, kwargs: see :class:`PAKUCB`; the kernel is Gaussian or Laplacian.
        num_features: length of ``f``.

    Raises:
        ValueError: for arguments out of range, or another kernel.
    """

    def __init__(self, arms: int, seed: int = 0, *, num_features: int = 200, **kwargs: Any):
        super().__init__(arms, seed, **kwargs)
        self.map, self.num_features = random_features(self.kernel, num_features), num_features
        self.moment = torch.zeros(arms, num_features, num_features, dtype=torch.float64)
        self.rewards = torch.zeros(arms, num_features, 2, dtype=torch.float64)  # sums of y f and of f
        self._solved: dict[int, tuple[Tensor, Tensor]] = {}

    def _predict(self, arm: int, row: Tensor) -> tuple[float, float]:
        f = self.map(row[None])[0]
        if arm not in self._solved:
            eye = self.ridge * torch.eye(self.num_features, dtype=torch.float64)
            theta = torch.linalg.solve(self.moment[arm] + eye, self.rewards[arm])
            pending = self.moment[arm] + eye
            for other in self.waiting[arm]:
                g = self.map(other[None])[0]
                pending = pending + torch.outer(g, g)
            self._solved[arm] = theta, torch.linalg.cholesky(pending)
        theta, factor = self._solved[arm]
        spread = torch.linalg.solve_triangular(factor, f[:, None], upper=False)
        reward, one = (f @ theta).tolist()
        return reward + (1 - one) * self._prior(), float(spread.norm())

    def _record(self, arm: int, reward: float, context: Tensor) -> None:
        f = self.map(context[None])[0]
        self.moment[arm] += torch.outer(f, f)
        self.rewards[arm] += torch.stack([reward * f, f], dim=1)

    def _changed(self, arm: int) -> None:
        self._solved.pop(arm, None)

    def _grow(self) -> None:
        super()._grow()
        self.moment, self.rewards = (torch.cat([x, torch.zeros_like(x[:1])]) for x in (self.moment, self.rewards))

    def _merge(self, other: "RFFUCB") -> None:
        self.moment, self.rewards = self.moment + other.moment, self.rewards + other.rewards
        self._solved.clear()

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "num_features": self.num_features}

    def _arrays(self) -> dict[str, Any]:
        return {"moment": self.moment, "rewards": self.rewards, "waiting": self.waiting}

    def _restore(self, arrays: dict[str, Any]) -> None:
        self.moment, self.rewards, self.waiting = arrays["moment"], arrays["rewards"], arrays["waiting"]
