"""FDUCB, ISUCB: the single generator with the smallest Frechet distance, or the largest Inception score."""

import math
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.selection.base import Selector, check_number
from kspec_guidance.selection.losses import FrechetLoss

__all__ = ["FDUCB", "ISUCB"]


class _BestArm(Selector):
    """Pull the arm of the largest optimistic score; scores are functions of sums over the arm's samples."""

    needs = ("features",)

    def __init__(
        self, arms: int, seed: int = 0, *, start: int = 5, delta: float = 0.05, exploration: float = 1.0, **kwargs: Any
    ):
        super().__init__(arms, seed, start=start, **kwargs)
        self.delta = check_number(delta, "delta", above=True)
        if self.delta >= 1:
            raise ValueError(f"delta is a probability below 1, got {delta}")
        if start < 2:
            raise ValueError(f"start must be at least 2 samples, since variances are estimated; got {start}")
        self.exploration = check_number(exploration, "exploration")

    def scores(self) -> Tensor:
        """The estimated score of each arm ``[arms]``, larger is better; NaN for arms with fewer than two samples."""
        return torch.tensor([self._score(i)[0] if self.kept[i] > 1 else math.nan for i in range(self.arms)]).double()

    def _score(self, arm: int) -> tuple[float, float]:
        """Score and bonus of an arm with at least two samples."""
        raise NotImplementedError

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        found = self._forced(n)
        while len(found) < n:
            values = torch.full((self.arms,), -math.inf, dtype=torch.float64)
            for i in range(self.arms):
                if self.kept[i] > 1:
                    score, bonus = self._score(i)
                    values[i] = score + self.exploration * bonus
            if bool(values.isinf().all()):  # nothing was told yet
                values = -(self.kept + self.pending)
            found.append(self._pull(self._best(values)))
        return found

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "delta": self.delta, "exploration": self.exploration}


class FDUCB(_BestArm):
    """FD-UCB: pull the arm whose optimistic Frechet distance to the reference is smallest (arXiv 2406.07451).

    With ``L = log(1/delta)``, the covariance ``S`` and ``n`` pulls of an arm, pending ones included, the bonus is
    ``d (d + |mu - m|) + tr(R^(1/2)) d_S^(1/2) + tr(S) (L/n)^(1/2) + |S| L/n``, where
    ``d^2 = ((tr(S^2) L)^(1/2) + |S| L) / n`` and ``d_S = |S| ((tr S/|S| + L)/n)^(1/2) + d^2``; ``m`` and ``R`` are the mean
    and the covariance of the reference.

    Args:
        arms: their number.
        reference: ``[m, d]``.
        seed: of ties.
        costs: see :class:`Selector`.
        start: samples of each arm first, 5 by default.
        delta: probability that a bound is wrong, 0.05 by default.
        exploration: factor of the bonus. The bound of the paper is 1, and is so wide that a tenth of it has less regret.

    Raises:
        ValueError: for arguments out of range.
    """

    def __init__(self, arms: int, reference: Tensor, seed: int = 0, *, exploration: float = 0.1, **kwargs: Any):
        super().__init__(arms, seed, exploration=exploration, **kwargs)
        self.loss = FrechetLoss(arms, reference)
        self._cache: dict[int, tuple[float, float, Tensor]] = {}

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        if x is not None:
            self.loss.check_width(len(x))
        return x

    def _learn(self, arm: int, x: Tensor | None, reward: float | None, context: Tensor | None, kept: bool) -> None:
        if x is not None:
            self.loss.add(arm, x)
            self._cache.pop(arm, None)

    def _score(self, arm: int) -> tuple[float, float]:
        if arm not in self._cache:
            known, n = torch.tensor([arm]), self.loss.total[arm]
            value, _ = self.loss.evaluate(torch.ones(1, dtype=torch.float64), known)
            mean = self.loss.sums["sum"][arm] / n
            s = (self.loss.sums["moment"][arm] / n - torch.outer(mean, mean)) * n / (n - 1)
            self._cache[arm] = value, float(mean.norm()), torch.linalg.eigvalsh(s).clamp_min(0)
        value, shift, l = self._cache[arm]
        pulls, log = float(self.kept[arm] + self.pending[arm]), math.log(1 / self.delta)
        largest, trace = max(float(l[-1]), 1e-300), float(l.sum())
        d = math.sqrt((math.sqrt(float(l.square().sum()) * log) + largest * log) / pulls)
        d_s = largest * math.sqrt((trace / largest + log) / pulls) + d * d
        root = float(self.loss.reference["root"].diagonal().sum())
        return -value, d * (d + shift) + root * math.sqrt(d_s) + trace * math.sqrt(log / pulls) + largest * log / pulls

    def distances(self) -> Tensor:
        """The Frechet distance of each arm ``[arms]``; NaN for arms with fewer than two samples."""
        return -self.scores()

    def _grow(self) -> None:
        self.loss.grow()

    def _merge(self, other: "FDUCB") -> None:
        self.loss.merge(other.loss)
        self._cache.clear()

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> "FDUCB":
        return super()._from_settings({**settings, "reference": torch.eye(2, dtype=torch.float64)})

    def _arrays(self) -> dict[str, Any]:
        return self.loss.state()

    def _restore(self, arrays: dict[str, Any]) -> None:
        self.loss.restore(arrays)


