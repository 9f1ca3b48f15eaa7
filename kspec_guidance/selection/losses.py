"""Losses of a mixture of arms, from sums over their samples: what the mixture methods minimise.

The mixture with weights ``a`` draws a sample of arm ``i`` with probability ``a_i``. All losses are convex in ``a``.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.features import tensor_product
from kspec_guidance.functional.inputs import check_matrix
from kspec_guidance.functional.novelty import root
from kspec_guidance.functional.simplex import minimise_on_simplex
from kspec_guidance.functional.vendi import entropy_and_log
from kspec_guidance.kernels import CosineKernel, Kernel
from kspec_guidance.metrics.base import StreamMap
from kspec_guidance.selection.quadratic import minimise_quadratic, nearest_psd

__all__ = ["LOSSES", "FrechetLoss", "MixtureLoss", "QuadraticLoss", "RewardLoss", "VendiLoss", "make_loss"]

SEED = 0  # of random features
EMPTY = 1e-12  # eigenvalues at most this are 0
TOLERANCE, MAX_STEPS = 1e-5, 400  # of the weights of losses without an exact solution


class MixtureLoss:
    """Base class: sums of one feature row for each sample, by arm, with weights that may fade.

    Attributes:
        total: weight of the samples of each arm ``[arms]``; their number if nothing fades.
        total_squares: sum of the squared weights ``[arms]``.
        sums: sums over the samples of each arm ``[arms, ...]``, by name.
    """

    needs_features = True

    def __init__(self, arms: int):
        self.arms = arms
        self.total = torch.zeros(arms, dtype=torch.float64)
        self.total_squares = torch.zeros(arms, dtype=torch.float64)
        self.sums: dict[str, Tensor] = {}
        self.reference: dict[str, Tensor] = {}

    @property
    def known(self) -> Tensor:
        """Mask of the arms with samples enough for their terms ``[arms]``."""
        return self.total.square() > self.total_squares * (1 + 1e-9)  # more than one sample

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        """What a sample ``[d]`` adds to the sums, by name."""
        raise NotImplementedError

    def check_width(self, width: int) -> None:
        """Refuse samples that do not match the reference.

        Raises:
            ValueError: for another number of features.
        """

    def add(self, arm: int, x: Tensor) -> None:
        """Add a sample ``[d]`` of an arm."""
        for name, term in self.terms(x).items():
            if name not in self.sums:
                self.sums[name] = torch.zeros((self.arms, *term.shape), dtype=torch.float64)
            self.sums[name][arm] += term
        self.total[arm] += 1
        self.total_squares[arm] += 1

    def fade(self, factor: float) -> None:
        """Multiply the weights of all samples so far."""
        self.total, self.total_squares = self.total * factor, self.total_squares * factor**2
        self.sums = {name: x * factor for name, x in self.sums.items()}

    def grow(self) -> None:
        """Room for one more arm."""
        self.arms += 1
        self.total, self.total_squares = (torch.cat([x, x.new_zeros(1)]) for x in (self.total, self.total_squares))
        self.sums = {name: torch.cat([x, torch.zeros_like(x[:1])]) for name, x in self.sums.items()}

    def merge(self, other: "MixtureLoss") -> None:
        """Add the sums of another.

        Raises:
            ValueError: if its reference is another one.
        """
        mine, theirs = self.reference, other.reference
        if mine.keys() != theirs.keys() or any(not torch.equal(mine[k], theirs[k]) for k in mine):
            raise ValueError("selectors with other references cannot be merged")
        self.total, self.total_squares = self.total + other.total, self.total_squares + other.total_squares
        for name, x in other.sums.items():
            self.sums[name] = x.clone() if name not in self.sums else self.sums[name] + x

    def evaluate(self, a: Tensor, known: Tensor) -> tuple[float, Tensor]:
        """Value, and gradient ``[k]``, at weights ``[k]`` of the known arms (indices ``[k]``)."""
        raise NotImplementedError

    def minimise(self, known: Tensor, linear: Tensor) -> Tensor:
        """Weights ``[k]`` of the known arms (indices) that minimise the loss plus ``linear`` ``[k]`` times the weights."""

        def objective(a: Tensor) -> tuple[float, Tensor]:
            value, g = self.evaluate(a, known)
            return value + float(linear @ a), g + linear

        return minimise_on_simplex(objective, len(known), tolerance=TOLERANCE, max_steps=MAX_STEPS).weights

    def state(self) -> dict[str, Any]:
        """Sums and reference."""
        return {
            "total": self.total, "total_squares": self.total_squares, "sums": self.sums, "reference": self.reference,
        }  # fmt: skip

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take over a :meth:`state`."""
        self.total, self.total_squares = state["total"], state["total_squares"]
        self.sums, self.reference = dict(state["sums"]), dict(state["reference"])


