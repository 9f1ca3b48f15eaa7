"""MixtureGreedy, MixtureUCB: shares of several generators whose mixture is diverse, or near a reference."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.kernels import Kernel
from kspec_guidance.kernels.settings import kernel_from_json, kernel_to_json
from kspec_guidance.selection.base import TRIES, Selector, check_choice, check_number
from kspec_guidance.selection.losses import LOSSES, make_loss

__all__ = ["MixtureGreedy", "MixtureUCB"]

LEAST_YIELD = 0.02  # share of kept samples below which an arm is not called more often to make up for it


class _Mixture(Selector):
    """Statistics and weights of the mixture methods."""

    def __init__(
        self,
        arms: int,
        objective: str = "rke",
        seed: int = 0,
        *,
        kernel: Kernel | None = None,
        reference: Tensor | None = None,
        quality: float = 0.0,
        cost_weight: float = 0.0,
        costs: Sequence[float] | None = None,
        start: int = 3,
        half_life: float | None = None,
        num_features: int = 512,
    ):
        super().__init__(arms, seed, costs, start)
        self.objective = check_choice(objective, "objective", LOSSES)
        self.quality = check_number(quality, "quality")
        self.cost_weight = check_number(cost_weight, "cost_weight")
        self.half_life = None if half_life is None else check_number(half_life, "half_life", above=True)
        self.kernel, self.num_features = kernel, num_features
        if objective == "reward" and not quality:
            self.quality = 1.0
        if (objective in ("kid", "fid")) != (reference is not None):
            raise ValueError(
                f"objective {objective!r} compares with a reference; give reference= [m, d]"
                if reference is None
                else f"objective {objective!r} uses no reference; leave it out, or choose 'kid' or 'fid'"
            )
        self.loss = make_loss(objective, arms, kernel, num_features, reference)
        rewards = ("reward",) if self.quality else ()
        self.needs = (("features",) if self.loss.needs_features else ()) + rewards

    def _hint(self, name: str) -> str:
        return {
            "features": f", the row [d] that objective {self.objective!r} compares, or kept=False if there is no sample",
            "reward": ", since quality is above 0",
        }.get(name, "")

    # -- statistics ----------------------------------------------------------------------------------------------------

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        if x is not None and self.loss.needs_features:
            self.loss.check_width(len(x))
        return x

    def _learn(self, arm: int, x: Tensor | None, reward: float | None, context: Tensor | None, kept: bool) -> None:
        if self.half_life is not None:
            factor = 0.5 ** (1 / self.half_life)
            self.loss.fade(factor)
            self.reward_sum, self.reward_count = self.reward_sum * factor, self.reward_count * factor
        if x is not None and self.loss.needs_features:
            self.loss.add(arm, x)

    def _grow(self) -> None:
        self.loss.grow()

    def _merge(self, other: "_Mixture") -> None:
        self.loss.merge(other.loss)

    def _samples(self) -> Tensor:
        """Samples that count of each arm ``[arms]``, less those that have faded."""
        return self.loss.total if self.loss.needs_features else self.reward_count

    def _owing(self) -> Tensor:
        if self.half_life is None:
            return super()._owing()
        return (self._samples() + self.pending < self.start) & ~((self.kept == 0) & (self.told >= TRIES * self.start))

    def _known(self) -> Tensor:
        """Indices of the arms with enough samples for their terms."""
        known = self.loss.known & (self.kept > 0)
        if self.quality:
            known = known & (self.reward_count > 0)
        return known.nonzero()[:, 0]

    def _linear(self, known: Tensor) -> Tensor:
        """Linear terms of the known arms ``[k]``: rewards and costs for each kept sample."""
        linear = torch.zeros(len(known), dtype=torch.float64)
        if self.quality:
            linear = linear - self.quality * (self.reward_sum / self.reward_count)[known]
        if self.cost_weight:
            linear = linear + self.cost_weight * (self.costs() / self.yields())[known]
        return linear

    # -- weights -------------------------------------------------------------------------------------------------------

    def weights(self) -> Tensor:
        """Shares of the samples that the arms should make ``[arms]``: the mixture that minimises the loss.

        Uniform until an arm has two samples; 0 for an arm that has not.
        """
        known = self._known()
        if not len(known):
            return torch.full((self.arms,), 1 / self.arms, dtype=torch.float64)
        found = torch.zeros(self.arms, dtype=torch.float64)
        found[known] = self._solve(known)
        return found

    def _solve(self, known: Tensor) -> Tensor:
        raise NotImplementedError

    def value(self, weights: Any) -> float:
        """Estimated loss of a mixture ``[arms]``: ``1 / RKE``, ``-log Vendi``, KID or FID, with rewards and costs.

        Raises:
            ValueError: for weights of arms without samples, or that are no weights.
        """
        a, known = torch.as_tensor(weights, dtype=torch.float64), self._known()
        if a.shape != (self.arms,) or bool((a < 0).any()) or abs(float(a.sum()) - 1) > 1e-6:
            raise ValueError(f"weights must be {self.arms} numbers of at least 0 that sum to 1")
        if abs(float(a[known].sum()) - 1) > 1e-6:
            raise ValueError("an arm with a positive weight has fewer than two samples")
        return self.loss.evaluate(a[known], known)[0] + float(self._linear(known) @ a[known])

    def _shares(self) -> Tensor:
        """Shares of the pulls: an arm whose samples are often dropped is called more often for the same share."""
        return self.weights() / self.yields().clamp_min(LEAST_YIELD)

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        found = self._forced(n)
        if len(found) < n:
            found += [self._pull(arm) for arm in self._systematic(self._shares(), n - len(found))]
        return found

    # -- saving --------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        return {
            **super().settings(),
            "objective": self.objective,
            "kernel": kernel_to_json(self.kernel),
            "quality": self.quality,
            "cost_weight": self.cost_weight,
            "half_life": self.half_life,
            "num_features": self.num_features,
        }

    @classmethod
    def _from_settings(cls, settings: dict[str, Any]) -> "_Mixture":
        settings = {**settings, "kernel": kernel_from_json(settings["kernel"])}
        if settings["objective"] in ("kid", "fid"):  # its statistics are restored afterwards
            settings["reference"] = torch.eye(2, dtype=torch.float64)
        return super()._from_settings(settings)

    def _arrays(self) -> dict[str, Any]:
        return self.loss.state()

    def _restore(self, arrays: Mapping[str, Any]) -> None:
        self.loss.restore(arrays)


class MixtureGreedy(_Mixture):
    """Mixture-Greedy: draw the arm from the weights that minimise the loss of the samples so far, without a bonus.

    ``a = argmin L(a) - quality r'a + cost_weight c'a`` over the simplex (arXiv 2603.21716), with mean rewards ``r`` and
    costs ``c`` of a kept sample. For diversity the best mixture has every useful arm in it, so each is drawn
    again and again and no bonus is needed; a linear part has its minimum at one arm, and then a share of the pulls is
    spread over all arms.

    * ``rke``: ``a'Ka``, ``K`` the means of the squared kernel: one over the RKE score;
    * ``vendi``: ``tr r log r``: minus the log of the Vendi score;
    * ``kid``, ``fid``: squared MMD, Frechet distance of the mixture to ``reference``;
    * ``reward``: nothing but the reward.

    Args:
        arms: their number.
        objective: ``rke``, ``vendi``, ``kid``, ``fid`` or ``reward``.
        seed: of the draws.
        kernel: of the features; cosine by default. A Gaussian or Laplacian kernel needs a bandwidth, and is computed by
            random features.
        reference: ``[m, d]``, for ``kid`` and ``fid``.
        quality: weight of the mean reward.
        cost_weight: weight of the cost of a kept sample. For the RKE of all samples of a budget it is ``1 / budget``:
            ``1 / RKE`` of n samples is ``s + (1 - s) / n``.
        costs: known costs of the arms.
        start: samples of each arm first.
        half_life: number of pulls after which a sample counts half, for arms that change; None for no fading.
        num_features: of random features.
        floor: share of the pulls that is spread evenly over all arms; by default ``t^(-1/3)`` for ``kid``, ``reward``,
            and with ``quality``, else 0.

    Raises:
        ValueError: for arguments out of range, or a reference where none is used.

    >>> s = MixtureGreedy(arms=2, objective="rke", seed=0)
    >>> for arm, row in [(0, [1.0, 0, 0]), (1, [0, 1.0, 0]), (0, [1.0, 0, 0]), (1, [0, 0, 1.0])]:
    ...     s.tell(arm, features=row)
    >>> s.weights().round(decimals=3)  # the second arm makes two different samples, the first one copies
    tensor([0., 1.], dtype=torch.float64)
    """

    def __init__(self, arms: int, objective: str = "rke", seed: int = 0, *, floor: float | None = None, **kwargs: Any):
        super().__init__(arms, objective, seed, **kwargs)
        if floor is not None and not 0 <= check_number(floor, "floor") <= 1:
            raise ValueError(f"floor is a share of the pulls, in 0...1, got {floor}")
        self.floor = floor

    def _floor(self) -> float:
        if self.floor is not None:
            return self.floor
        linear = self.objective in ("kid", "reward") or self.quality > 0
        return max(1.0, float(self.told.sum() + self.pending.sum())) ** (-1 / 3) if linear else 0.0

    def _solve(self, known: Tensor) -> Tensor:
        return self.loss.minimise(known, self._linear(known))

    def _shares(self) -> Tensor:
        shares, floor = super()._shares(), self._floor()
        return (1 - floor) * shares / shares.sum() + floor / self.arms

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "floor": self.floor}


class MixtureUCB(_Mixture):
    """Mixture-UCB: weights that minimise the loss less a bonus for arms with few pulls.

    ``cab``: draw from ``argmin L(a) - quality r'a - sum_i a_i (bonus sqrt(log(t) / n_i) + quality quality_bonus / n_i)``.
    ``ogd``: pull the arm of the smallest gradient of that function at the shares of the pulls so far; cheaper, since no
    minimum is computed (Rezaei, Farnia et al. 2024, arXiv 2412.17622). Pending pulls count in ``n_i`` and ``t``.

    Args:
        arms, objective, seed, kwargs: see :class:`MixtureGreedy`, but for ``floor``.
        variant: ``cab`` or ``ogd``.
        bonus: factor of the bonus, in units of the loss.
        quality_bonus: factor of the bonus of the reward.

    Raises:
        ValueError: as :class:`MixtureGreedy`, or for an unknown variant.
    """

    def __init__(
        self,
        arms: int,
        objective: str = "rke",
        seed: int = 0,
        *,
        variant: str = "cab",
        bonus: float = 0.6,
        quality_bonus: float = 0.4,
        **kwargs: Any,
    ):
        super().__init__(arms, objective, seed, **kwargs)
        self.variant = check_choice(variant, "variant", ("cab", "ogd"))
        self.bonus, self.quality_bonus = check_number(bonus, "bonus"), check_number(quality_bonus, "quality_bonus")

    def _optimism(self, known: Tensor) -> Tensor:
        n = (self._samples() + self.pending)[known].clamp_min(1)
        t = max(2.0, float((self._samples() + self.pending).sum()))
        return self.bonus * (math.log(t) / n).sqrt() + self.quality * self.quality_bonus / n

    def _solve(self, known: Tensor) -> Tensor:
        return self.loss.minimise(known, self._linear(known) - self._optimism(known))

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        if self.variant == "cab":
            return super()._choose(n, contexts)
        found = self._forced(n)
        while len(found) < n:
            known = self._known()
            if not len(known):
                found += [self._pull(arm) for arm in self._systematic(torch.ones(self.arms), n - len(found))]
                break
            counts = (self._samples() + self.pending)[known]
            _, g = self.loss.evaluate(counts / counts.sum(), known)
            values = torch.full((self.arms,), -math.inf, dtype=torch.float64)
            values[known] = self._optimism(known) - g - self._linear(known)
            found.append(self._pull(self._best(values)))
        return found

    def settings(self) -> dict[str, Any]:
        more = {"variant": self.variant, "bonus": self.bonus, "quality_bonus": self.quality_bonus}
        return {**super().settings(), **more}
