"""Objectives from the witness function of the MMD: toward a reference, or one of several."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel, l2_normalize
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, RandomFeatureMemory, Selection
from kspec_guidance.objectives.base import Gradient, Objective, differentiable, natural_rows

__all__ = ["Balance", "Witness"]

# Default bandwidth, in median distances of the references (python benchmarks/toward_style.py --bandwidths compares)
BANDWIDTH = 2.0
LEAST_WEIGHT = 1e-3  # of a row of an unrelated prompt, relative to one of the same prompt


def _set_of(x: Tensor, name: str, normalize: bool) -> Tensor:
    """The rows of a fixed set. NaN in one of them would leave every image as it is, without a word."""
    if not isinstance(x, Tensor):
        raise TypeError(
            f"{name} must be a tensor of samples [m, ...], got {type(x).__name__}; torch.stack makes one of a list"
        )
    if not torch.isfinite(x).all():
        raise ValueError(f"{name} contains NaN or infinite values; remove those samples")
    return natural_rows(x, normalize)


class _Rows(NamedTuple):
    """Fixed rows ``[m, d]`` and their weights ``[n, m]``; memory rows, each counted ``each`` ``[n, 1]`` less, or None."""

    rows: Tensor
    weights: Tensor
    memory: Selection | None = None
    each: Tensor | None = None


class _WeightedRows(Objective):
    """Ascends ``sum_r w_r k(x, r)`` over fixed rows r, with weights that may depend on the sample."""

    has_reference: ClassVar[bool] = True
    feature_map: RandomFourierFeatures | None = None
    fitted: Kernel
    _rows: Tensor

    def _weights(self, n: int, prompt_features: Tensor | None) -> Tensor:
        """Weights of the rows for each sample ``[n or 1, m]``."""
        raise NotImplementedError

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self._rows.shape[1]:
            raise ValueError(
                f"the reference set has rows of length {self._rows.shape[1]}, samples have {x.shape[-1]}; encode the "
                "references with this pipeline's autoencoder at the generated resolution"
            )

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Any:
        """Rows and their weights on the device of the samples; coefficients ``[n, D]`` of random features."""
        self._check_width(x)
        weights = self._weights(len(x), self._prompts(prompt_features))
        if self.feature_map is not None:
            return (weights.double() @ self.feature_map(self._rows).double()).to(x).expand(len(x), -1)
        return _Rows(self._rows.to(x), weights.to(x).expand(len(x), -1))

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory)
        if self.feature_map is not None:
            return (self.feature_map(x) * pairs).sum()
        found = (self.fitted(x, pairs.rows) * pairs.weights).sum()
        if pairs.memory is None:
            return found
        weights = pairs.memory.vectors(x)[2]
        of_memory = pairs.memory.kernel(self.fitted, x) * (1.0 if weights is None else weights)
        return found - (pairs.each * of_memory).sum()

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Any = None,
    ) -> Gradient:
        x = as_float(x)
        pairs = self.pairs(x, prompt_features, memory) if pairs is None else pairs
        if self.feature_map is not None:
            return Gradient(self.feature_map.vjp(x, pairs))
        g = self.fitted.vjp(x, pairs.rows, pairs.weights)
        if pairs.memory is not None:
            g = g - pairs.each * pairs.memory.kernel_gradient(self.fitted, x)[0]
        return Gradient(g)


@dataclass(repr=False)
class Witness(_WeightedRows):
    """Ascends the witness function of the MMD, ``mean_r k(x, r) - mean_b k(x, b)`` (Gretton et al. 2012, section 2.3).

    r are references, and b is a baseline: what the model makes anyway, over many prompts. Subjects, which both sides
    have, cancel; what the references have in common, such as a style, remains. A batch of one prompt therefore moves
    toward the style at once, where the gradient of :class:`MMD` compares the batch itself with the references, and so
    first spreads the batch over their subjects. With ``count_memory`` each sample in memory is one more row of the
    baseline, so what earlier calls made repels, and the pull toward the style ends where it is reached.

    Args:
        reference: samples ``[m, ...]`` of the same space as the generated ones.
        baseline: samples ``[b, ...]`` of the model without guidance, over many prompts.
        kernel: by default Gaussian at twice the median distance of the references; of both sets for one reference.
        reference_prompts: prompt features ``[m, p]``; with ``baseline_prompts`` each sample is compared with rows of
            similar prompts.
        baseline_prompts: prompt features ``[b, p]``.
        prompt_kernel: by default Gaussian with bandwidth 0.35, on unit-norm prompt features.
        feature_map: random features of the kernel (Gaussian or Laplacian): both sets are then one vector.
        normalize: whether samples are scaled to norm 1 first.
        count_memory: whether samples in memory are rows of the baseline too; the memory is not used otherwise.

    Raises:
        TypeError: for a kernel without a closed-form gradient, or a set that is no tensor.
        ValueError: for sets that differ in shape or are not finite, or prompts of one of them only; by ``value`` and
            ``gradient``, for samples of another width, or without prompt features where they are needed.
    """

    reference: Tensor
    baseline: Tensor
    kernel: Kernel = field(default_factory=GaussianKernel)
    reference_prompts: Tensor | None = None
    baseline_prompts: Tensor | None = None
    prompt_kernel: Kernel = field(default_factory=lambda: GaussianKernel(PROMPT_BANDWIDTH))
    feature_map: RandomFourierFeatures | None = None
    normalize: bool = False
    count_memory: bool = False

    def __post_init__(self) -> None:
        self.kernel, self.prompt_kernel = differentiable(self.kernel), as_kernel(self.prompt_kernel)
        prompts = [p for p in (self.reference_prompts, self.baseline_prompts) if p is not None]
        if len(prompts) == 1:
            raise ValueError("a prompt-aware witness needs reference_prompts and baseline_prompts, got one of them")
        if prompts and self.feature_map is not None:
            raise ValueError("a prompt-aware witness is exact; leave out feature_map, or the prompts")
        named = (("reference", self.reference), ("baseline", self.baseline))
        sets = [_set_of(x, name, self.normalize).cpu() for name, x in named]
        if not min(map(len, sets)) or sets[0].shape[1] != sets[1].shape[1]:
            shapes = f"{list(self.reference.shape)} and {list(self.baseline.shape)}"
            raise ValueError(f"reference and baseline must be samples of one shape, one or more of each, got {shapes}")
        for x, t, name in zip(sets, prompts, ("reference", "baseline"), strict=False):
            if len(x) != len(t):
                raise ValueError(f"{name} has {len(x)} samples and {len(t)} rows of prompt features")
        self.conditional = bool(prompts)
        alike = bool((sets[0] == sets[0][0]).all())  # one reference, or copies, have no distance
        self.fitted = self.kernel.fit(torch.cat(sets) if alike else sets[0])
        if self.kernel.open and isinstance(self.fitted, GaussianKernel) and self.fitted.bandwidth is not None:
            self.fitted = GaussianKernel(BANDWIDTH * self.fitted.bandwidth)
        self._rows, self._count = torch.cat(sets), len(sets[0])
        self._prompt_rows = l2_normalize(torch.cat([p.cpu().float() for p in prompts])) if prompts else None

    def make_memory(self) -> Memory:
        if self.count_memory and self.feature_map is not None:
            return RandomFeatureMemory(self.feature_map, None, self.normalize)
        return MemoryBank()

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Any:
        """Rows and their weights on the device of the samples; coefficients ``[n, D]`` of random features."""
        if not self.count_memory or memory is None or not len(memory):
            return super().pairs(x, prompt_features, memory)
        self._check_width(x)
        t = self._prompts(prompt_features)
        own, other = self._near(t)
        if self.feature_map is not None:
            phi, number = self.feature_map(self._rows).double(), other.shape[1] + len(memory)
            made = phi[self._count :].sum(0) + memory.coefficients(None, phi)
            return (phi[: self._count].mean(0) - made / number).to(x).expand(len(x), -1)
        of_prompt = PromptWeights(self.prompt_kernel, 1) if self.conditional else None
        counted = self._select(t, memory, of_prompt)
        assert counted is not None
        total = other.sum(1, keepdim=True) + counted.effective_count(len(x))[:, None].to(other)
        weights = torch.cat([(own / own.sum(1, keepdim=True)).expand(len(x), -1), -other / total], 1)
        return _Rows(self._rows.to(x), weights.to(x), counted, (1 / total).to(x))

    def _weights(self, n: int, prompt_features: Tensor | None) -> Tensor:
        own, other = self._near(prompt_features)
        return torch.cat([own / own.sum(1, keepdim=True), -other / other.sum(1, keepdim=True)], 1)

    def _near(self, prompt_features: Tensor | None) -> tuple[Tensor, Tensor]:
        """Weights of references ``[n or 1, m]`` and baseline ``[n or 1, b]``, from their prompts and the samples'."""
        if self._prompt_rows is None:
            return torch.ones(1, self._count), torch.ones(1, len(self._rows) - self._count)
        if prompt_features is None:
            raise ValueError("a prompt-aware witness needs prompt features, but this call has none; omit reference_prompts")
        near = self.prompt_kernel(prompt_features, self._prompt_rows.to(prompt_features)).clamp_min(LEAST_WEIGHT)
        return near[:, : self._count], near[:, self._count :]


