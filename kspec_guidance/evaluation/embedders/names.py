"""Embedders by name, for the command line: ``auto``, ``efficientnet-lite0``, ``open_clip:NAME:FILE`` and others."""

import warnings

from huggingface_hub import try_to_load_from_cache

from kspec_guidance.demo import load_demo_pipeline
from kspec_guidance.evaluation.embedders import images, texts
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.pipeline import pipeline_embedder
from kspec_guidance.utils.arguments import choices

__all__ = ["CLIP_MODELS", "DEMO_NAME", "IMAGE_NAMES", "TEXT_NAMES", "image_embedder", "in_cache", "text_embedder"]

IMAGE_NAMES = (
    "auto", "efficientnet-lite0", "demo", "open_clip:NAME:FILE_OR_TAG", "transformers:FOLDER", "torchvision:NAME:FILE",
)  # fmt: skip
TEXT_NAMES = ("none", "minilm", "open_clip:NAME:FILE_OR_TAG", "sentence:FOLDER", "transformers:FOLDER")


DEMO_NAME = "demo (the autoencoder of the embedded emoji model)"
CLIP_MODELS = ("openai/clip-vit-large-patch14", "openai/clip-vit-base-patch16", "openai/clip-vit-base-patch32")
LOCAL_MODELS = (  # that auto takes from the user's cache: self-supervised features first, the best of each family first
    "facebook/dinov2-large", "facebook/dinov2-base", "facebook/dinov2-small", "facebook/dinov2-giant", *CLIP_MODELS,
)  # fmt: skip
MODEL_FILES = ("config.json", "preprocessor_config.json", "model.safetensors")


def image_embedder(name: str, device: str = "cpu") -> ImageEmbedder:
    """The image embedder with this name.

    ``auto`` is DINOv2 or CLIP if the user's Hugging Face cache has one, else EfficientNet-Lite0, which comes with this
    package; nothing is downloaded, and the embedder's name says which it is. ``demo`` tells emoji of the embedded model
    apart, and little else.

    Raises:
        ValueError: for an unknown name; the message lists the known forms.
        OSError: if its weights are not on this machine.
        ImportError: naming the package that it needs.

    Warns:
        UserWarning: if ``auto`` finds a model in the cache that cannot be loaded.
    """
    kind, _, rest = name.partition(":")
    model, _, weights = rest.partition(":")
    if name == "auto":
        return _automatic(device)
    if name == "demo":
        embedder = pipeline_embedder(load_demo_pipeline())
        embedder.name, embedder.measured = DEMO_NAME, True
        return embedder
    if name == "efficientnet-lite0":
        return images.efficientnet_lite(device)
    if kind == "open_clip" and weights:
        return images.open_clip_embedder(model, weights, device=device)
    if kind == "torchvision" and weights:
        return images.torchvision_embedder(model, weights, device=device)
    if kind == "transformers" and rest:
        return images.transformers_embedder(rest, device=device)
    raise ValueError(f"unknown image embedder {name!r}; {choices(name, IMAGE_NAMES)}")


def in_cache(model: str, *more: str) -> bool:
    """Whether the user's Hugging Face cache has a model's files, and ``more`` files."""
    return all(isinstance(try_to_load_from_cache(model, file), str) for file in (*MODEL_FILES, *more))


def _automatic(device: str) -> ImageEmbedder:
    for model in LOCAL_MODELS:
        if in_cache(model):
            try:
                return images.transformers_embedder(model, device=device)
            except (OSError, ValueError, ImportError, RuntimeError) as error:
                warnings.warn(f"{model} is in the local cache, but cannot be loaded: {error}", stacklevel=3)
    return images.efficientnet_lite(device)


def text_embedder(name: str, device: str = "cpu") -> TextEmbedder:
    """The text embedder with this name; ``none`` maps distinct prompts to orthogonal rows.

    Raises:
        ValueError: for an unknown name; the message lists the known forms.
        OSError: if its weights are not on this machine.
    """
    kind, _, rest = name.partition(":")
    model, _, weights = rest.partition(":")
    if name == "none":
        return texts.one_hot_embedder()
    if name == "minilm":
        return texts.minilm(device)
    if kind == "open_clip" and weights:
        return texts.open_clip_text_embedder(model, weights, device=device)
    if kind == "sentence" and rest:
        return texts.sentence_embedder(rest, device=device)
    if kind == "transformers" and rest:
        return texts.transformers_text_embedder(rest, device=device)
    raise ValueError(f"unknown text embedder {name!r}; {choices(name, TEXT_NAMES)}")
