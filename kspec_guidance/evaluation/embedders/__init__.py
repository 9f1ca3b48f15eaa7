"""Embedders of images and prompts, with fingerprints for reproducibility. Nothing is downloaded by default."""

from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.cache import embed_files
from kspec_guidance.evaluation.embedders.images import (
    efficientnet_lite,
    open_clip_embedder,
    torchvision_embedder,
    transformers_embedder,
)
from kspec_guidance.evaluation.embedders.names import image_embedder, text_embedder
from kspec_guidance.evaluation.embedders.pipeline import pipeline_embedder
from kspec_guidance.evaluation.embedders.texts import (
    minilm,
    one_hot_embedder,
    open_clip_text_embedder,
    sentence_embedder,
    transformers_text_embedder,
)
from kspec_guidance.utils.hashing import weights_fingerprint
from kspec_guidance.utils.images import to_pixels

__all__ = [
    "ImageEmbedder",
    "TextEmbedder",
    "image_embedder",
    "text_embedder",
    "pipeline_embedder",
    "open_clip_embedder",
    "transformers_embedder",
    "torchvision_embedder",
    "efficientnet_lite",
    "open_clip_text_embedder",
    "sentence_embedder",
    "minilm",
    "one_hot_embedder",
    "transformers_text_embedder",
    "embed_files",
    "to_pixels",
    "weights_fingerprint",
]
