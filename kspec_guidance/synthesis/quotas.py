"""Attributes in wanted shares: each image is drawn to the reference set of one attribute, and away from the others'."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.demo import load_demo_reference
from kspec_guidance.distances import as_float
from kspec_guidance.encoding import encode_reference
from kspec_guidance.kernels import GaussianKernel, Kernel
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import Objective, natural_rows
from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["Attribute", "Balance", "allot", "read_attribute", "split_quotas"]


@dataclass(frozen=True)
class Attribute:
    """A wanted share of all images.

    Args:
        reference: ``[m, ...]`` samples that show the attribute, in the guide's space (:func:`encode_reference` makes them).
        share: of the images; the shares of all attributes are scaled to sum to 1.
    """

    reference: Tensor
    share: float = 1.0


def read_attribute(pipe: Any, text: str, size: int | tuple[int, int] | None = None) -> Attribute:
    """An attribute from ``folder`` or ``folder:share``: images of a folder (with its subfolders), encoded by the pipeline's
    autoencoder; or the name of an embedded reference set, such as ``dark-skin-tone``.

    Args:
        size: side, or height and width, of what is generated, in pixels; the pipeline's own by default.

    Raises:
        SynthesisError: if there are no images, or the pipeline has no autoencoder of images.
    """
    source, _, share = text.rpartition(":") if re.fullmatch(r".+:[0-9.]+", text) else (text, "", "1")
    try:
        if Path(source).exists():
            reference = encode_reference(pipe, source, size=size)
        else:
            reference = encode_reference(pipe, load_demo_reference(source))
        if len(reference) < 2:
            raise SynthesisError(f"{source} holds {len(reference)} images; a reference set needs two or more")
        return Attribute(reference, float(share))
    except (OSError, ValueError) as error:
        raise SynthesisError(f"cannot read the reference set {source!r}: {error}") from error


def split_quotas(quotas: Mapping[str, "int | Attribute"] | None) -> tuple[dict[str, int], dict[str, Attribute]]:
    """Numbers of images by group, and attributes.

    Raises:
        SynthesisError: for anything else, and for fewer than two attributes.
    """
    counts, attributes = {}, {}
    for name, quota in (quotas or {}).items():
        if isinstance(quota, Attribute):
            attributes[name] = quota
        elif isinstance(quota, int) and not isinstance(quota, bool) and quota >= 0:
            counts[name] = quota
        else:
            raise SynthesisError(f"quota {name!r} must be a number of images or an Attribute, got {quota!r}")
    if len(attributes) == 1:
        raise SynthesisError("attributes are balanced against each other: give two reference sets or more")
    if any(not a.share > 0 for a in attributes.values()):
        raise SynthesisError("the share of an attribute must be positive; leave out what is not wanted")
    return counts, attributes


@dataclass
class Balance(Objective):
    """Ascend ``mean_r k(x, r) - mean_s k(x, s)``, r the references of the sample's own attribute, s those of all others.

    That is the witness function of the MMD between the attribute's distribution and the others' (Gretton et al. 2012,
    section 2.3): what the two reference sets share, their subjects, drops out of it.

    Args:
        references: ``[m_a, ...]`` for each attribute.
        kernel: Gaussian at the median distance of all references by default.
    """

    references: Sequence[Tensor]
    kernel: Kernel = field(default_factory=GaussianKernel)
    unit: bool = False

    def __post_init__(self) -> None:
        rows = [natural_rows(r, self.unit) for r in self.references]
        if len({r.shape[1] for r in rows}) != 1:
            raise SynthesisError(f"reference sets differ in shape: {[list(r.shape[1:]) for r in self.references]}")
        self._rows = torch.cat(rows)
        self._owner = torch.cat([torch.full((len(r),), k) for k, r in enumerate(rows)])
        self.fitted = self.kernel.fit(self._rows)
        self.wanted: list[int] = []

    def _weights(self, wanted: Sequence[int]) -> Tensor:
        own = torch.as_tensor(wanted)[:, None] == self._owner
        return own / own.sum(1, keepdim=True) - ~own / (~own).sum(1, keepdim=True)

    def _check(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x = as_float(x)
        if x.shape[1] != self._rows.shape[1]:
            raise SynthesisError(
                f"reference sets hold rows of {self._rows.shape[1]} numbers, samples have {x.shape[1]}; encode the "
                "references with this pipeline's autoencoder at the resolution that is generated"
            )
        wanted = self.wanted if len(self.wanted) == len(x) else [0] * len(x)
        return x, self._rows.to(x), self._weights(wanted).to(x)

    def value(self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None) -> Tensor:
        x, rows, weights = self._check(x)
        return (self.fitted(x, rows) * weights).sum()

    def gradient(
        self, x: Tensor, t: Tensor | None = None, memory: Memory | None = None, jitter: Tensor | None = None
    ) -> Tensor:
        x, rows, weights = self._check(x)
        return self.fitted.vjp(x, rows, weights)

    def assign(self, x: Tensor) -> list[int]:
        """The attribute of each sample ``[n, ...]``: that of the reference set with the largest mean kernel."""
        k = self.fitted(natural_rows(x, self.unit).to(self._rows), self._rows)
        means = torch.stack([k[:, self._owner == a].mean(1) for a in range(len(self.references))], 1)
        return means.argmax(1).tolist()


def allot(counts: Sequence[int], shares: Sequence[float], n: int) -> list[int]:
    """Attributes for ``n`` further samples: each goes to the one that is furthest behind its share.

    >>> allot([3, 0], [0.5, 0.5], 5)
    [1, 1, 1, 0, 1]
    """
    counts, total, out = list(counts), sum(shares), []
    for _ in range(n):
        made = sum(counts) + 1
        behind = [made * share / total - count for share, count in zip(shares, counts, strict=True)]
        out.append(behind.index(max(behind)))
        counts[out[-1]] += 1
    return out