@dataclass(repr=False)
class Balance(_WeightedRows):
    """Ascends ``mean_r k(x, r) - mean_s k(x, s)``, with the references r of the sample's attribute and s of all others.

    This is the witness function of the MMD between the attribute's distribution and the others' (Gretton et al. 2012,
    section 2.3): features that the reference sets share, such as subjects, cancel.

    Args:
        references: samples ``[m_a, ...]`` of each attribute.
        kernel: by default Gaussian at the median distance of all references.
        normalize: whether samples are scaled to norm 1 first.

    Raises:
        ValueError: for reference sets that differ in shape, or samples of another width.
    """

    references: Sequence[Tensor]
    kernel: Kernel = field(default_factory=GaussianKernel)
    normalize: bool = False

    def __post_init__(self) -> None:
        rows = [_set_of(r, "a reference set", self.normalize) for r in self.references]
        if len({r.shape[1] for r in rows}) != 1:
            raise ValueError(f"reference sets differ in shape: {[list(r.shape[1:]) for r in self.references]}")
        self._rows = torch.cat(rows)
        self._attribute = torch.cat([torch.full((len(r),), k) for k, r in enumerate(rows)])
        self.fitted = self.kernel.fit(self._rows)
        self.wanted: list[int] = []  # the attribute of each sample of the current batch

    def _weights(self, n: int, prompt_features: Tensor | None) -> Tensor:
        wanted = self.wanted if len(self.wanted) == n else [0] * n
        own = torch.as_tensor(wanted)[:, None] == self._attribute
        return own / own.sum(1, keepdim=True) - ~own / (~own).sum(1, keepdim=True)

    def assign(self, x: Tensor) -> list[int]:
        """The attribute of each sample ``[n, ...]``: that of the reference set with the largest mean kernel."""
        k = self.fitted(natural_rows(x, self.normalize).to(self._rows), self._rows)
        means = torch.stack([k[:, self._attribute == a].mean(1) for a in range(len(self.references))], 1)
        return means.argmax(1).tolist()
