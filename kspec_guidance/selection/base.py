"""Selector: the protocol of all methods. Choices from a seed and a counter, pulls that are pending, costs, saved states."""

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import numpy as np
import torch
from torch import Tensor

from kspec_guidance.utils.arguments import choices, is_integer
from kspec_guidance.utils.json_tensors import from_json, to_json

__all__ = ["Selector", "check_choice", "check_integer", "check_number", "check_row"]

VERSION = 1  # of saved states
TIE = 1e-12  # values this close, relative to the largest, are equal
TRIES = 4  # pulls for each sample that an arm owes at the start, after which an arm that yields none is let go

Self = TypeVar("Self", bound="Selector")


def _number(value: Any, name: str) -> float:
    """A finite number.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is NaN or infinite.
    """
    if isinstance(value, Tensor | np.ndarray | np.generic) and math.prod(value.shape) == 1:
        value = value.item()
    if isinstance(value, bool):
        value = float(value)
    if not isinstance(value, int | float):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}; leave out samples that have none")
    return float(value)


def check_row(value: Any, name: str, width: int | None) -> Tensor:
    """A row ``[d]`` in float64 on the host.

    Raises:
        TypeError: if it is no row of numbers.
        ValueError: for a wrong shape or width, or NaN.
    """
    try:
        x = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value, dtype=np.float64))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a row of numbers [d], got {type(value).__name__}") from error
    if x.is_complex():
        raise TypeError(f"{name} must be a row of real numbers [d], got {x.dtype}")
    x = x.detach().cpu().double()
    if x.ndim == 2 and len(x) == 1:
        x = x[0]
    if x.ndim != 1 or not len(x):
        raise ValueError(f"{name} must be one row [d], got shape {list(x.shape)}; tell the samples one by one")
    if width is not None and len(x) != width:
        raise ValueError(f"{name} has {len(x)} numbers, and earlier ones had {width}; use one embedder for all arms")
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} contains NaN or infinite values; leave out such samples")
    return x.clone()


