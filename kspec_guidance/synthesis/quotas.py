"""Attributes in wanted shares: each image is drawn to the reference set of one attribute, and away from the others'."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kspec_guidance.demo import load_demo_reference
from kspec_guidance.loop.latents import encode_reference
from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["Attribute", "allot", "read_attribute", "split_quotas"]


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