class QuadraticLoss(MixtureLoss):
    """``a'Ka - 2 p'a``, with ``K_ij`` the mean of a kernel over pairs of samples of arms i and j.

    ``K_ii`` leaves out the pairs of a sample with itself, so it is unbiased. ``rke``: the kernel is squared and ``p`` is 0;
    the mixture has an RKE score of ``1 / a'Ka``. ``kid``: ``p_i`` is the mean of the kernel with the reference, and the
    mean over pairs of the reference is added: the squared MMD of the mixture (KID with features of Inception).
    """

    def __init__(self, arms: int, kernel: Kernel | None, num_features: int, squared: bool, reference: Any = None):
        super().__init__(arms)
        self.map = StreamMap(kernel, num_features, SEED)
        self.products = squared and isinstance(self.map.kernel, CosineKernel)  # features of the squared cosine
        if squared and not self.products:
            self.map = StreamMap(self.map.kernel.squared(), num_features, SEED)
        if reference is not None:
            rows = self.map(_reference_rows(reference))
            n, total = len(rows), rows.sum(0)
            self.reference = {
                "mean": total / n,
                "constant": (total @ total - rows.square().sum()) / (n * (n - 1)),
                "width": torch.tensor(reference.shape[1]),
            }

    def check_width(self, width: int) -> None:
        if self.reference and int(self.reference["width"]) != width:
            raise ValueError(f"features have {width} numbers, and the reference has {int(self.reference['width'])}")

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        phi = self.map(x[None])
        return {"features": (tensor_product(phi, phi) if self.products else phi)[0]}

    def matrix(self, known: Tensor) -> tuple[Tensor, Tensor, float]:
        """``K`` ``[k, k]``, ``p`` ``[k]`` and the constant, of the known arms (indices)."""
        sums, n, squares = self.sums["features"][known], self.total[known], self.total_squares[known]
        k = sums @ sums.mT / (n[:, None] * n)
        own = (k.diagonal() * n * n - squares) / (n * n - squares)  # feature rows have norm 1
        k = k - torch.diag(k.diagonal() - own)
        if not self.reference:
            return k, torch.zeros_like(n), 0.0
        return k, sums @ self.reference["mean"] / n, float(self.reference["constant"])

    def evaluate(self, a: Tensor, known: Tensor) -> tuple[float, Tensor]:
        k, p, constant = self.matrix(known)
        k = nearest_psd(k)
        return float(a @ k @ a - 2 * p @ a) + constant, 2 * (k @ a - p)

    def minimise(self, known: Tensor, linear: Tensor) -> Tensor:
        k, p, _ = self.matrix(known)
        return minimise_quadratic(k, 2 * p - linear)


class VendiLoss(MixtureLoss):
    """``tr(r log r)`` of ``r = sum_i a_i C_i``, ``C_i`` the second moment of arm i: minus the log of the Vendi score."""

    def __init__(self, arms: int, kernel: Kernel | None, num_features: int):
        super().__init__(arms)
        self.map = StreamMap(kernel, num_features, SEED)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        phi = self.map(x[None]).double()[0]
        return {"moment": torch.outer(phi, phi)}

    def evaluate(self, a: Tensor, known: Tensor) -> tuple[float, Tensor]:
        c = self.sums["moment"][known] / self.total[known, None, None]
        entropy, log = entropy_and_log(torch.einsum("k,kij->ij", a, c))
        return -float(entropy), torch.einsum("kij,ij->k", c, log) + 1


