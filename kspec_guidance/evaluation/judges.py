"""Judges: whether images show what their prompts ask for."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from torch import Tensor

from kspec_guidance.demo import load_demo_judge
from kspec_guidance.evaluation.embedders import images, texts
from kspec_guidance.evaluation.embedders.base import ImageEmbedder, TextEmbedder
from kspec_guidance.evaluation.embedders.names import CLIP_MODELS, in_cache
from kspec_guidance.evaluation.runs import made_by_demo
from kspec_guidance.kernels import l2_normalize
from kspec_guidance.utils.arguments import choices
from kspec_guidance.utils.hashing import weights_fingerprint

__all__ = ["JUDGE_NAMES", "PromptJudge", "clip_judge", "demo_judge", "prompt_judge"]

JUDGE_NAMES = ("auto", "none", "demo", "open_clip:NAME:FILE_OR_TAG", "transformers:FOLDER")


@dataclass(frozen=True)
class PromptJudge:
    """Scores images against their prompts, from 0 to 100.

    Attributes:
        name: name of the judge.
        meaning: what the figure is, as words for a page.
        images: its features of images.
        agreement: maps features ``[n, d]`` and n prompts to ``[n]`` in 0..100, NaN for prompts that it does not know.
    """

    name: str
    meaning: str
    images: ImageEmbedder
    agreement: Callable[[Tensor, Sequence[str]], Tensor]

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[str]) -> list[float]:
        """Agreement of images with their prompts in 0..1, and 0 for prompts that it does not know: guard of a target."""
        return (self.agreement(self.images(list(images)), prompts) / 100).nan_to_num(0.0).clamp(0, 1).tolist()


def clip_judge(images: ImageEmbedder, texts: TextEmbedder) -> PromptJudge:
    """A judge from image and text features of one space: 100 times their cosine, at least 0 (CLIPScore without its 2.5).

    Args:
        images: embedder of images.
        texts: embedder of prompts, by the same model.
    """

    def agreement(features: Tensor, prompts: Sequence[str]) -> Tensor:
        t = texts(list(prompts))
        if t.shape[1] != features.shape[1]:
            raise ValueError(
                f"{images.name} has {features.shape[1]} features and {texts.name} {t.shape[1]}: a judge needs images and "
                "texts in one space, as CLIP has them"
            )
        return 100 * (l2_normalize(features) * l2_normalize(t)).sum(1).clamp_min(0)

    return PromptJudge(texts.name, "CLIP score of images and their prompts, of 100", images, agreement)


def demo_judge() -> PromptJudge:
    """The judge of the embedded pipeline: the probability in % that an image shows an emoji of its prompt."""
    judge = load_demo_judge()
    network, half = judge.network, (0.5,) * 3
    embedder = ImageEmbedder(network.features, 64, "emoji judge", half, half, fingerprint=weights_fingerprint(network))
    return PromptJudge(
        "the emoji classifier",
        "prompt agreement in %: how sure a classifier of emoji is that images show their prompt",
        embedder,
        lambda features, prompts: 100 * judge.agreement(features, prompts),
    )


def prompt_judge(name: str, folder: str | Path | None = None, device: str = "cpu") -> PromptJudge | None:
    """The judge with this name.

    ``auto`` is the emoji judge for runs of the embedded pipeline, else CLIP if the user's Hugging Face cache has one, else
    none; nothing is downloaded.

    Args:
        name: see ``JUDGE_NAMES``.
        folder: of the images, for ``auto``.
        device: of the model.

    Raises:
        ValueError: for an unknown name; the message lists the known forms.
        OSError: if its weights are not on this machine.
    """
    kind, _, rest = name.partition(":")
    model, _, weights = rest.partition(":")
    if name == "none":
        return None
    if name == "demo":
        return demo_judge()
    if name == "auto":
        if folder is not None and made_by_demo(Path(folder)):
            return demo_judge()
        cached = next((m for m in CLIP_MODELS if in_cache(m, "tokenizer_config.json")), None)
        return None if cached is None else prompt_judge(f"transformers:{cached}", device=device)
    if kind == "open_clip" and weights:
        return clip_judge(
            images.open_clip_embedder(model, weights, device=device),
            texts.open_clip_text_embedder(model, weights, device=device),
        )
    if kind == "transformers" and rest:
        return clip_judge(
            images.transformers_embedder(rest, device=device), texts.transformers_text_embedder(rest, device=device)
        )
    raise ValueError(f"unknown judge {name!r}; {choices(name, JUDGE_NAMES)}")
