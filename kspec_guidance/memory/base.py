"""Memory: the base class of all memories, and the checks of their entries."""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import torch
from torch import Tensor

from kspec_guidance.kernels import l2_normalize
from kspec_guidance.kernels.distances import as_float
from kspec_guidance.utils.devices import normal, normal_tensors
from kspec_guidance.utils.hashing import same_network
from kspec_guidance.utils.transfer import on_host

if TYPE_CHECKING:
    from kspec_guidance.memory.selection import PromptWeights, Selection

__all__ = ["Memory"]

P = ParamSpec("P")
R = TypeVar("R")
_lock = threading.RLock()  # one for all memories: two can be merged, and each can be copied and pickled


def exclusive(method: Callable[P, R]) -> Callable[P, R]:
    """Make a method of a memory run in one thread at a time, with tensors that are usable in and out of inference mode."""

    @functools.wraps(method)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        with _lock, normal_tensors():
            return method(*args, **kwargs)

    return wrapped


def _rows_of(x: Tensor, name: str, read: bool = False) -> Tensor:
    """Rows ``[n, d]``, on the host if they are to be read."""
    if not isinstance(x, Tensor) or x.ndim < 2 or x.shape[0] == 0:
        got = list(x.shape) if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(f"{name} must be a tensor [n, ...] with n of at least 1, got {got}")
    if x.device.type == "meta":
        raise ValueError(f"{name} are on the device 'meta' and have no values; nothing was added")
    x = on_host(x) if read else x
    return (x if x.is_floating_point() else x.float()).detach().flatten(1)


def check_finite(rows: Tensor, name: str) -> Tensor:
    """``rows``, which are on the host, checked to be finite.

    Raises:
        ValueError: if they are not.
    """
    if not torch.isfinite(rows).all():
        raise ValueError(f"{name} contain NaN or infinite values; nothing was added")
    return rows


def _agree(encoder: str | None, other: str | None) -> bool:
    """Whether two prompt encoders may be the same; an unknown one may be any."""
    return encoder is None or other is None or same_network(encoder, other)


def _same_space(space: str, other: str) -> bool:
    """Whether two labels of spaces may be of one; older files have the names alone.

    >>> _same_space("pooled", "pooled(project=16, seed=0)"), _same_space("block(blocks.1)", "block(blocks.2)")
    (True, False)
    """
    (name, _, settings), (other_name, _, others) = space.partition("("), other.partition("(")
    return name == other_name and (not settings or not others or same_network(settings, others))


