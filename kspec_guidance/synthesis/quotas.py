"""Quotas: numbers of images by group, and attributes in wanted shares."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from kspec_guidance.demo import load_demo_reference
from kspec_guidance.loop.latents import encode_reference
from kspec_guidance.synthesis.errors import SynthesisError
from kspec_guidance.utils.arguments import is_integer

__all__ = ["Attribute", "allot", "read_attribute", "split_quotas"]


@dataclass(frozen=True)
class Attribute:
    """An attribute, given by reference samples, and its share of all images.

    Guidance moves each image towards the references of one attribute, and away from those of the others.

    Args:
        reference: samples ``[m, ...]`` that show the attribute, in the guide's space; see :func:`encode_reference`.
        share: of the images; the shares of all attributes are scaled to sum to 1.
    """

    reference: Tensor
    share: float = 1.0


def read_attribute(pipe: Any, text: str, size: int | tuple[int, int] | None = None) -> Attribute:
    """Read an attribute from images, encoded by the pipeline's autoencoder.

    Args:
        pipe: a pipeline with an autoencoder.
        text: ``folder`` or ``folder:share``, subfolders included; or the name of an embedded reference set, such as
            ``dark-skin-tone``, in place of the folder.
        size: side, or height and width, of the generated images, in pixels; the pipeline's default otherwise.

    Raises:
        SynthesisError: if there are fewer than two images, or the pipeline has no autoencoder of images.
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
    """Split quotas into numbers of images by group, and attributes by name.

    Raises:
        SynthesisError: for any other value, a single attribute, or a share that is not positive.
    """
    counts: dict[str, int] = {}
    attributes: dict[str, Attribute] = {}
    for name, quota in (quotas or {}).items():
        if isinstance(quota, Attribute):
            attributes[name] = quota
        elif is_integer(quota, 0):
            counts[name] = int(quota)
        else:
            raise SynthesisError(f"quota {name!r} must be a number of images or an Attribute, got {quota!r}")
    if len(attributes) == 1:
        raise SynthesisError("attributes are balanced against each other: give two reference sets or more")
    if any(not a.share > 0 for a in attributes.values()):
        raise SynthesisError("the share of an attribute must be positive; leave out attributes that are not wanted")
    return counts, attributes


def allot(counts: Sequence[int], shares: Sequence[float], n: int) -> list[int]:
    """Assign ``n`` further samples to attributes, each to the one that is furthest behind its share.

    Args:
        counts: images of each attribute so far.
        shares: of the attributes; they need not sum to 1.
        n: number of samples.

    Returns:
        The index of the attribute of each sample.

    >>> allot([3, 0], [0.5, 0.5], 5)
    [1, 1, 1, 0, 1]
    """
    counts, total, assigned = list(counts), sum(shares), []
    for _ in range(n):
        images = sum(counts) + 1
        deficits = [images * share / total - count for share, count in zip(shares, counts, strict=True)]
        assigned.append(deficits.index(max(deficits)))
        counts[assigned[-1]] += 1
    return assigned
