"""KID and FID to data that is spread over clients, from messages of fixed size instead of samples."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations_with_replacement

import torch
from torch import Tensor

from kspec_guidance.functional.fidelity import frechet_of_factors
from kspec_guidance.functional.inputs import FeatureMap, KernelLike, as_kernel, check_matrix, map_rows, on_host
from kspec_guidance.functional.novelty import root
from kspec_guidance.kernels import PolynomialKernel

__all__ = ["ClientMessage", "ClientScores", "fid_over_clients", "kid_over_clients"]

PROBE = 16  # features of a fixed row that tell maps apart


@dataclass(frozen=True, eq=False)
class ClientMessage:
    """What a client sends instead of its samples: sums whose size does not depend on their number.

    Messages of parts of a client's data add up: ``message_a + message_b``. :meth:`state` is a dictionary of tensors, e.g.
    for safetensors. Sums of few samples say much about them: a message is small, not private.

    Attributes:
        count: number of samples, a float64 scalar.
        mean: ``[d]``.
        scatter: ``sum (x - mean)(x - mean)'`` ``[d, d]``.
        feature_sum: sum of the rows of a feature map ``[D]``; empty without a map.
        feature_squares: sum of their squared norms, a scalar.
        probe: features of a fixed row: messages of different maps do not combine.
    """

    count: Tensor
    mean: Tensor
    scatter: Tensor
    feature_sum: Tensor
    feature_squares: Tensor
    probe: Tensor

    @classmethod
    def of(cls, x: Tensor, feature_map: FeatureMap | None = None) -> "ClientMessage":
        """The message of samples.

        Args:
            x: features ``[n, d]``.
            feature_map: a function of rows, the same at all clients, whose inner products are the kernel of KID: for
                instance random Fourier features of one seed. Not needed for FID.

        Raises:
            ValueError: for an empty set or NaN, or if ``feature_map`` is no function.
        """
        x = check_matrix(x).detach()
        z = on_host(x)
        mean = z.mean(0)
        centred = z - mean
        empty = z.new_zeros(0)
        if feature_map is None:
            return cls(z.new_tensor(len(z)), mean, centred.mT @ centred, empty, z.new_zeros(()), empty)
        if isinstance(feature_map, Tensor):
            raise ValueError("feature_map must be a function of rows, the same at all clients; got rows")
        phi = map_rows(feature_map, x)
        ramp = (torch.arange(1, x.shape[1] + 1, device=x.device, dtype=x.dtype) / x.shape[1])[None]
        probe = map_rows(feature_map, ramp)[0, :PROBE]
        total, squares = phi.sum(0).detach(), phi.square().sum().detach()
        return cls(z.new_tensor(len(z)), mean, centred.mT @ centred, total, squares, probe.detach())

    def __add__(self, other: "ClientMessage") -> "ClientMessage":
        """The message of both sets of samples.

        Raises:
            ValueError: for messages of different widths or maps.
        """
        _check_alike([self, other])
        n = self.count + other.count
        shift = other.mean - self.mean
        scatter = self.scatter + other.scatter + (self.count * other.count / n) * torch.outer(shift, shift)
        total, squares = self.feature_sum + other.feature_sum, self.feature_squares + other.feature_squares
        return ClientMessage(n, self.mean + shift * (other.count / n), scatter, total, squares, self.probe)

    def state(self) -> dict[str, Tensor]:
        """Named tensors."""
        return {f.name: getattr(self, f.name) for f in fields(self)}

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor]) -> "ClientMessage":
        """The message with these tensors.

        Raises:
            ValueError: for missing names, or shapes that do not belong together.
        """
        names = [f.name for f in fields(cls)]
        if set(state) != set(names):
            raise ValueError(f"a message has the tensors {', '.join(names)}; got {', '.join(sorted(state))}")
        found = cls(**{name: on_host(state[name]) for name in names})
        d = found.mean.numel()
        if found.mean.ndim != 1 or found.scatter.shape != (d, d) or found.feature_sum.ndim != 1 or found.count < 1:
            raise ValueError("the tensors of this message do not belong together, or it is of no samples")
        return found


@dataclass(frozen=True)
class ClientScores:
    """A distance of generated samples to the data of several clients.

    Attributes:
        average: weighted mean of the clients' distances.
        over_all: distance to the mixture of the clients' data.
        per_client: one for each client.
        weights: of the clients; their sum is 1.
    """

    average: float
    over_all: float
    per_client: list[float]
    weights: list[float]

    @property
    def difference(self) -> float:
        """``average - over_all``: for KID the same for all models, at least 0 up to the error of estimates."""
        return self.average - self.over_all


def _check_alike(messages: Sequence[ClientMessage], maps: bool = True) -> None:
    first = messages[0]
    for m in messages[1:]:
        if m.mean.shape != first.mean.shape:
            raise ValueError(
                f"the sets have {len(first.mean)} and {len(m.mean)} features per row; embed all with the same model"
            )
        if not maps:
            continue
        if m.feature_sum.shape != first.feature_sum.shape or not torch.allclose(m.probe, first.probe, atol=1e-5):
            raise ValueError("messages are of different feature maps; give all clients one map, of one seed")


def _weights(weights: Sequence[float] | None, counts: Tensor) -> Tensor:
    w = counts if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    if w.shape != counts.shape or not torch.isfinite(w).all() or (w < 0).any() or not w.sum() > 0:
        raise ValueError(f"weights must be {len(counts)} finite numbers of at least 0, one for each client, got {weights}")
    return w / w.sum()


def _scores(distances: Tensor, over_all: Tensor, w: Tensor) -> ClientScores:
    return ClientScores(float(w @ distances), float(over_all), distances.tolist(), w.tolist())


def _check_clients(clients: Sequence[Tensor | ClientMessage]) -> None:
    if isinstance(clients, Tensor) or not clients:
        raise ValueError("clients must be a list of rows [n, d], or of messages, one for each client")


def kid_over_clients(
    x: Tensor | ClientMessage,
    clients: Sequence[Tensor | ClientMessage],
    kernel: KernelLike | None = None,
    weights: Sequence[float] | None = None,
    feature_map: FeatureMap | None = None,
    unbiased: bool = True,
) -> ClientScores:
    """KID to each client's data, their average, and the KID to the mixture of all (arXiv 2310.11714).

    With weights l_i and mean embeddings mu_i of the clients, ``average - over_all = sum l_i |mu_i|^2 - |sum l_i mu_i|^2``.
    It does not depend on the generated samples: both rank models alike. The identity holds exactly here, since the KID to
    the mixture is estimated from the same pairs: those within a client without the samples themselves, and all pairs
    between clients.

    From rows, the kernel is exact. From messages, the inner products of their feature map are the kernel: each client sends
    numbers that do not grow with its data.

    Args:
        x: generated samples ``[n, d]``, or their message.
        clients: rows ``[n_i, d]`` of each client, or their messages.
        kernel: cubic polynomial by default; an unset bandwidth is fitted to the rows of all. For rows only.
        weights: of the clients; by default in proportion to their numbers of samples.
        feature_map: function of rows; applied to those that are no messages yet.
        unbiased: without pairs of a sample and itself.

    Raises:
        ValueError: for no clients, different widths or maps, messages without features, wrong weights, or fewer than two
            samples in a set if unbiased.
    """
    _check_clients(clients)
    items = [x, *clients]
    if feature_map is not None or any(isinstance(z, ClientMessage) for z in items):
        if kernel is not None:
            raise ValueError("messages have the kernel of their feature map; give kernel only with rows of all clients")
        messages = [z if isinstance(z, ClientMessage) else ClientMessage.of(z, feature_map) for z in items]
        _check_alike(messages)
        if not messages[0].feature_sum.numel():
            raise ValueError("KID needs messages with features: ClientMessage.of(rows, feature_map)")
        counts = torch.stack([m.count for m in messages])
        means = torch.stack([m.feature_sum for m in messages]) / counts[:, None]
        inner = means @ means.mT
        squares = torch.stack([m.feature_squares for m in messages])
    else:
        rows = [on_host(check_matrix(z, "x" if i == 0 else f"client {i}").detach()) for i, z in enumerate(items)]  # type: ignore[arg-type]
        if len({z.shape[1] for z in rows}) > 1:
            raise ValueError(f"the sets have {[z.shape[1] for z in rows]} features per row; embed all with the same model")
        made = as_kernel(kernel or PolynomialKernel()).fit(torch.cat(rows))
        counts = torch.tensor([len(z) for z in rows], dtype=torch.float64)
        inner = torch.zeros(len(rows), len(rows), dtype=torch.float64)
        for i, j in combinations_with_replacement(range(len(rows)), 2):
            inner[i, j] = inner[j, i] = made(rows[i], rows[j]).mean()
        squares = torch.stack([made.diagonal(z).sum() for z in rows])
    if unbiased:
        if counts.min() < 2:
            raise ValueError("the unbiased KID needs at least two samples in each set; pass unbiased=False")
        own = inner.diagonal().clone()
        inner.diagonal().copy_((own * counts**2 - squares) / (counts * (counts - 1)))
    w = _weights(weights, counts[1:])
    distances = inner[0, 0] + inner.diagonal()[1:] - 2 * inner[0, 1:]
    return _scores(distances, inner[0, 0] + w @ inner[1:, 1:] @ w - 2 * w @ inner[0, 1:], w)


def _frechet(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> Tensor:
    return frechet_of_factors(mean_a, root(cov_a).mT, mean_b, root(cov_b).mT)


def fid_over_clients(
    x: Tensor | ClientMessage, clients: Sequence[Tensor | ClientMessage], weights: Sequence[float] | None = None
) -> ClientScores:
    """Frechet distance to each client's data, their average, and that to the mixture of all (arXiv 2310.11714).

    The covariance of the mixture has the differences of the clients' means in it: ``sum l_i (S_i + (mu_i - mu)(mu_i -
    mu)')``. So, unlike for KID, the two can rank models differently: with clients N(1, 1) and N(-1, 1), the models N(0,
    1.96) and N(0, 0.36) have distance 1.16 to each client, and 0.0002 and 0.66 to both together.

    Args:
        x: generated samples ``[n, d]``, or their message.
        clients: rows ``[n_i, d]`` of each client, or messages; ``d^2`` numbers each.
        weights: of the clients; by default in proportion to their numbers of samples: then ``over_all`` is the distance to
            the pooled rows.

    Raises:
        ValueError: for no clients, different widths, wrong weights, or fewer than two samples in a set.
    """
    _check_clients(clients)
    messages = [z if isinstance(z, ClientMessage) else ClientMessage.of(z) for z in (x, *clients)]
    _check_alike(messages, maps=False)
    counts = torch.stack([m.count for m in messages])
    if counts.min() < 2:
        raise ValueError("a Frechet distance needs at least two samples in each set")
    w = _weights(weights, counts[1:])
    means, scatters = torch.stack([m.mean for m in messages]), torch.stack([m.scatter for m in messages])
    covs = scatters / (counts - 1)[:, None, None]
    distances = torch.stack([_frechet(means[0], covs[0], m, c) for m, c in zip(means[1:], covs[1:], strict=True)])
    mean = w @ means[1:]
    between = (means[1:] - mean).mT @ ((means[1:] - mean) * w[:, None])
    if weights is None:  # of the pooled rows, with their degrees of freedom
        n = counts[1:].sum()
        cov = (scatters[1:].sum(0) + n * between) / (n - 1)
    else:
        cov = (w[:, None, None] * covs[1:]).sum(0) + between
    return _scores(distances, _frechet(means[0], covs[0], mean, cov), w)