class Memory:
    """Base class: generated samples, in a form that objectives can sum over.

    A subclass implements ``add``, ``merge``, ``clear``, ``save``, ``empty_copy`` and ``__len__``, and one of
    :meth:`select` (rows) and :meth:`coefficients` (one sum of random features).

    Attributes:
        shape: shape of one entry; None until it is known.
        space: label of the entries' feature space; set by the first guide that uses the memory.
        prompt_encoder: fingerprint of the encoder of the prompt features; set likewise.
        prompt_dim: width of the prompt features; None if there are none.
    """

    shape: tuple[int, ...] | None
    space: str | None
    prompt_encoder: str | None
    prompt_dim: int | None

    def __init__(self, space: str | None = None, prompt_encoder: str | None = None):
        self.space, self.prompt_encoder = space, prompt_encoder
        self.shape = self.prompt_dim = None

    def __len__(self) -> int:
        raise NotImplementedError

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update({name: normal(x) if isinstance(x, Tensor) else x for name, x in state.items()})

    def add(self, x: Tensor, prompt_features: Tensor | None = None) -> None:
        """Add samples ``[n, ...]`` and their prompt features ``[n, p]``; after an error the memory is unchanged."""
        raise NotImplementedError

    def merge(self, other: Any) -> "Memory":
        """Add the entries of another memory of the same class."""
        raise NotImplementedError

    def clear(self) -> None:
        """Remove all entries."""
        raise NotImplementedError

    def empty_copy(self) -> "Memory":
        """A memory with the same settings and no entries."""
        raise NotImplementedError

    def save(self, path: str | os.PathLike) -> None:
        """Write a safetensors file with a checksum; the file appears whole or not at all."""
        raise NotImplementedError

    def select(
        self,
        prompt_features: Tensor | None = None,
        prompt_weights: "PromptWeights | None" = None,
        tolerance: float = 0.0,
        normalize: bool = True,
    ) -> "Selection":
        """The relevant rows for samples of these prompts, with their weights.

        Args:
            prompt_features: ``[n, p]`` of norm 1; None for equal weights.
            prompt_weights: weight of a row given its prompt; None for equal weights.
            tolerance: largest share of the total weight in dropped rows, see :func:`prune`.
            normalize: whether rows are scaled to norm 1.

        Raises:
            TypeError: for a memory that does not store rows.
        """
        raise TypeError(
            f"{type(self).__name__} does not store rows, so an objective without feature_map= cannot use it; use a "
            "MemoryBank or a CentroidMemory"
        )

    def parts(self, count: int) -> "Sequence[Memory]":
        """Memories of ``count`` equal parts of each entry, for reading only.

        Raises:
            TypeError: for a memory whose entries cannot be divided.
        """
        raise TypeError(
            f"space={self.space!r} compares features of the same step, and a {type(self).__name__} does not keep those of "
            "each step apart; use a MemoryBank"
        )

    def coefficients(self, prompt_features: Tensor | None, like: Tensor) -> Tensor:
        """``sum_i k_T(t, s_i) phi(m_i)`` ``[n or 1, D]`` for prompt features ``[n, p]``, in the dtype of ``like``.

        Raises:
            TypeError: for a memory that stores rows.
        """
        raise TypeError(f"feature_map= needs a RandomFeatureMemory, got {type(self).__name__}")

    def bind(self, shape: tuple[int, ...], space: str, prompt_encoder: str | None) -> None:
        """Bind the memory to a pipeline, and set attributes that are still unknown.

        Raises:
            ValueError: if the memory holds entries of another shape, space or prompt encoder.
        """
        shape = tuple(shape)
        if len(self):
            advice = "use a separate memory for each, or clear() this one"
            if self.space is not None and not _same_space(self.space, space):
                raise ValueError(f"memory holds entries of space {self.space!r}, this guide works in {space!r}; {advice}")
            if self.shape not in (None, shape):
                raise ValueError(f"memory holds features of shape {self.shape}, this pipeline makes {shape}; {advice}")
            if not _agree(self.prompt_encoder, prompt_encoder):
                raise ValueError(
                    f"memory holds prompts encoded by {self.prompt_encoder}, this pipeline uses {prompt_encoder}; {advice}"
                )
        self.shape, self.space = shape, space
        self.prompt_encoder = prompt_encoder if prompt_encoder is not None else self.prompt_encoder

    def _check(self, x: Tensor, prompt_features: Tensor | None) -> tuple[Tensor, Tensor | None, tuple[int, ...]]:
        """Rows ``[n, d]`` where they are, finite unit prompt features ``[n, p]`` on the host, and the shape of one sample.

        The rows' values are not read, so that each memory copies them from the device once.
        """
        rows, shape = _rows_of(x, "samples"), tuple(x.shape[1:])
        if self.shape is not None and self.shape != shape:
            raise ValueError(f"memory holds features of shape {self.shape}, got {shape}; use a separate memory")
        if prompt_features is not None:
            prompt_features = _rows_of(prompt_features, "prompt features", read=True)
            if len(prompt_features) != len(rows):
                raise ValueError(f"{len(rows)} samples but {len(prompt_features)} prompt features; pass one row per sample")
        if len(self):
            width = None if prompt_features is None else prompt_features.shape[1]
            if self.prompt_dim != width:
                holds = "no prompts" if self.prompt_dim is None else f"prompt features of width {self.prompt_dim}"
                got = "no prompts" if width is None else f"width {width}"
                raise ValueError(f"memory holds {holds}, got {got}; use a separate memory, or clear() this one")
        if prompt_features is not None:
            prompt_features = l2_normalize(check_finite(as_float(prompt_features), "prompt features"))
        return rows, prompt_features, shape

    def _description(self) -> dict[str, Any]:
        """Description of the entries, for a file."""
        return {
            "shape": self.shape,
            "space": self.space,
            "prompt_encoder": self.prompt_encoder,
            "prompt_dim": self.prompt_dim,
        }

    def _check_mergeable(self, other: "Memory") -> None:
        if type(self) is not type(other):
            raise TypeError(f"cannot merge a {type(other).__name__} into a {type(self).__name__}")
        if not (len(self) and len(other)):
            return
        for name in ("shape", "space", "prompt_encoder", "prompt_dim"):
            mine, theirs = getattr(self, name), getattr(other, name)
            unknown = name == "space" and (None in (mine, theirs) or _same_space(mine, theirs))
            if mine != theirs and not unknown and not (name == "prompt_encoder" and _agree(mine, theirs)):
                raise ValueError(f"memories differ in {name}: {mine} here, {theirs} there; they cannot be merged")

    def _adopt(self, other: "Memory") -> None:
        """Copy the attributes of ``other`` that are unknown here."""
        for name in ("shape", "space", "prompt_encoder", "prompt_dim"):
            if getattr(self, name) is None:
                setattr(self, name, getattr(other, name))
