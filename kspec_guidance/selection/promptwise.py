"""PromptWise: ask generators one after another until one answers well enough, or until it does not pay."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import Kernel
from kspec_guidance.selection.base import check_choice, check_integer
from kspec_guidance.selection.contextual import Contextual, random_features

__all__ = ["PromptWise"]

NEWTON_STEPS = 25


class PromptWise(Contextual):
    """PromptWise: for each try of a prompt the arm to ask, or none (arXiv 2505.18901).

    An arm ``g`` costs ``c_g`` and succeeds with probability ``q_g(t)``, by a logistic regression on the context for each
    arm. A success is worth 1. With ``k`` tries left the value of a prompt is
    ``W_k = max(0, max_g q_g - cost_weight c_g + (1 - q_g) W_(k-1))``, ``W_0 = 0``: exact for independent tries. The
    arm of the maximum is asked, none if ``W_k`` is 0. ``rule="index"`` is that of the paper: the arm of the largest
    ``1 - cost_weight c_g / q_g``, the value of asking it until it succeeds, whatever tries are left.

    Probabilities are optimistic: ``sigmoid(theta'f + exploration (f'V^-1 f)^(1/2))``, ``V = ridge I + sum f f'`` over the
    pulls, pending ones included.

    Args:
        arms: their number.
        costs: of a pull of each arm; otherwise learned by ``tell(cost=)``.
        seed: of ties.
        cost_weight: worth of a unit of cost, where a success is worth 1.
        budget: tries of a prompt.
        rule: ``recursion`` or ``index``.
        kernel: of contexts, Gaussian or Laplacian, by random features; None for features ``[t, 1]``, a linear logistic
            regression.
        ridge: of the regressions.
        exploration: factor of the standard deviation.
        start: pulls of each arm first, once for each prompt.
        num_features: of random features.

    Raises:
        ValueError: for arguments out of range; by ``tell``, for rewards outside 0...1.
    """

    def __init__(
        self,
        arms: int,
        costs: Sequence[float] | None = None,
        seed: int = 0,
        *,
        cost_weight: float = 0.05,
        budget: int = 5,
        rule: str = "recursion",
        kernel: Kernel | None = None,
        exploration: float = 1.0,
        num_features: int = 200,
        **kwargs: Any,
    ):
        super().__init__(
            arms, seed, kernel=kernel, exploration=exploration, cost_weight=cost_weight, costs=costs, **kwargs
        )  # fmt: skip
        self.budget = self._left = check_integer(budget, "budget is a number of tries", 1)
        self.rule = check_choice(rule, "rule", ("recursion", "index"))
        self.map, self.num_features = None if kernel is None else random_features(kernel, num_features), num_features
        self.rows: list[list[Tensor]] = [[] for _ in range(arms)]  # contexts
        self.rewards: list[list[float]] = [[] for _ in range(arms)]
        self.theta: list[Tensor | None] = [None] * arms  # the start of the next fit
        self._fitted: dict[int, tuple[Tensor, Tensor]] = {}
        self._mapped: list[list[Tensor]] = [[] for _ in range(arms)]  # features of the rows, as far as computed

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose(self, n: int | None = None, contexts: Any = None, left: int | None = None) -> Any:
        """The arm to ask next for a prompt, or None if no further try pays; a list for several prompts.

        Args:
            n: number of prompts; None for one.
            contexts: of the prompts ``[n, p]``, or ``[p]``.
            left: tries that are left of these prompts, this one included; ``budget`` by default, for a new prompt.

        Raises:
            ValueError: without contexts, or for a number of tries that is negative.
        """
        self._left = self.budget if left is None else check_integer(left, "left is a number of tries", 0)
        return super().choose(n, contexts)

    def _owing(self) -> Tensor:
        return super()._owing() & (self._left == self.budget)

    def _pick(self, row: Tensor) -> int | None:
        if not self._left:
            return None
        q, c = self.probabilities(row, optimistic=True), self.cost_weight * self.costs()
        if self.rule == "index":
            values = 1 - c / q
        else:
            values = q - c + (1 - q) * _value(q, c, self._left - 1)
        best = self._best(values)
        return None if float(values[best]) <= 0 else self._pull(best)

    def probabilities(self, context: Any, optimistic: bool = False) -> Tensor:
        """Probability of success of each arm ``[arms]`` at a context ``[p]``."""
        f, found = self._features(self._row(context)), torch.zeros(self.arms, dtype=torch.float64)
        for arm in range(self.arms):
            theta, factor = self._fit(arm, len(f))
            logit = theta @ f
            if optimistic:
                spread = torch.linalg.solve_triangular(factor, f[:, None], upper=False).norm()
                logit = logit + self.exploration * spread
            found[arm] = torch.sigmoid(logit)
        return found

    def value(self, context: Any, left: int | None = None) -> float:
        """Expected value of a prompt with ``left`` tries."""
        q, c = self.probabilities(context), self.cost_weight * self.costs()
        return _value(q, c, self.budget if left is None else left)

    def _features(self, row: Tensor) -> Tensor:
        return torch.cat([row, row.new_ones(1)]) if self.map is None else self.map(row[None])[0]

    def _fit(self, arm: int, width: int) -> tuple[Tensor, Tensor]:
        """Coefficients by Newton's method from those before, and the factor of ``V``."""
        if arm in self._fitted:
            return self._fitted[arm]
        eye = torch.eye(width, dtype=torch.float64)
        theta = self.theta[arm]
        theta = eye.new_zeros(width) if theta is None else theta
        told = self._mapped[arm]
        told += [self._features(row) for row in self.rows[arm][len(told) :]]
        if told:
            f, y = torch.stack(told), torch.tensor(self.rewards[arm], dtype=torch.float64)
            theta = fit_logistic(f, y, self.ridge, theta)
        self.theta[arm] = theta
        pulls = told + [self._features(row) for row in self.waiting[arm]]
        v = self.ridge * eye
        if pulls:
            rows = torch.stack(pulls)
            v = v + rows.mT @ rows
        self._fitted[arm] = theta, torch.linalg.cholesky(v)
        return self._fitted[arm]

    # -- learning ------------------------------------------------------------------------------------------------------

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        if reward is not None and not 0 <= reward <= 1:
            raise ValueError(f"the reward of PromptWise is a success, 0 to 1, got {reward}; use PAKUCB for other rewards")
        return None

    def _record(self, arm: int, reward: float, context: Tensor) -> None:
        self.rows[arm].append(context)
        self.rewards[arm].append(reward)

    def _changed(self, arm: int) -> None:
        self._fitted.pop(arm, None)

    def _grow(self) -> None:
        super()._grow()
        for mine in (self.rows, self.rewards, self._mapped):
            mine.append([])
        self.theta.append(None)

    def _merge(self, other: "PromptWise") -> None:
        for arm in range(self.arms):
            self.rows[arm] += other.rows[arm]
            self.rewards[arm] += other.rewards[arm]
        self._fitted.clear()

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "budget": self.budget,
            "rule": self.rule,
            "num_features": self.num_features,
        }

    def _arrays(self) -> dict[str, Any]:
        # Fits start from the coefficients before, so these decide the last bits.
        return {"rows": self.rows, "rewards": self.rewards, "waiting": self.waiting, "theta": self.theta}

    def _restore(self, arrays: dict[str, Any]) -> None:
        self.rows, self.rewards, self.waiting = arrays["rows"], arrays["rewards"], arrays["waiting"]
        self.theta = arrays["theta"]


