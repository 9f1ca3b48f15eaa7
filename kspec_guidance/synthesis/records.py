"""Records: what is known of each finished batch, as a description and tensors, which a file holds."""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from kspec_guidance.synthesis.errors import CheckpointError

__all__ = [
    "IMAGE",
    "LISTED",
    "LOST",
    "Record",
    "RecordTensors",
    "json_row",
    "pack_target",
    "pack_tensors",
    "record_of",
    "unpack_target",
    "unpack_tensors",
]

IMAGE = re.compile(r"\d{6,}-\d{4,}\.png")
FILE_NAME = re.compile(r"\d{4,}/" + IMAGE.pattern)
IMAGES = re.compile(r"images/\d{6,}-\d{6,}-\d{6,}\.safetensors")
TARGET = "target."
LOST, LISTED = "lost", "on the list of names to drop"  # why images are left out that were finished


@dataclass
class Record:
    """One finished batch.

    Attributes:
        epoch, rank, batch_index: which batch of which process it is.
        rows: metadata of the images that were kept.
        rejected: prompt, attempt and reason of those that were dropped.
        tensors: see :func:`pack_tensors`.
        target: what a target knows of the batch's prompts after it, with its tensors under names that begin with
            ``target``; see :func:`pack_target`.
        arm: name of the arm and cost of an image, in runs with arms.
        time: when it was finished, in UTC; None in records of earlier versions.
        lease: of runs whose workers come and go: owner and token, and digests of what was read before the batch; see
            :mod:`~kspec_guidance.synthesis.units`.
    """

    epoch: int
    rank: int
    batch_index: int
    rows: list[dict[str, Any]] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    target: list[dict[str, Any]] = field(default_factory=list)
    arm: dict[str, Any] | None = None
    time: str | None = None
    lease: dict[str, Any] | None = None

    def description(self) -> dict[str, Any]:
        """What its file says besides the tensors."""
        about: dict[str, Any] = {"rows": self.rows, "rejected": self.rejected}
        about |= {"target": self.target} if self.target else {}
        about |= {name: value for name in ("arm", "time", "lease") if (value := getattr(self, name)) is not None}
        return about

    def without(self, lost: Mapping[str, str]) -> "Record":
        """A copy in which the images with these file names count as rejected, for the reason of each."""
        keep = [k for k, row in enumerate(self.rows) if row["file_name"] not in lost]
        rejected = [
            {"prompt": row["prompt"], "attempt": row["attempt"], "reason": lost[row["file_name"]]}
            for row in self.rows
            if row["file_name"] in lost
        ]
        tensors = {
            name: t[keep] if len(t) == len(self.rows) and not name.startswith(TARGET) else t
            for name, t in self.tensors.items()
        }
        rows = [self.rows[k] for k in keep]
        return replace(self, rows=rows, rejected=self.rejected + rejected, tensors=tensors)


def record_of(about: Any, tensors: dict[str, Tensor], epoch: int, rank: int, path: Path) -> Record:
    """The record of a file, if it is one: names of files in it must be those of images of the set, and nothing else.

    Raises:
        CheckpointError: for a description that this program does not write.
    """
    try:
        rows, rejected = about["rows"], about["rejected"]
        for row in (*rows, *rejected):
            if not isinstance(row["prompt"], str) or type(row["attempt"]) is not int:
                raise TypeError("a prompt or attempt of another type")
        for row in rows:
            if not FILE_NAME.fullmatch(row["file_name"]) or type(row["prompt_number"]) is not int:
                raise ValueError(f"file_name {row['file_name']!r} is no image of a set")
        if len({row["file_name"] for row in rows}) < len(rows) or (tensors and len(tensors["x"]) != len(rows)):
            raise ValueError(f"{len(rows)} images with other names or samples")
        number = int(path.stem)
        lease = about.get("lease")
        if lease is not None and not (_is_lease(lease) and all(isinstance(row["sha256"], str) for row in rows)):
            raise ValueError("a lease of another form")
        target, arm, time = about.get("target", []), about.get("arm"), about.get("time")
        return Record(epoch, rank, number, rows, rejected, tensors, target, arm, time, lease)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is no record of a batch ({type(error).__name__}: {error}); restore it from a copy"
        ) from error


def _is_lease(lease: Any) -> bool:
    """Whether the lease of a record has all that is used of it."""
    read = lease["read"]
    return (
        type(lease["token"]) is int
        and all(isinstance(lease[name], str) for name in ("worker", "state"))
        and (lease["images"] is None or IMAGES.fullmatch(lease["images"]) is not None)
        and all(unit.isdecimal() and all(isinstance(digest, str) for digest in digests) for unit, digests in read.items())
    )


class RecordTensors(NamedTuple):
    """The tensors of a record.

    Attributes:
        x: samples ``[k, ...]`` in the guide's space.
        prompt_features: of their prompts ``[k, p]``; None without any.
        features: that scores are computed from ``[k, f]``.
    """

    x: Tensor
    prompt_features: Tensor | None
    features: Tensor


def json_row(row: Mapping[str, Any]) -> str:
    """A row of the metadata as strict JSON: null for NaN and infinite numbers."""
    return json.dumps({k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()})


def pack_tensors(x: Tensor, prompt_features: Tensor | None, features: Tensor | None) -> dict[str, Tensor]:
    """What a record stores: prompt features once if all are the same, features only if they are not the samples."""
    tensors = {"x": x.float().cpu()}
    if prompt_features is not None:
        t = prompt_features.float().cpu()
        tensors["prompts"] = t[:1] if len(t) and bool((t == t[:1]).all()) else t
    if features is not None:
        tensors["features"] = features.float()
    return tensors


def pack_target(state: list[dict[str, Any]]) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What a target knows, as plain values and tensors; in place of a tensor is its name."""
    tensors: dict[str, Tensor] = {}
    packed = []
    for k, values in enumerate(state):
        named = {f"{TARGET}{k}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
        tensors |= named
        packed.append({k: v for k, v in values.items() if not isinstance(v, Tensor)})
    return packed, tensors


def unpack_target(record: "Record") -> list[dict[str, Any]]:
    """The inverse of :func:`pack_target`."""
    state = []
    for k, values in enumerate(record.target):
        begin = f"{TARGET}{k}."
        tensors = {name[len(begin) :]: t for name, t in record.tensors.items() if name.startswith(begin)}
        state.append({"features": None, "rows": None} | values | tensors)
    return state


def unpack_tensors(tensors: dict[str, Tensor]) -> RecordTensors:
    """The inverse of :func:`pack_tensors`."""
    x, t = tensors["x"], tensors.get("prompts")
    if t is not None and len(t) != len(x):
        t = t.expand(len(x), -1)
    return RecordTensors(x, t, tensors.get("features", x.flatten(1)))
