"""StreamingMetric: sums whose size the first batch determines, and intervals from groups of samples."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.functional.inputs import check_samples
from kspec_guidance.kernels import CosineKernel, GaussianKernel, Kernel, LaplacianKernel, l2_normalize
from kspec_guidance.kernels.spectrum import ROWS, accumulate_gram, mirror_upper
from kspec_guidance.statistics import Interval, jackknife_interval

__all__ = ["StreamMap", "StreamingMetric", "flat_rows"]


def flat_rows(x: Tensor, name: str = "x") -> Tensor:
    """Rows ``[n, d]``; an empty batch is allowed."""
    if isinstance(x, Tensor) and x.ndim == 2 and len(x) == 0:
        return x.detach().float()
    x = check_samples(x, name)
    if x.ndim != 2:
        raise ValueError(f"{name} must have shape [n, d], got {list(x.shape)}; flatten each sample to one row")
    return x.detach()


class StreamMap:
    """Samples to rows whose inner products are the kernel: unit rows for cosine, random Fourier features otherwise.

    Raises:
        ValueError: for a kernel without a map of fixed size, or without a bandwidth.
    """

    def __init__(self, kernel: Kernel | None, num_features: int, seed: int):
        self.kernel, self.num_features, self.seed = kernel or CosineKernel(), num_features, seed
        if isinstance(self.kernel, GaussianKernel | LaplacianKernel):
            RandomFourierFeatures(self.kernel, 1, num_features, seed=seed)  # checks the settings before the first batch
        elif not isinstance(self.kernel, CosineKernel):
            raise ValueError(
                f"{kernel!r} has no feature map of fixed size and cannot be streamed; use CosineKernel, GaussianKernel or "
                "LaplacianKernel, or kspec_guidance.functional on all samples at once"
            )
        self._maps: dict[int, RandomFourierFeatures] = {}

    def __call__(self, x: Tensor) -> Tensor:
        """``[n, D]`` in float32, or float64 for float64 samples."""
        if isinstance(self.kernel, CosineKernel):
            u = l2_normalize(x.double())
            return torch.cat([u, (x == 0).all(dim=1, keepdim=True).to(u)], dim=1)  # rows of zeros equal each other
        width = x.shape[1]
        if width not in self._maps:
            assert isinstance(self.kernel, GaussianKernel | LaplacianKernel)
            self._maps[width] = RandomFourierFeatures(self.kernel, width, self.num_features, seed=self.seed)
        return self._maps[width].to(x.device)(x)

    def record(self) -> dict[str, Any]:
        """The kernel, and how its features are computed."""
        exact = isinstance(self.kernel, CosineKernel)
        features = "exact" if exact else f"random Fourier, {self.num_features}"
        return {"kernel": repr(self.kernel), "features": features, "seed": None if exact else self.seed}


class StreamingMetric(Metric):
    """Base class: named sums ``[groups, a, b]`` in float64 and numbers of samples ``[groups]``.

    Of a sum of products of features with themselves only the part on and above the diagonal is kept: :meth:`_moment` copies
    it to the part below.

    ``update`` takes rows on any device and moves them to the metric's. Sums stay in float64 whatever ``.to(dtype)`` says,
    and a metric that is moved to a device without float64 (Apple's MPS) stays on the host.

    Args:
        groups: number of groups that samples are assigned to in turn; :meth:`interval` leaves out one group at a time.
            Memory is proportional to it. With 1 there are no intervals.
        kwargs: passed to ``torchmetrics.Metric``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    counts: tuple[str, ...] = ("count",)
    sums: tuple[str, ...] = ()  # states that are sums of feature products
    crossed: tuple[str, ...] = ()  # those of products with other features, which are not symmetric

    def __init__(self, groups: int = 1, **kwargs: Any):
        super().__init__(**kwargs)
        if groups < 1:
            raise ValueError(f"groups must be at least 1, got {groups}")
        self.groups = groups
        self._widths: dict[str, int] = {}  # features per row, by argument of update
        for name in self.counts:
            self.add_state(name, torch.zeros(groups, dtype=torch.int64), dist_reduce_fx="sum", persistent=True)
        for name in self.sums:  # a scalar 0 until the first batch determines the size
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True)

    def _apply(self, fn: Callable, exclude_state: Any = "") -> "StreamingMetric":
        device = fn(torch.zeros(1)).device
        if device.type == "mps":
            return self
        return super()._apply(lambda t: t.to(device), exclude_state)

    def _rows(self, x: Tensor, name: str = "x") -> Tensor:
        """Rows ``[n, d]`` on the metric's device; random features of other widths than before would add up unnoticed."""
        x = flat_rows(x, name)
        if not len(x):
            return x
        if not any(int(getattr(self, count).sum()) for count in self.counts):
            self._widths.pop(name, None)
        self._check_width(name, self._widths.setdefault(name, x.shape[1]), x.shape[1])
        return x.to(self.device)

    def _check_width(self, name: str, before: int, now: int) -> None:
        if now != before:
            raise ValueError(
                f"{type(self).__name__} has {name} of {before} features per row, and this batch has {now}; use one "
                "embedder for all batches, or call reset()"
            )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Add a batch, and return the score of this batch alone."""
        before = dict(self._widths) if self._update_count else {}
        value = super().forward(*args, **kwargs)
        for name, width in before.items():
            self._check_width(name, width, self._widths[name])
        return value

    def _deal(self, n: int, count: str) -> list[slice]:
        """Rows of each group: sample k of this process belongs to group k modulo ``groups``."""
        before = int(getattr(self, count).sum())
        return [slice((g - before) % self.groups, n, self.groups) for g in range(self.groups)]

    def _accumulate(self, name: str, count: str, a: Tensor, b: Tensor | None = None) -> None:
        """Add ``a' b`` (``a' a``) of each group's rows to the sum ``name``."""
        total = getattr(self, name)
        if total.is_inference() and not torch.is_inference_mode_enabled():
            total = total.clone()
        size = (self.groups, a.shape[1], a.shape[1] if b is None else b.shape[1])
        if total.ndim == 0:
            total = torch.zeros(size, dtype=torch.float64, device=a.device)
        elif total.shape != size:
            raise ValueError(
                f"{type(self).__name__} holds sums of shape {list(total.shape[1:])}, and this batch gives "
                f"{list(size[1:])}; use one embedder for all batches, or call reset()"
            )
        for g, rows in enumerate(self._deal(len(a), count)):
            accumulate_gram(total[g], a[rows], None if b is None else b[rows])
        setattr(self, name, total)

    def _add(self, name: str, count: str, x: Tensor, feature_map: StreamMap) -> None:
        """Add the products of the features of rows ``[n, d]``, of some rows at a time, and their number."""
        for part in x.split(ROWS * self.groups) if len(x) else ():
            self._accumulate(name, count, feature_map(part))
            self._counted(len(part), count)

    def _counted(self, n: int, count: str) -> None:
        dealt = [len(range(n)[rows]) for rows in self._deal(n, count)]
        setattr(self, count, getattr(self, count) + torch.tensor(dealt, device=getattr(self, count).device))

    def _sync_dist(self, dist_sync_fn: Callable | None = None, process_group: Any = None) -> None:
        """As torchmetrics', but a process without samples takes the sizes of the sums from the others first."""
        from torchmetrics.utilities.distributed import gather_all_tensors

        gather = gather_all_tensors if dist_sync_fn is None else dist_sync_fn
        group = process_group or self.process_group
        for name in self.sums:
            total = getattr(self, name)
            shape = torch.tensor([*total.shape] if total.ndim else [0, 0, 0], device=self.device)
            widest = torch.stack(gather(shape, group=group)).amax(0).tolist()
            if total.ndim == 0 and any(widest):
                setattr(self, name, torch.zeros(widest, dtype=torch.float64, device=self.device))
        super()._sync_dist(gather, process_group)

    def _moment(self, name: str, count: str, keep: Tensor) -> Tensor:
        """The sum over the groups in ``keep`` (a mask), divided by their number of samples."""
        total, n = getattr(self, name), getattr(self, count)[keep].sum()
        if total.ndim == 0 or n == 0:
            raise ValueError(f"{type(self).__name__} has no samples{self._of(count)}; call update first")
        moment = total[keep].sum(0) / n
        if name not in self.crossed:
            mirror_upper(moment)
        return moment

    def _of(self, count: str) -> str:
        return ""

    def _score(self, keep: Tensor) -> Tensor:
        """The score of the groups in ``keep``."""
        raise NotImplementedError

    def compute(self) -> Tensor:
        """The score of all samples, float64.

        Raises:
            ValueError: without samples.
        """
        return self._score(torch.ones(self.groups, dtype=torch.bool, device=self.device))

    def interval(self, level: float = 0.95) -> Interval:
        """Confidence interval by the delete-a-group jackknife, from the sums alone.

        Raises:
            ValueError: with fewer than 4 groups, or fewer samples than groups.
        """
        if self.groups < 4:
            raise ValueError(f"an interval needs groups=4 or more (10 is usual), this metric has groups={self.groups}")
        if any(int(getattr(self, c).amin()) == 0 for c in self.counts):
            raise ValueError("an interval needs at least one sample in each group")
        one_group = torch.eye(self.groups, dtype=torch.bool, device=self.device)
        left_out = torch.stack([self._score(~g) for g in one_group])
        return jackknife_interval(self.compute(), left_out, level)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or a list of values over time, with torchmetrics; returns ``(figure, axes)``."""
        return self._plot(val, ax)

    def record(self) -> dict[str, Any]:
        """Name, numbers of samples and settings: what is needed to reproduce the score."""
        return {"score": type(self).__name__, **{c: int(getattr(self, c).sum()) for c in self.counts}}
