"""What the denoisers are trained on: latents, captions, noise levels and noises, determined by seed and step."""

import random
from collections import Counter
from dataclasses import dataclass

import torch
from captions import Entry
from torch import Tensor

DROP_CAPTION = 0.1  # fraction trained without a caption, for classifier-free guidance


@dataclass(frozen=True)
class Batch:
    """Latents and noises ``[n, c, h, w]``, captions, and levels ``[n]``, one from each of n equal parts of 0..1."""

    clean: Tensor
    captions: list[str]
    levels: Tensor
    noise: Tensor


def balance(entries: list[Entry]) -> Tensor:
    """Return sampling weights ``[n]``: 1 / sqrt(images of the subject), or people in all tones would be two thirds."""
    subjects = Counter(e.subject for e in entries)
    return torch.tensor([subjects[e.subject] ** -0.5 for e in entries])


class Batches:
    """Batches of one size.

    Args:
        clean: latents ``[n, c, h, w]``.
        entries: of the latents.
        size: of a batch.
        seed: of the captions.
    """

    def __init__(self, clean: Tensor, entries: list[Entry], size: int, seed: int):
        self.clean, self.entries, self.size, self.seed = clean, entries, size, seed
        self.probabilities = balance(entries)

    def __call__(self, step: int, g: torch.Generator) -> Batch:
        """Return the batch of a step, drawn from ``g``."""
        rng = random.Random(self.seed * 1_000_003 + step)
        indices = torch.multinomial(self.probabilities, self.size, generator=g)
        clean = self.clean[indices]
        captions = ["" if rng.random() < DROP_CAPTION else self.entries[i].caption(rng) for i in indices.tolist()]
        levels = (torch.randperm(self.size, generator=g) + torch.rand(self.size, generator=g)) / self.size  # less variance
        return Batch(clean, captions, levels, torch.randn(clean.shape, generator=g))
