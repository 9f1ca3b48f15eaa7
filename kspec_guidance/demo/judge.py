"""A classifier of emoji images, which says whether an image shows what its prompt asks for."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["DemoJudge", "EmojiClassifier", "load_demo_judge"]

ASSETS = Path(__file__).parent / "assets" / "judge"
PARTS = {"code": "codes", "tone": "tones", "style": "styles", "family": "families"}  # heads, and their classes in the file


def _block(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(a, b, 3, 2, 1), nn.BatchNorm2d(b), nn.SiLU(), nn.Conv2d(b, b, 3, 1, 1, groups=b), nn.Conv2d(b, b, 1),
        nn.BatchNorm2d(b), nn.SiLU(),
    )  # fmt: skip


class EmojiClassifier(nn.Module):
    """Classifier of the emoji, skin tone, art style and family of 64 x 64 images in -1..1; features ``[n, 160]``.

    Args:
        sizes: number of classes of each head.
    """

    def __init__(self, sizes: dict[str, int]):
        super().__init__()
        self.body = nn.Sequential(
            _block(3, 32), _block(32, 64), _block(64, 128), _block(128, 192), nn.Flatten(), nn.Linear(192 * 16, 160)
        )
        self.heads = nn.ModuleDict({k: nn.Sequential(nn.SiLU(), nn.Linear(160, n)) for k, n in sizes.items()})

    def features(self, x: Tensor) -> Tensor:
        """Features ``[n, 160]`` of images ``[n, 3, 64, 64]``."""
        return self.body(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits of each head for images ``[n, 3, 64, 64]``."""
        h = self.body(x)
        return {k: head(h) for k, head in self.heads.items()}


class DemoJudge:
    """Which emoji images show, and whether prompts may describe them.

    Attributes:
        network: the classifier.
        classes: names of the classes of each head.
        emoji: the original emoji with which it was trained: code, subject, families, gender, detail, tone, style.
    """

    def __init__(self) -> None:
        table = json.loads((ASSETS / "emoji.json").read_text(encoding="utf-8"))
        self.classes: dict[str, list[str | None]] = {head: table[name] for head, name in PARTS.items()}
        self.network = EmojiClassifier({head: len(names) for head, names in self.classes.items()})
        self.network.load_state_dict({k: v.float() for k, v in load_file(ASSETS / "model.safetensors").items()})
        self.network.eval().requires_grad_(False)
        self.emoji: list[dict[str, Any]] = table["modes"]
        self._classes = torch.tensor([
            [self.classes[head].index(m[head]) for head in ("code", "tone", "style")] for m in self.emoji
        ])  # fmt: skip
        self._described: dict[str, Tensor] = {}

    def described(self, prompt: str) -> Tensor:
        """Which of the emoji a prompt may describe, as bool ``[emoji]``; none for prompts of other things."""
        if prompt not in self._described:
            subject, *attributes = [part.strip() for part in prompt.split(",")]
            self._described[prompt] = torch.tensor([
                subject in (m["subject"], *m["families"])
                and all(a in (m["gender"], m["detail"], m["tone"], m["style"]) for a in attributes)
                for m in self.emoji
            ])  # fmt: skip
        return self._described[prompt]

    @torch.no_grad()
    def probabilities(self, features: Tensor) -> Tensor:
        """``p(emoji) p(skin tone) p(art style)`` of images by their features ``[n, 160]``, as ``[n, emoji]``."""
        p = {k: head(features).softmax(1) for k, head in self.network.heads.items()}
        code, tone, style = self._classes.T
        return p["code"][:, code] * p["tone"][:, tone] * p["style"][:, style]

    def agreement(self, features: Tensor, prompts: Sequence[str]) -> Tensor:
        """Probability that images show an emoji that their prompt may describe, in 0..1, given that they show some emoji.

        Args:
            features: of n images, ``[n, 160]``.
            prompts: of the images.

        Returns:
            ``[n]``, NaN for prompts that describe no emoji.
        """
        described, p = torch.stack([self.described(p) for p in prompts]), self.probabilities(features)
        share = torch.where(described, p, 0).sum(1) / p.sum(1)
        return torch.where(described.any(1), share, torch.nan)


@cache
def load_demo_judge() -> DemoJudge:
    """The judge of the embedded pipeline's images, from files inside the package; trained on the original emoji."""
    return DemoJudge()
