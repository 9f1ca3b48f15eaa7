"""Where two sets of images differ: modes that one has more of, and prompts of which they make different things."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kspec_guidance.comparison import PromptSplit, prompt_split
from kspec_guidance.evaluation.embedders.base import TextEmbedder
from kspec_guidance.evaluation.verdicts import SURE
from kspec_guidance.functional.inputs import on_host
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel, l2_normalize
from kspec_guidance.kernels.distances import evenly_spaced

__all__ = ["Difference", "novel_modes", "split_prompts"]

ROWS = 400  # images of each set, evenly spaced
EXACT = 400  # images of both sets up to which kernels are exact
FEATURES = 400  # random features of more
MODES, IMAGES = 6, 11
PERMUTATIONS = 99


@dataclass(frozen=True)
class Difference:
    """Images that one set has more of than the other.

    Attributes:
        value: how much larger their share of the set is.
        p_value: probability that the largest value would be as large if both sets came from one source; None where they
            have no prompt in common.
        samples: indices of the images, the strongest first.
        samples_other: images of the other set of the same prompts; empty for modes without prompts.
        prompts: of the images, the strongest first; empty for modes without prompts.
    """

    value: float
    p_value: float | None
    samples: list[int]
    samples_other: list[int]
    prompts: list[str]

    @property
    def sure(self) -> bool:
        """Whether so large a value would be rare by chance."""
        return self.p_value is not None and self.p_value < SURE

    def as_dict(self, names: Sequence[str], others: Sequence[str]) -> dict[str, Any]:
        """Plain values, ready for JSON, with the names of images."""
        images = {"images": [names[i] for i in self.samples], "images_other": [others[i] for i in self.samples_other]}
        return {k: v for k, v in asdict(self).items() if not k.startswith("samples")} | images


def novel_modes(x: Tensor, y: Tensor, kernel: Kernel, seed: int = 0) -> tuple[list[Difference], list[Difference]]:
    """Modes that ``x`` has more of, and modes that ``y`` has more of: the eigenvectors behind KEN, with p-values.

    Args:
        x: unit rows ``[n, d]``.
        y: ``[m, d]``.
        kernel: of the rows.
        seed: of the permutations of rows.
    """
    rows = [evenly_spaced(len(z), ROWS) for z in (x, y)]
    same = [torch.ones(len(r), 1) for r in rows]
    found = _split(x[rows[0]], same[0], y[rows[1]], same[1], kernel, seed, True)
    return (
        _differences(found.values, found.p_values, found.indices_a, [], rows[0], rows[1], []),
        _differences(found.reverse.values, found.reverse.p_values, found.reverse.indices_b, [], rows[1], rows[0], []),  # type: ignore[union-attr]
    )


def split_prompts(
    x: Tensor,
    prompts: Sequence[str | None] | None,
    y: Tensor,
    other: Sequence[str | None] | None,
    text_embedder: TextEmbedder,
    kernel: Kernel,
    seed: int = 0,
) -> tuple[list[Difference], list[Difference]]:
    """The prompts of which ``x`` and ``y`` make different things (PromptSplit): what each has more of.

    Empty unless both sets have captions, and at least two prompts between them.

    Args:
        x: unit rows ``[n, d]``.
        prompts: of the images, None for an image without one.
        y: ``[m, d]``.
        other: their prompts.
        text_embedder: of the prompts.
        kernel: of the rows.
        seed: of the permutations of images of the same prompt.
    """
    known = [[i for i, p in enumerate(texts or []) if p is not None] for texts in (prompts, other)]
    if not all(known):
        return [], []
    rows = [torch.tensor(k)[evenly_spaced(len(k), ROWS)] for k in known]
    texts = [[str(t[i]) for i in r.tolist()] for t, r in zip((prompts, other), rows, strict=True) if t is not None]
    if len({*texts[0], *texts[1]}) < 2:
        return [], []
    t = l2_normalize(on_host(text_embedder([*texts[0], *texts[1]])))
    shared = bool(set(texts[0]) & set(texts[1]))
    found = _split(x[rows[0]], t[: len(rows[0])], y[rows[1]], t[len(rows[0]) :], kernel, seed, shared)
    back = found.reverse
    assert back is not None
    return (
        _differences(found.values, found.p_values, found.indices_a, found.indices_b, rows[0], rows[1], texts[0]),
        _differences(back.values, back.p_values, back.indices_b, back.indices_a, rows[1], rows[0], texts[1]),
    )


def _split(x: Tensor, t: Tensor, y: Tensor, s: Tensor, kernel: Kernel, seed: int, test: bool) -> PromptSplit:
    return prompt_split(
        x, t, y, s, MODES, IMAGES, kernel, GaussianKernel(PROMPT_BANDWIDTH),
        features=None if len(x) + len(y) <= EXACT else FEATURES, permutations=PERMUTATIONS if test else 0, seed=seed,
    )  # fmt: skip


def _differences(
    values: Tensor,
    p_values: Tensor | None,
    own: list[list[int]],
    other: list[list[int]],
    rows: Tensor,
    other_rows: Tensor,
    texts: Sequence[str],
) -> list[Difference]:
    found = []
    for k, value in enumerate(values.tolist()):
        if value > 0:
            prompts = list(dict.fromkeys(texts[i] for i in own[k])) if texts else []
            samples, others = rows[own[k]].tolist(), other_rows[other[k]].tolist() if other else []
            found.append(Difference(value, None if p_values is None else float(p_values[k]), samples, others, prompts))
    return found