class FrechetLoss(MixtureLoss):
    """Frechet distance of the mixture's mean and covariance to those of the reference; convex in the weights.

    ``mu = sum_i a_i mu_i``, ``C = sum_i a_i (C_i + mu_i mu_i') - mu mu'`` with the unbiased covariances ``C_i``.
    ``|mu - m|^2 + tr C`` is linear in the weights, and ``-tr (R' C R)^(1/2)``, with ``R R'`` the covariance of the
    reference, is convex, since the root is operator concave and ``C`` is concave in the weights.
    """

    def __init__(self, arms: int, reference: Tensor):
        super().__init__(arms)
        self.reference = _reference_moments(_reference_rows(reference))

    def check_width(self, width: int) -> None:
        if len(self.reference["mean"]) != width:
            raise ValueError(f"features have {width} numbers, and the reference has {len(self.reference['mean'])}")

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        y = x - self.reference["mean"]  # a common origin keeps the rounding small
        return {"sum": y, "moment": torch.outer(y, y)}

    def evaluate(self, a: Tensor, known: Tensor) -> tuple[float, Tensor]:
        n, squares = self.total[known], self.total_squares[known]
        mean = self.sums["sum"][known] / n[:, None]
        outer = mean[:, :, None] * mean[:, None, :]
        own = (self.sums["moment"][known] / n[:, None, None] - outer) * (n * n / (n * n - squares))[:, None, None]
        moment, r = own + outer, self.reference["root"]
        mu = a @ mean
        c = torch.einsum("k,kij->ij", a, moment) - torch.outer(mu, mu)
        l, v = torch.linalg.eigh(r.mT @ c @ r)
        largest = max(float(l[-1]), 1e-300)
        root_l = l.clamp_min(0).sqrt()
        linear = moment.diagonal(dim1=1, dim2=2).sum(1)
        value = float(a @ linear + self.reference["trace"] - 2 * root_l.sum())
        inverse = torch.where(l > EMPTY * largest, root_l.reciprocal(), 0.0)
        pull = r @ ((v * inverse) @ v.mT) @ r.mT  # d tr (R' C R)^(1/2) = tr(pull dC) / 2
        change = torch.einsum("ij,kij->k", pull, moment) - 2 * mean @ (pull @ mu)
        return value, linear - change


class RewardLoss(MixtureLoss):
    """0: the mixture's reward alone decides, see ``quality``."""

    needs_features = False

    @property
    def known(self) -> Tensor:
        return torch.ones(self.arms, dtype=torch.bool)

    def terms(self, x: Tensor) -> dict[str, Tensor]:
        return {}

    def evaluate(self, a: Tensor, known: Tensor) -> tuple[float, Tensor]:
        return 0.0, torch.zeros_like(a)

    def minimise(self, known: Tensor, linear: Tensor) -> Tensor:
        best = (linear <= linear.min() + 1e-12 * linear.abs().max()).double()
        return best / best.sum()


def _reference_rows(reference: Tensor) -> Tensor:
    """The rows ``[m, d]`` of a reference in float64 on the host.

    Raises:
        ValueError: for less than two.
    """
    rows = check_matrix(reference, "reference").cpu().double()
    if len(rows) < 2:
        raise ValueError(f"reference needs at least two samples, got {len(rows)}")
    return rows


def _reference_moments(rows: Tensor) -> dict[str, Tensor]:
    """Mean, ``R`` with ``R R'`` the covariance, and its trace, of the rows ``[m, d]`` of a reference."""
    covariance = torch.cov(rows.mT).reshape(rows.shape[1], rows.shape[1])
    return {"mean": rows.mean(0), "root": root(covariance), "trace": covariance.diagonal().sum()}


LOSSES = ("rke", "vendi", "kid", "fid", "reward")


def make_loss(name: str, arms: int, kernel: Kernel | None, num_features: int, reference: Any) -> MixtureLoss:
    """The loss of one of the names in ``LOSSES``; a reference is for ``kid`` and ``fid``."""
    if name in ("rke", "kid"):
        return QuadraticLoss(arms, kernel, num_features, name == "rke", reference)
    if name == "vendi":
        return VendiLoss(arms, kernel, num_features)
    return RewardLoss(arms) if name == "reward" else FrechetLoss(arms, reference)
