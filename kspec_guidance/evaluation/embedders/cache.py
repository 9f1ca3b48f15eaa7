"""Features of image files, cached on disk by file content and embedder."""

import hashlib
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kspec_guidance.evaluation.embedders.base import ImageEmbedder
from kspec_guidance.utils.atomic_io import replacing
from kspec_guidance.utils.hashing import hash_json, hash_tensors
from kspec_guidance.utils.images import SourceError, decode_image

__all__ = ["FeatureCache", "embed_files"]

READING = "upright, 16 bits scaled"  # changes where files are read to other pixels, so that older caches are not used


class FeatureCache:
    """One safetensors file per embedder: feature rows, and the digests of their image files.

    Args:
        folder: created if it does not exist.
        embedder: its fingerprint and input settings determine the file name.
    """

    def __init__(self, folder: str | os.PathLike, embedder: ImageEmbedder):
        about = [READING, embedder.fingerprint, embedder.size, list(embedder.mean), list(embedder.std), embedder.fit]
        self.path = Path(folder) / f"features-{hash_json(about, 16)}.safetensors"
        self.rows: dict[str, Tensor] = {}
        if self.path.is_file():
            try:
                with safe_open(self.path, "pt") as file:
                    header, features = file.metadata() or {}, file.get_tensor("features")
                if header["sha256"] == hash_tensors({"features": features}, header["keys"]):
                    self.rows = dict(zip(json.loads(header["keys"]), features, strict=True))
            except (SafetensorError, OSError, KeyError, TypeError, ValueError):
                self.rows = {}  # a damaged cache is ignored

    def save(self) -> None:
        """Write the file, atomically."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        features = torch.stack(list(self.rows.values())).contiguous()
        with replacing(self.path) as fresh:
            keys = json.dumps(list(self.rows))
            save_file(
                {"features": features}, fresh, metadata={"keys": keys, "sha256": hash_tensors({"features": features}, keys)}
            )


class LazyImages(Sequence):
    """Image files that are opened one by one, when an embedder takes the images of a slice."""

    def __init__(self, paths: Sequence[str | os.PathLike]):
        self.paths = list(paths)

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return LazyImages(self.paths[index])
        path = Path(self.paths[index])
        try:
            return decode_image(path)[0]
        except SourceError as error:
            raise OSError(f"{path} cannot be read as an image: {error}") from error


def embed_files(
    paths: Sequence[str | os.PathLike],
    embedder: ImageEmbedder,
    cache: str | os.PathLike | None = None,
    batch_size: int | None = None,
    progress: bool = False,
) -> Tensor:
    """Features ``[n, d]`` of image files; with ``cache``, a folder, only new files are embedded.

    Raises:
        OSError: if a file cannot be read as an image.
    """
    if cache is None:
        return embedder(LazyImages(paths), batch_size, progress)
    cached = FeatureCache(cache, embedder)
    digests = [hashlib.sha256(Path(p).read_bytes()).hexdigest() for p in paths]
    missing = {d: p for d, p in zip(digests, paths, strict=True) if d not in cached.rows}
    if missing:
        rows = embedder(LazyImages(list(missing.values())), batch_size, progress)
        cached.rows |= dict(zip(missing, rows, strict=True))
        cached.save()
    return torch.stack([cached.rows[d] for d in digests])