class ISUCB(_BestArm):
    """IS-UCB: pull the arm of the largest optimistic Inception score (arXiv 2406.07451).

    Features are the class probabilities of a sample. The logarithm of the score is the entropy of their mean less the mean
    of their entropies. The optimistic one moves each probability ``p_j`` of the mean towards ``1/e`` by at most
    ``(2 v_j L/n)^(1/2) + 7 L / (3 (n - 1))``, with its variance ``v_j`` and ``L = log(4/delta)``, and lowers the mean
    entropy by the same bound, its range being ``log C`` for C classes.

    Args:
        arms, seed: see :class:`FDUCB`.
        kwargs: ``costs``, ``start``, ``delta`` and ``exploration``, as there; ``exploration`` is 1 by default.

    Raises:
        ValueError: for arguments out of range; by ``tell``, for features that are no probabilities.
    """

    def __init__(self, arms: int, seed: int = 0, **kwargs: Any):
        super().__init__(arms, seed, **kwargs)
        self.sums: dict[str, Tensor] = {}

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if float(x.min()) < 0 or abs(float(x.sum()) - 1) > 1e-3:
            raise ValueError("features of ISUCB are class probabilities: at least 0, with sum 1; apply a softmax to logits")
        return x / x.sum()

    def _learn(self, arm: int, x: Tensor | None, reward: float | None, context: Tensor | None, kept: bool) -> None:
        if x is None:
            return
        h = -(torch.special.xlogy(x, x)).sum()
        for name, term in {"p": x, "p2": x * x, "h": h, "h2": h * h}.items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((self.arms, *term.shape), dtype=torch.float64)
            self.sums[name][arm] += term

    def _score(self, arm: int) -> tuple[float, float]:
        kept, n = float(self.kept[arm]), float(self.kept[arm] + self.pending[arm])
        p, h = self.sums["p"][arm] / kept, self.sums["h"][arm] / kept
        v = (self.sums["p2"][arm] / kept - p * p).clamp_min(0) * kept / (kept - 1)
        v_h = (self.sums["h2"][arm] / kept - h * h).clamp_min(0) * kept / (kept - 1)
        log, spread = math.log(4 / self.delta), 7 / (3 * (n - 1))
        reach = (2 * v * log / n).sqrt() + spread * log
        top = math.exp(-1)  # where -p log p is largest
        moved = torch.where(p < top, (p + reach).clamp_max(top), (p - reach).clamp_min(top))
        entropy = -torch.special.xlogy(p, p).sum()
        optimistic = (-torch.special.xlogy(moved, moved).sum()).clamp_max(math.log(len(p)))  # no marginal has more
        lowered = (h - (2 * v_h * log / n).sqrt() - spread * log * math.log(len(p))).clamp_min(0)
        score = float(entropy - h)
        return score, float(optimistic - lowered) - score

    def _grow(self) -> None:
        self.sums = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in self.sums.items()}

    def _merge(self, other: "ISUCB") -> None:
        for name, x in other.sums.items():
            self.sums[name] = self.sums[name] + x if name in self.sums else x.clone()

    def _arrays(self) -> dict[str, Any]:
        return {"sums": self.sums}

    def _restore(self, arrays: dict[str, Any]) -> None:
        self.sums = arrays["sums"]
