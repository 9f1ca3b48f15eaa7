"""Embedders by name, for the command line: ``demo``, ``efficientnet-lite0``, ``open_clip:NAME:FILE`` and others."""

from kspec_guidance.demo import load_demo_pipeline
from kspec_guidance.evaluation.embedders import images, texts
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.pipeline import pipeline_embedder
from kspec_guidance.utils.arguments import choices

__all__ = ["IMAGE_NAMES", "TEXT_NAMES", "image_embedder", "text_embedder"]

IMAGE_NAMES = ("demo", "efficientnet-lite0", "open_clip:NAME:FILE_OR_TAG", "transformers:FOLDER", "torchvision:NAME:FILE")
TEXT_NAMES = ("none", "minilm", "open_clip:NAME:FILE_OR_TAG", "sentence:FOLDER")


def image_embedder(name: str, device: str = "cpu") -> ImageEmbedder:
    """The image embedder with this name.

    Raises:
        ValueError: for an unknown name; the message lists the known forms.
        OSError: if its weights are not on this machine.
    """
    kind, _, rest = name.partition(":")
    model, _, weights = rest.partition(":")
    if name == "demo":
        return pipeline_embedder(load_demo_pipeline())
    if name == "efficientnet-lite0":
        return images.efficientnet_lite(device)
    if kind == "open_clip" and weights:
        return images.open_clip_embedder(model, weights, device=device)
    if kind == "torchvision" and weights:
        return images.torchvision_embedder(model, weights, device=device)
    if kind == "transformers" and rest:
        return images.transformers_embedder(rest, device=device)
    raise ValueError(f"unknown image embedder {name!r}; {choices(name, IMAGE_NAMES)}")


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
    raise ValueError(f"unknown text embedder {name!r}; {choices(name, TEXT_NAMES)}")