def _value(q: Tensor, c: Tensor, left: int) -> float:
    """Value of a prompt with ``left`` tries of arms with these probabilities and worths of costs ``[arms]``."""
    found = 0.0
    for _ in range(left):
        found = max(0.0, float((q - c + (1 - q) * found).max()))
    return found


def fit_logistic(f: Tensor, y: Tensor, ridge: float, theta: Tensor) -> Tensor:
    """Coefficients ``[d]`` that minimise the logistic loss of ``y`` ``[n]`` in 0...1 plus ``ridge |theta|^2 / 2``.

    Newton's method with a backtracking line search.

    Args:
        f: features ``[n, d]``.
        y: successes ``[n]``.
        ridge: of the penalty.
        theta: start ``[d]``.
    """

    def loss(theta: Tensor) -> float:
        z = f @ theta
        return float((torch.nn.functional.softplus(z) - y * z).sum() + ridge * theta @ theta / 2)

    now = loss(theta)
    eye = ridge * torch.eye(f.shape[1], dtype=f.dtype)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(f @ theta)
        g = f.mT @ (p - y) + ridge * theta
        if float(g.abs().max()) < 1e-9:
            break
        step = torch.linalg.solve((f.mT * (p * (1 - p))) @ f + eye, g)
        size = 1.0
        while size > 1e-6 and not loss(theta - size * step) <= now + 1e-12:
            size /= 2
        theta = theta - size * step
        now = loss(theta)
    return theta
