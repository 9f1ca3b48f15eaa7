"""The base class of objectives, their gradients, and the pairs of samples that they sum over."""

from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import Kernel, l2_normalize
from kspec_guidance.kernels.base import as_kernel
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, Selection
from kspec_guidance.memory.selection import ALIKE

__all__ = ["SAMPLE_BANDWIDTH", "TOLERANCE", "Gradient", "Objective", "Pairs", "natural_rows"]

# Default bandwidth of samples, in median distances of the pairs. At 1 all pairs repel about equally; at 0.5 near pairs
# repel most: more modes at the same share of valid samples (benchmarks/where_to_push.py, effect.py).
SAMPLE_BANDWIDTH = 0.5
TOLERANCE = 1e-3  # maximum share of the total weight (or of 1, if that is larger) in memory rows that are dropped


class Gradient(NamedTuple):
    """The derivative of an objective in the rows of a batch, and further data for moves.

    Attributes:
        rows: ascent direction ``[n, d]``.
        effective_count: effective number of samples of its own prompt that each row is compared with ``[n]``; None if
            undefined.
        coincident: mask ``[n]`` of rows that coincide with another entry, so that their direction is undefined; None if
            this cannot happen. A ``jitter`` separates them first. On the CPU if the objective has read other values of
            the device already, else on the device of the rows.
        finite: False if the objective has read values that are NaN or infinite.
        spread: median distance of the pairs of the same prompt, of rows of norm 1, a tensor of one element; None if the
            objective does not measure it.
    """

    rows: Tensor
    effective_count: Tensor | None = None
    coincident: Tensor | None = None
    finite: bool = True
    spread: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """The pairs of samples that an objective sums over, with their weights; constant in a run, as prompts and memory are.

    Attributes:
        inside: weights of the pairs within the batch ``[n, n]``.
        selection: relevant memory rows with their weights; None if there are none.
        reference: relevant rows of a reference set with their weights; None if there are none.
        coefficients: coefficients of random features ``[n or 1, D]``, for objectives that use them.
        effective_count: see :class:`Gradient`.
        size: number of samples in batch and memory.
    """

    inside: Tensor
    selection: Selection | None = None
    reference: Selection | None = None
    coefficients: Tensor | None = None
    effective_count: Tensor | None = None
    size: int = 0

    @cached_property
    def alike(self) -> Tensor:
        """1 for pairs within the batch whose weight is that of the same prompt, and 0 for others ``[n, n]``."""
        return (self.inside > ALIKE).to(self.inside)


