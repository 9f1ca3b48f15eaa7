"""What every method must beat: the truth, an even share, the best mean so far, one arm."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.selection.base import Selector

__all__ = ["Greedy", "OneArm", "Oracle", "Uniform"]


class _Shares(Selector):
    """Draw from shares."""

    def weights(self) -> Tensor:
        """Shares of the next pulls ``[arms]``."""
        raise NotImplementedError

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        return [self._pull(arm) for arm in self._systematic(self.weights(), n)]


class Uniform(_Shares):
    """Every arm as often as the others."""

    def weights(self) -> Tensor:
        return torch.full((self.arms,), 1 / self.arms, dtype=torch.float64)


class OneArm(_Shares):
    """One arm always.

    Args:
        arms, seed, kwargs: see :class:`Selector`.
        arm: the arm.

    Raises:
        ValueError: for an unknown arm.
    """

    def __init__(self, arms: int, arm: int = 0, seed: int = 0, *, start: int = 0, **kwargs: Any):
        super().__init__(arms, seed, start=start, **kwargs)
        self._check_arm(arm)
        self.arm = arm

    def weights(self) -> Tensor:
        found = torch.zeros(self.arms, dtype=torch.float64)
        found[self.arm] = 1.0
        return found

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "arm": self.arm}


class Greedy(_Shares):
    """The arm of the largest mean reward so far."""

    needs = ("reward",)

    def weights(self) -> Tensor:
        found = torch.zeros(self.arms, dtype=torch.float64)
        found[int(self._means().argmax())] = 1.0
        return found

    def _means(self) -> Tensor:
        means = self.reward_sum / self.reward_count
        return torch.where(means.isnan(), -torch.inf, means)

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        found = self._forced(n)
        return found + [self._pull(self._best(self._means())) for _ in range(n - len(found))]


class Oracle(_Shares):
    """The true best: fixed shares, or the arm that a function of the context returns. Its state holds no function.

    Args:
        arms: their number.
        truth: shares ``[arms]``, or a function of a context ``[p]`` that returns an arm.
        seed, kwargs: see :class:`Selector`.

    Raises:
        ValueError: for shares that are not one number of at least 0 for each arm.
    """

    def __init__(
        self,
        arms: int,
        truth: Sequence[float] | Callable[[Tensor], int],
        seed: int = 0,
        *,
        start: int = 0,
        **kwargs: Any,
    ):
        super().__init__(arms, seed, start=start, **kwargs)
        self.best: Callable[[Tensor], int] | None = None
        self.shares: Tensor | None = None
        if callable(truth):
            self.best, self.needs = truth, ("context",)
            return
        self.shares = torch.as_tensor(truth, dtype=torch.float64)
        if self.shares.shape != (arms,) or bool((self.shares < 0).any()) or float(self.shares.sum()) <= 0:
            raise ValueError(f"truth must be {arms} shares of at least 0, or a function of a context, got {truth!r}")

    def weights(self) -> Tensor:
        if self.shares is None:
            raise ValueError("this oracle chooses by context; it has no fixed shares")
        return self.shares / self.shares.sum()

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        if self.best is None:
            return super()._choose(n, contexts)
        return [self._pull(int(self.best(c))) for c in contexts or []]

    def settings(self) -> dict[str, Any]:
        if self.shares is None:
            raise TypeError("an oracle of a function has no state")
        return {**super().settings(), "truth": self.shares.tolist()}
