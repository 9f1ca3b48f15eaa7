"""What all objectives share: their interface, their gradient, and the pairs of samples that count."""

from dataclasses import dataclass, fields, is_dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.kernels import Kernel, l2_normalize
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.memory import Memory, MemoryBank, PromptWeights, Selection

__all__ = ["SAMPLE_BANDWIDTH", "TOLERANCE", "Gradient", "Objective", "Pairs", "natural_rows"]

# Bandwidth of samples, in median distances of the pairs at hand, where it is left open. At 1 every pair pushes about
# alike; at one half it is the near pairs that part: more modes at the same share of valid samples
# (benchmarks/where_to_push.py, effect.py).
SAMPLE_BANDWIDTH = 0.5
TOLERANCE = 1e-3  # memory rows left out weigh together at most this part of all, or of one row of the sample's own prompt


class Gradient(NamedTuple):
    """The derivative of an objective in the rows of a batch, and what a move needs to know beside it.

    Attributes:
        rows: ascent direction ``[n, d]``.
        effective_count: how many samples of its own prompt each row is compared with ``[n]``; None where that has no
            meaning.
        coincident: rows ``[n]`` (bool) that coincide with another entry, so that their direction is undefined; None where
            that cannot be. Given a ``jitter`` they are moved apart first.
    """

    rows: Tensor
    effective_count: Tensor | None = None
    coincident: Tensor | None = None


@dataclass(frozen=True)
class Pairs:
    """The pairs of samples that an objective sums over, with their weights: fixed for a run, as prompts and memory are.

    Attributes:
        inside: weights of the pairs inside the batch ``[n, n]``.
        selection: the memory rows that matter, with their weights; None without any.
        reference: the same of a reference set.
        coefficients: of the random features of the memory ``[n or 1, D]``, for objectives that use them.
        effective_count: see :class:`Gradient`.
        size: of batch and memory together.
    """

    inside: Tensor
    selection: Selection | None = None
    reference: Selection | None = None
    coefficients: Tensor | None = None
    effective_count: Tensor | None = None
    size: int = 0


class Objective:
    """Base class: a function of the feature rows of a batch, to be ascended.

    A subclass gives ``value`` and ``gradient``; ``pairs`` only if some of the work depends on prompts and memory alone.

    Attributes:
        normalize: whether rows are scaled to norm 1 before they are compared, so that moves turn a sample and do not
            scale it.
        conditional: whether prompts are used.
    """

    normalize: bool = True
    conditional: bool = False

    def make_memory(self) -> Memory:
        """An empty memory that this objective can use."""
        return MemoryBank()

    def pairs(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Any:
        """What of :meth:`gradient` depends on prompts and memory alone; made once a run.

        Args:
            x: rows ``[n, d]``, for their number, type and device.
            prompt_features: ``[n, p]`` of norm 1.
            memory: what was generated before.
        """
        return None

    def value(self, x: Tensor, prompt_features: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        """Scalar to be ascended, differentiable in ``x``; arguments as of :meth:`gradient`."""
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
            prompt_features: of the rows' prompts ``[n, p]``, of norm 1.
            memory: what was generated before.
            jitter: ``[n, d]``, added to rows that coincide with another entry.
            pairs: what :meth:`pairs` made of the same prompts and memory, to save making it again.
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

    def _select(
        self, prompt_features: Tensor | None, memory: Memory | None, prompt_weights: PromptWeights | None
    ) -> Selection | None:
        """The memory rows that matter; None without any."""
        if memory is None or not len(memory):
            return None
        return memory.select(prompt_features, prompt_weights, TOLERANCE, self.normalize)


def _short(value: Any) -> str:
    """A value on one line: of tensors the shape."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value)


def off_diagonal(n: int, like: Tensor) -> Tensor:
    """``[n, n]``: 0 on the diagonal and 1 elsewhere."""
    return 1 - torch.eye(n, dtype=like.dtype, device=like.device)


def check_closed_form(kernel: Kernel) -> None:
    """
    Raises:
        TypeError: for a kernel without a closed-form gradient.
    """
    if type(kernel).vjp is Kernel.vjp:
        kernel.vjp(torch.empty(0, 1), torch.empty(0, 1), torch.empty(0, 0))


def need_prompt_feature_map(name: str, feature_map: RandomFourierFeatures | None) -> RandomFourierFeatures:
    """
    Raises:
        ValueError: if there is none.
    """
    if feature_map is None:
        raise ValueError(
            f"{name} with feature_map= also needs prompt_feature_map=RandomFourierFeatures(prompt_kernel, width, ...)"
        )
    return feature_map


def natural_rows(x: Tensor, normalize: bool) -> Tensor:
    """Samples ``[n, ...]`` as feature rows ``[n, d]``, scaled to norm 1 if asked."""
    rows = as_float(x).flatten(1)
    return l2_normalize(rows) if normalize else rows