class Objective:
    """Base class: a function of the feature rows of a batch, which guidance ascends.

    A subclass implements ``value`` and ``gradient``, and ``pairs`` if part of the work depends only on prompts and memory.

    Attributes:
        normalize: whether rows are scaled to norm 1 before they are compared, so that moves rotate a sample without
            scaling it.
        conditional: whether prompts are used.
        measures_spread: whether gradients have a ``spread``.
        has_reference: whether samples are compared with fixed rows.
        recalls: whether a memory is read only through the ``selection`` of :class:`Pairs`, so that a guide may repel from
            its rows in another way, and of the objective use what it is without a memory.
    """

    normalize: bool = True
    conditional: bool = False
    measures_spread: bool = False
    has_reference: ClassVar[bool] = False
    recalls: ClassVar[bool] = False

    def make_memory(self) -> Memory:
        """An empty memory that this objective can use."""
        return MemoryBank()

    def advice(self, prompts: int, memory: Memory) -> str | None:
        """A warning for a call with so many different prompts; None if the objective suits it."""
        return None

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Any:
        """The part of :meth:`gradient` that depends only on prompts and memory; computed once per run.

        Args:
            x: rows ``[n, d]``, for their number, dtype and device.
            prompt_features: ``[n, p]`` of norm 1.
            memory: memory of earlier samples.
        """
        return None

    def spread(self, x: Tensor, pairs: Any) -> Tensor:
        """The ``spread`` of a gradient at these rows, of objectives that measure it."""
        raise NotImplementedError

    def fit(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> "Objective":
        """This objective with an open bandwidth set from these rows, as :meth:`value` would set it; itself without one."""
        return self

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """The objective, a scalar that is differentiable in ``x``; arguments as for :meth:`gradient`."""
        raise NotImplementedError

    def gradient(
        self,
        x: Tensor,
        prompt_features: Tensor | None = None,
        memory: Memory | None = None,
        *,
        jitter: Tensor | None = None,
        pairs: Any = None,
    ) -> Gradient:
        """The derivative of :meth:`value` in ``x``, in closed form.

        Args:
            x: feature rows ``[n, d]``, of norm 1 if ``normalize``.
            prompt_features: ``[n, p]`` of norm 1.
            memory: memory of earlier samples.
            jitter: ``[n, d]``, added to rows that coincide with another entry.
            pairs: result of :meth:`pairs` for the same prompts and memory; computed if None.
        """
        raise NotImplementedError

    def __repr__(self) -> str:
        if not is_dataclass(self):
            return f"{type(self).__name__}()"
        values = [(f.name, getattr(self, f.name)) for f in fields(self) if f.init]
        shown = [f"{name}={_short(value)}" for name, value in values if value is not None]
        return f"{type(self).__name__}({', '.join(shown)})"

    def _prompts(self, prompt_features: Tensor | None) -> Tensor | None:
        return prompt_features if self.conditional else None

    def _check_prompts(self, prompt_features: Tensor | None, memory: Memory | None) -> Tensor | None:
        """The prompt features, if they are used, checked to have the width of those in memory."""
        prompt_features = self._prompts(prompt_features)
        known = memory.prompt_dim if memory is not None and len(memory) else None
        if prompt_features is not None and known is not None and prompt_features.shape[-1] != known:
            raise ValueError(
                f"prompt features have width {prompt_features.shape[-1]}, those in memory {known}; "
                "use one text encoder with one memory, or clear() the memory"
            )
        return prompt_features

    def _select(
        self, prompt_features: Tensor | None, memory: Memory | None, prompt_weights: PromptWeights | None
    ) -> Selection | None:
        """The relevant memory rows; None if the memory is empty."""
        if memory is None or not len(memory):
            return None
        return memory.select(prompt_features, prompt_weights, TOLERANCE, self.normalize)


def _short(value: Any) -> str:
    """A value on one line; the shape for tensors."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)


def off_diagonal(n: int, like: Tensor) -> Tensor:
    """``[n, n]``: 0 on the diagonal and 1 elsewhere."""
    return 1 - torch.eye(n, dtype=like.dtype, device=like.device)


def differentiable(kernel: Kernel) -> Kernel:
    """A kernel that has gradients; a plain function becomes a kernel.

    Raises:
        TypeError: for a kernel without a closed-form gradient, and for anything that is no kernel.
    """
    kernel = as_kernel(kernel)
    if type(kernel).vjp is Kernel.vjp:
        kernel.vjp(torch.empty(0, 1), torch.empty(0, 1), torch.empty(0, 0))  # raises, and names the class
    return kernel


def need_prompt_feature_map(name: str, feature_map: RandomFourierFeatures | None) -> RandomFourierFeatures:
    """The feature map of prompts, checked to be given.

    Raises:
        ValueError: if it is None.
    """
    if feature_map is None:
        raise ValueError(
            f"{name} with feature_map= also needs prompt_feature_map=RandomFourierFeatures(prompt_kernel, width, ...)"
        )
    return feature_map


def natural_rows(x: Tensor, normalize: bool) -> Tensor:
    """Samples ``[n, ...]`` as feature rows ``[n, d]``, scaled to norm 1 if ``normalize``."""
    rows = as_float(x).flatten(1)
    return l2_normalize(rows) if normalize else rows