class Selector:
    """Base class of the methods that choose which of several arms makes the next sample.

    The protocol: :meth:`choose` returns an arm and counts it as pending, :meth:`tell` gives what it yielded, in any order
    and at any time later. Pending pulls count where a method asks how uncertain it is, not in its means. Choices depend on
    the seed, on the number of choices so far and on what was told, in order; :meth:`state` saves all of it, so that a
    loaded selector chooses bit for bit the same.

    Args:
        arms: their number.
        seed: of the random choices.
        costs: known cost of a pull of each arm, in any unit; otherwise the mean of the costs that were told, 1 before.
        start: samples of each arm before the method begins. An arm that yields nothing is let go after four times as many
            pulls.

    Attributes:
        arms: their number.
        draws: random numbers used so far.

    Raises:
        ValueError: for less than one arm, or costs that are not one positive number for each arm.
    """

    needs: tuple[str, ...] = ()  # what tell must be given: features, reward, context
    told: Tensor
    kept: Tensor
    pending: Tensor
    reward_sum: Tensor
    reward_count: Tensor
    cost_sum: Tensor
    cost_count: Tensor
    _vectors: ClassVar[tuple[str, ...]] = (  # one number for each arm
        "told", "kept", "pending", "reward_sum", "reward_count", "cost_sum", "cost_count",
    )  # fmt: skip

    def __init__(self, arms: int, seed: int = 0, costs: Sequence[float] | None = None, start: int = 1):
        check_integer(arms, "arms is the number of arms", 1)
        check_integer(seed, "seed is an integer", None)
        check_integer(start, "start is a number of samples", 0)
        if costs is not None and len(costs) != arms:
            raise ValueError(f"costs has {len(costs)} numbers for {arms} arms; give one for each")
        self.arms, self.seed, self.start, self.draws = arms, seed, start, 0
        self.known_costs: list[float | None] = [None] * arms if costs is None else [*map(self._check_cost, costs)]
        for name in self._vectors:
            setattr(self, name, torch.zeros(arms, dtype=torch.float64))
        self.widths: dict[str, int] = {}  # of features and contexts

    # -- choosing ------------------------------------------------------------------------------------------------------

    def choose(self, n: int | None = None, contexts: Any = None) -> Any:
        """The arm of the next pull, or the arms of the next ``n``, which are then pending.

        Args:
            n: number of pulls; None for one, as a plain integer.
            contexts: the contexts of the pulls ``[n, p]``, one row ``[p]`` for one, for the methods that use them.

        Returns:
            An integer in ``0 ... arms - 1``, or a list of ``n``.

        Raises:
            ValueError: if the method needs contexts and got none, or another number than ``n``.
        """
        if n is not None:
            check_integer(n, "n is a number of pulls", 1)
        rows = self._contexts(n, contexts)
        if n is None and contexts is not None and not self._is_row(contexts):
            n = len(contexts)
        found = self._choose(1 if n is None else n, rows)
        return found[0] if n is None else found

    @staticmethod
    def _is_row(contexts: Any) -> bool:
        return np.ndim(contexts.detach().cpu() if isinstance(contexts, Tensor) else contexts) == 1

    def _contexts(self, n: int | None, contexts: Any) -> list[Tensor] | None:
        if contexts is None:
            if "context" not in self.needs:
                return None
            raise ValueError(
                f"{type(self).__name__} chooses by context; give choose(contexts=) one row for each pull, for instance the "
                "embedding of its prompt"
            )
        rows = [contexts] if self._is_row(contexts) else list(contexts)
        if n is not None and len(rows) != n:
            raise ValueError(f"contexts has {len(rows)} rows for {n} pulls; give one row [p] for each")
        width = self.widths.get("context")
        found = [check_row(row, "a context", width) for row in rows]
        if len({len(row) for row in found}) > 1:
            raise ValueError("contexts must have rows of one length")
        self.widths["context"] = len(found[0])
        return found

    def _choose(self, n: int, contexts: list[Tensor] | None) -> list[int]:
        raise NotImplementedError

    def _forced(self, n: int) -> list[int]:
        """Up to ``n`` pulls that arms without enough samples get first, which are then pending: the rarest arm first."""
        found: list[int] = []
        while len(found) < n:
            owing = self._owing()
            if not bool(owing.any()):
                break
            pulls = torch.where(owing, self.kept + self.pending, math.inf)
            found.append(self._pull(int(pulls.argmin())))
        return found

    def _owing(self) -> Tensor:
        """Mask of the arms that have not had their first samples ``[arms]``."""
        tried = self.told + self.pending >= TRIES * self.start
        return (self.kept + self.pending < self.start) & ~tried

    def set_pending(self, arms: Sequence[int], contexts: Any = None) -> None:
        """Replace the pending pulls, for instance if some were given up and will not be told.

        Args:
            arms: of the pulls that are still to be told.
            contexts: of these pulls ``[n, p]``, for the methods that use them.

        Raises:
            ValueError: for unknown arms, or contexts of another number or length.
        """
        for arm in arms:
            self._check_arm(arm)
        rows = self._contexts(len(arms), contexts) if len(arms) else []
        self.pending = torch.bincount(torch.tensor([*arms], dtype=torch.int64), minlength=self.arms).double()
        self._set_waiting([*map(int, arms)], rows or [])

    def _set_waiting(self, arms: list[int], contexts: list[Tensor]) -> None:
        """Replace the contexts of the pending pulls."""

    def _pull(self, arm: int) -> int:
        self.pending[arm] += 1
        return arm

    def _uniform(self) -> float:
        """A number in [0, 1): a hash of the seed and of how many were drawn, so that the state is two integers."""
        digest = hashlib.sha256(f"{self.seed}/{self.draws}".encode()).digest()
        self.draws += 1
        return (int.from_bytes(digest[:8], "big") >> 11) * 2.0**-53

    def _best(self, values: Tensor) -> int:
        """The arm of the largest value; a random one of those that tie."""
        largest = values.max()
        ties = (values >= largest - TIE * max(1.0, abs(float(largest)))).nonzero()[:, 0]
        return int(ties[0] if len(ties) == 1 else ties[int(self._uniform() * len(ties))])

    def _systematic(self, shares: Tensor, n: int) -> list[int]:
        """``n`` draws from ``shares``, each arm within 1 of ``n`` times its share, in random order."""
        shares = shares.clamp_min(0)
        edges = (shares / shares.sum()).cumsum(0)
        points = (torch.arange(n, dtype=torch.float64) + self._uniform()) / n
        found = torch.searchsorted(edges, points, right=True).clamp_max(self.arms - 1).tolist()
        for k in range(n - 1, 0, -1):
            j = int(self._uniform() * (k + 1))
            found[k], found[j] = found[j], found[k]
        return found

    # -- what was yielded ----------------------------------------------------------------------------------------------

    def tell(
        self,
        arm: int,
        features: Any = None,
        reward: Any = None,
        context: Any = None,
        cost: Any = None,
        kept: bool = True,
    ) -> None:
        """What one pull of an arm yielded. Nothing changes if an argument is refused.

        Args:
            arm: the arm; it need not have been chosen.
            features: of the sample ``[d]``, for the methods that compare samples.
            reward: a number, larger is better, for the methods that compare rewards.
            context: of the pull ``[p]``, for the methods that use contexts.
            cost: of the pull, for instance in seconds.
            kept: False for a pull whose sample was dropped or failed: it needs no features, its reward is 0 if none is
                given, and its cost counts.

        Raises:
            TypeError: for arguments of the wrong kind.
            ValueError: for an unknown arm, missing arguments, rows of another length than before, or NaN.
        """
        self._check_arm(arm)
        arm = int(arm)
        if not kept and reward is None:
            reward = 0.0
        given = {"features": features, "reward": reward, "context": context}
        for name in self.needs:
            if given[name] is None and not (name == "features" and not kept):
                raise ValueError(f"{type(self).__name__} needs {name}; call tell(arm, {name}=...){self._hint(name)}")
        x = None if features is None or not kept else check_row(features, "features", self.widths.get("features"))
        c = None if context is None else check_row(context, "context", self.widths.get("context"))
        r = None if reward is None else _number(reward, "reward")
        q = None if cost is None else self._check_cost(cost)
        x = self._check(x, r, c)
        self._learn(arm, x, r, c, bool(kept))
        if x is not None:
            self.widths.setdefault("features", len(x))
        if c is not None:
            self.widths.setdefault("context", len(c))
        self.told[arm] += 1
        self.kept[arm] += float(bool(kept))
        self.pending[arm] = (self.pending[arm] - 1).clamp_min(0)
        if r is not None:
            self.reward_sum[arm] += r
            self.reward_count[arm] += 1
        if q is not None:
            self.cost_sum[arm] += q
            self.cost_count[arm] += 1

    def _hint(self, name: str) -> str:
        return ""

    def _check(self, x: Tensor | None, reward: float | None, context: Tensor | None) -> Tensor | None:
        """Checks of a method's own; returns the features as they are learned."""
        return x

    def _learn(self, arm: int, x: Tensor | None, reward: float | None, context: Tensor | None, kept: bool) -> None:
        """Learn more than counts, rewards and costs, which are updated afterwards."""

    def _check_arm(self, arm: Any) -> None:
        if not is_integer(arm, 0) or arm >= self.arms:
            raise ValueError(f"unknown arm {arm!r}; arms are the integers 0 to {self.arms - 1}, see add_arm()")

    @staticmethod
    def _check_cost(cost: Any) -> float:
        found = _number(cost, "cost")
        if found < 0:
            raise ValueError(f"a cost is at least 0, got {found}")
        return found

    def costs(self) -> Tensor:
        """Cost of a pull of each arm ``[arms]``: known, or the mean of what was told, or that of the other arms, or 1."""
        mean = self.cost_sum / self.cost_count
        known = torch.tensor([math.nan if c is None else c for c in self.known_costs], dtype=torch.float64)
        found = torch.where(known.isnan(), mean, known)
        seen = ~found.isnan()
        other = float(found[seen].mean()) if bool(seen.any()) else 1.0
        return torch.where(seen, found, other)

    def yields(self) -> Tensor:
        """Share of the pulls of each arm whose sample was kept ``[arms]``, 1 before any."""
        return torch.where(self.told > 0, self.kept / self.told.clamp_min(1), 1.0)

    # -- more arms, and several processes --------------------------------------------------------------------------------

    def add_arm(self, cost: float | None = None) -> int:
        """Add an arm, which gets its first samples next.

        Args:
            cost: of a pull, if known.

        Returns:
            Its number.
        """
        self.known_costs.append(None if cost is None else self._check_cost(cost))
        for name in self._vectors:
            setattr(self, name, torch.cat([getattr(self, name), torch.zeros(1, dtype=torch.float64)]))
        self.arms += 1
        self._grow()
        return self.arms - 1

    def _grow(self) -> None:
        """Room for one more arm."""

    def merge(self: Self, other: Self) -> Self:
        """Add what another selector of the same settings was told; its pending pulls stay its own.

        Raises:
            TypeError: for another class.
            ValueError: for other settings, or features and contexts of another length.
        """
        if type(other) is not type(self):
            raise TypeError(f"only a {type(self).__name__} can be merged, got {type(other).__name__}")
        mine, theirs = (dict(s.settings(), seed=None) for s in (self, other))
        if mine != theirs:
            differ = ", ".join(k for k in mine if mine[k] != theirs[k])
            raise ValueError(f"selectors with other settings cannot be merged: {differ}")
        for name, width in other.widths.items():
            if self.widths.get(name, width) != width:
                raise ValueError(f"{name} have {self.widths[name]} numbers here and {width} there")
        self._merge(other)
        for name in self._vectors:
            if name != "pending":
                setattr(self, name, getattr(self, name) + getattr(other, name))
        self.widths.update(other.widths)
        return self

    def _merge(self, other: Any) -> None:
        """Add more than counts, rewards and costs, which are added afterwards."""

    # -- saving --------------------------------------------------------------------------------------------------------

    def settings(self) -> dict[str, Any]:
        """The arguments of the constructor, as JSON."""
        return {"arms": self.arms, "seed": self.seed, "costs": self._known_costs(), "start": self.start}

    def _known_costs(self) -> list[float | None] | None:
        return None if all(c is None for c in self.known_costs) else list(self.known_costs)

    @classmethod
    def _from_settings(cls: type[Self], settings: dict[str, Any]) -> Self:
        costs = settings.pop("costs", None)
        found = cls(**settings)
        if costs is not None:
            found.known_costs = list(costs)
        return found

    def _arrays(self) -> dict[str, Any]:
        """What was learned: tensors and JSON values by name."""
        return {}

    def _restore(self, arrays: dict[str, Any]) -> None:
        """Take over what :meth:`_arrays` returned."""

    def state(self) -> dict[str, Any]:
        """Everything that decides the next choices, as a dictionary that JSON can hold; tensors are base64."""
        arrays = {**{name: getattr(self, name) for name in self._vectors}, **self._arrays()}
        return {
            "class": type(self).__name__,
            "version": VERSION,
            "settings": self.settings(),
            "draws": self.draws,
            "widths": dict(self.widths),
            "arrays": to_json(arrays),
        }

    @classmethod
    def load(cls: type[Self], state: Mapping[str, Any]) -> Self:
        """The selector of a :meth:`state`, which chooses as that one would have.

        Raises:
            ValueError: for the state of another class or version, or none.
        """
        try:
            name, version = state["class"], state["version"]
            parts = state["settings"], state["draws"], state["widths"], state["arrays"]
        except (KeyError, TypeError) as error:
            raise ValueError(f"this is no state of a selector: {error}") from error
        if name != cls.__name__:
            raise ValueError(f"this is the state of a {name}; load it with {name}.load(state)")
        if version != VERSION:
            raise ValueError(f"this state has version {version}, and this package reads version {VERSION}")
        try:
            found = cls._from_settings(dict(parts[0]))
            found.draws, found.widths = int(parts[1]), dict(parts[2])
            arrays = from_json(parts[3])
            for vector in cls._vectors:
                setattr(found, vector, arrays.pop(vector))
            found._restore(arrays)
        except (KeyError, TypeError) as error:
            raise ValueError(f"this state of a {name} was altered or cut: {type(error).__name__}: {error}") from error
        return found

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.arms} arms, {int(self.told.sum())} pulls, {int(self.pending.sum())} pending)"


def check_choice(value: str, name: str, known: Iterable[str]) -> str:
    """One of several names.

    Raises:
        ValueError: for any other.
    """
    known = list(known)
    if value not in known:
        raise ValueError(f"unknown {name} {value!r}; {choices(value, known)}")
    return value


def check_number(value: Any, name: str, low: float = 0.0, above: bool = False) -> float:
    """A finite number of at least ``low``, or above it.

    Raises:
        TypeError: if it is no number.
        ValueError: if it is out of range.
    """
    found = _number(value, name)
    if found < low or (above and found == low):
        raise ValueError(f"{name} must be {'above' if above else 'at least'} {low:g}, got {found:g}")
    return found


def check_integer(value: Any, what: str, low: int | None) -> int:
    """An integer of at least ``low``, if that is given.

    Args:
        value: the value.
        what: begin of the message, such as ``n is a number of pulls``.
        low: least value.

    Raises:
        ValueError: for any other.
    """
    if not is_integer(value, low):
        raise ValueError(what + ("" if low is None else f", at least {low}") + f", got {value!r}")
    return int(value)
