"""When a prompt has enough images."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kspec_guidance import functional as F
from kspec_guidance.kernels import GaussianKernel, l2_normalize
from kspec_guidance.statistics import jackknife
from kspec_guidance.synthesis.errors import SynthesisError

__all__ = ["Target", "prompt_score"]

SCORES: dict[str, Callable[..., Tensor]] = {"vendi": F.vendi_score, "rke": F.rke_score}
BANDWIDTH = 0.5  # of features of norm 1: one yardstick for all prompts and the whole run


def prompt_score(x: Tensor, score: str = "vendi", bandwidth: float = BANDWIDTH) -> float:
    """A score of the images of one prompt, from features ``[n, d]``, scaled here to norm 1."""
    return float(SCORES[score](l2_normalize(x.double()), GaussianKernel(bandwidth)))


@dataclass(frozen=True)
class Target:
    """Stop a prompt when its score has reached a value, with its interval, or when more images hardly add to it.

    Args:
        score: ``vendi`` or ``rke``, of the features of one prompt's images at norm 1, Gaussian kernel.
        value: that the lower end of the 95% jackknife interval is to reach.
        bandwidth: of the kernel.
        gain: stop as well when the last images added less than this each; 1 is the most that one image can add.
    """

    score: str
    value: float
    bandwidth: float = BANDWIDTH
    gain: float = 0.02

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise SynthesisError(f"a target is for one of {', '.join(SCORES)}, got {self.score!r}")
        if not (math.isfinite(self.value) and self.value >= 1):
            raise SynthesisError(f"a target is a number of different images, at least 1, got {self.value!r}")
        if not (self.bandwidth > 0 and self.gain >= 0):
            raise SynthesisError(f"bandwidth must be positive and gain at least 0, got {self.bandwidth!r}, {self.gain!r}")

    @classmethod
    def parse(cls, text: "str | Target | None") -> "Target | None":
        """From ``vendi>=12`` or ``rke >= 4.5``.

        >>> Target.parse("vendi>=12")
        Target(score='vendi', value=12.0, bandwidth=0.5, gain=0.02)
        """
        if text is None or isinstance(text, Target):
            return text
        found = re.fullmatch(r"\s*([a-z]+)\s*>=\s*([0-9.]+)\s*", str(text).lower())
        if found is None:
            raise SynthesisError(f"cannot read the target {text!r}; expected for instance vendi>=12 or rke>=4.5")
        try:
            return cls(found[1], float(found[2]))
        except ValueError as error:
            raise SynthesisError(f"cannot read the number in the target {text!r}") from error

    def reached(self, x: Tensor, added: int) -> str | None:
        """Why to stop, or None.

        Args:
            x: features of the prompt's images so far ``[n, d]``, in order.
            added: how many of them are of the last batch.
        """
        if len(x) < 8:  # too few for an interval
            return None
        rows, kernel = l2_normalize(x.double()), GaussianKernel(self.bandwidth)
        score = SCORES[self.score]
        interval = jackknife(lambda z: score(z, kernel), rows, groups=min(20, len(rows)))
        if interval.low >= self.value:
            return "target reached"
        if 4 <= added < len(rows):
            before = float(score(rows[: len(rows) - added], kernel))
            if (interval.value - before) / added < self.gain:
                return "more images add little"
        return None


def nearest(x: Tensor, others: Tensor) -> Tensor:
    """Largest cosine of each row of ``x`` ``[n, d]`` with ``others`` ``[m, d]``; NaN without any."""
    if not len(others):
        return torch.full((len(x),), float("nan"))
    return (l2_normalize(x.float()) @ l2_normalize(others.float()).T).amax(1)
