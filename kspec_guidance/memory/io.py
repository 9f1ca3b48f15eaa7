"""Memory files: safetensors with a checksum of their contents."""

import json
import os
import re
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save, save_file
from torch import Tensor

from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.hashing import hash_tensors

__all__ = ["MemoryFileError", "content_digest", "encode_tensors", "read_tensors", "write_tensors"]

MEMORY_FORMAT = "kspec-guidance memory 2"


class MemoryFileError(ValueError):
    """A memory file is truncated, altered, or of another format or kind."""


def write_tensors(
    path: str | os.PathLike, kind: str, tensors: dict[str, Tensor], about: dict[str, Any], durable: bool = False
) -> None:
    """Write tensors and their description to one file; ``durable`` flushes it to disk."""
    tensors, metadata = _contents(kind, tensors, about)
    with replacing(path, durable) as fresh:
        save_file(tensors, fresh, metadata=metadata)


def encode_tensors(kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> bytes:
    """The bytes of a file as :func:`write_tensors` writes it."""
    tensors, metadata = _contents(kind, tensors, about)
    return save(tensors, metadata=metadata)


def _contents(kind: str, tensors: dict[str, Tensor], about: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata as they are written."""
    tensors = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    digest = content_digest(tensors, about)
    return tensors, {"format": MEMORY_FORMAT, "kind": kind, "about": json.dumps(about), "sha256": digest}


def content_digest(tensors: dict[str, Tensor], about: dict[str, Any]) -> str:
    """The digest of tensors and their description that a file of them has, whatever the order of its bytes."""
    return hash_tensors(tensors, json.dumps(about))


def read_about(path: str | os.PathLike, kind: str) -> dict[str, Any]:
    """Read the description in a file, without its tensors and without verification."""
    return _description(_header(path, kind)["about"])


def _header(path: str | os.PathLike, kind: str, tensors: dict[str, Tensor] | None = None) -> dict[str, str]:
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no memory file at {path}")
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            if tensors is not None:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a dict
    except (SafetensorError, OSError, ValueError) as error:
        raise MemoryFileError(f"{path} is not a valid safetensors file ({error}); restore it from a copy") from error
    if header.get("format") != MEMORY_FORMAT:
        raise MemoryFileError(
            f"{path} has format {header.get('format')!r}, expected {MEMORY_FORMAT!r}; was it saved by memory.save?"
        )
    if header.get("kind") != kind:
        raise MemoryFileError(
            f"{path} is of kind {header.get('kind')!r}, expected {kind!r}; load it with the matching class"
        )
    return header


def read_tensors(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and description from a file.

    Raises:
        FileNotFoundError: if there is no such file.
        MemoryFileError: if the file is truncated, altered, or of another kind.
    """
    tensors: dict[str, Tensor] = {}
    header = _header(path, kind, tensors)
    if header.get("sha256") != hash_tensors(tensors, header.get("about", "")):
        raise MemoryFileError(f"{path} was altered after it was written (checksum differs); restore it from a copy")
    return tensors, _description(header["about"])


def _description(text: str) -> dict[str, Any]:
    """The description in a header.

    Version 1.0.0rc1 identified prompt encoders by class and another digest of the weights: only the class is kept.
    """
    about = json.loads(text)
    if re.fullmatch(r"\w+-[0-9a-f]{12}", about.get("prompt_encoder") or ""):
        about["prompt_encoder"] = about["prompt_encoder"].partition("-")[0]
    return about
