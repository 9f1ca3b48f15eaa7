"""Real digits: a small class-conditional flow-matching model, few steps, and a judge of classes and writing styles."""

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as nnf

from ..networks import DigitJudge, digit_unet
from ..pipeline import ConditionPipeline, Conditions
from ..stored import weights
from .base import Bed, Case, common_scores

ANY = ""  # the empty prompt: without labels the model was trained on a skewed distribution of classes


class Digits(Bed):
    """``modes`` counts styles of the prompt's class, or classes for the empty prompt.

    ``valid`` is the judge's probability of that class (or its confidence), for digits within the radius of the data;
    ``on_data`` is its confidence in any class, for the same digits, and ``agreement`` the probability alone.
    """

    name = "digits"
    images, steps, guidance_scale = 16, 8, 3.0
    model = "digits"

    def __init__(self, steps: int = 8):
        self.steps = steps
        if steps != 8:
            self.name = f"digits, {steps} steps"
        made, judge = weights(self.model), weights("digit_judge")
        self.real = weights("digit_truth")["rows"]  # features of 200 real digits of each class
        conditions = Conditions([f"digit {k}" for k in range(10)], made.pop("conditions"))
        unet = digit_unet()
        unet.load_state_dict(made)
        self.pipe = ConditionPipeline(unet.eval(), FlowMatchEulerDiscreteScheduler(), conditions)
        self.centres, self.shares, self.radii = (judge.pop(k) for k in ("centres", "shares", "radii"))
        self.judge_ = DigitJudge()
        self.judge_.load_state_dict(judge)
        self.judge_.eval()

    def prompts(self, half: str) -> list[str]:
        return ["digit 1", "digit 3", "digit 4", "digit 6", "digit 8"] if half == "tune" else [
            "digit 0", "digit 2", "digit 5", "digit 7", "digit 9"]  # fmt: skip

    def decode(self, samples: Tensor) -> Tensor:
        """Images ``[n, 1, 28, 28]`` in -1..1."""
        return nnf.pixel_shuffle(samples, 2).clamp(-1, 1)

    @torch.no_grad()
    def rows(self, samples: Tensor) -> Tensor:
        return self.judge_.features(self.decode(samples))

    def truth(self, prompt: str) -> Tensor:
        return self.real[int(prompt.split()[-1])] if prompt else self.real.flatten(0, 1)[::5]

    @torch.no_grad()
    def figures(self, rows: Tensor, case: Case) -> dict[str, float]:
        p = self.judge_.head(rows).softmax(1)
        if case.prompt:
            k = int(case.prompt.split()[-1])
            right = p[:, k]
        else:
            right = p.amax(1)
        kinds = p.argmax(1)
        d = (rows[:, None] - self.centres[kinds]).norm(dim=-1)
        nearest, style = d.min(1)
        good = nearest <= self.radii[kinds]
        on_data = float((p.amax(1) * good).mean())
        if case.prompt:
            good &= kinds == k
            modes = {(k, int(s)) for s in style[good]}
            occupied = torch.bincount(style[good], minlength=self.shares.shape[1]) / len(rows)
            variation = float((occupied - self.shares[k]).abs().sum() / 2)
        else:
            modes = {int(c) for c in kinds[good]}
            variation = float((torch.bincount(kinds[good], minlength=10) / len(rows) - 0.1).abs().sum() / 2)
        return {
            "modes": float(len(modes)),
            "of": float(self.shares.shape[1] if case.prompt else 10),
            "valid": float((right * good).mean()),
            "on_data": on_data,
            "agreement": float(right.mean()),
            "total_variation": variation,
            **common_scores(rows),
        }


class DistilledDigits(Digits):
    """The same digits by a model distilled to four steps without classifier-free guidance."""

    model = "digits_distilled"
    guidance_scale = 1.0
    has = frozenset({"features", "images", "prompts"})

    def __init__(self):
        super().__init__(4)
        self.name = "digits, distilled"


class AnyDigit(Digits):
    """The empty prompt: classes of a model that was trained on some of them 25 times as often as on others."""

    name = "digits, no prompt"
    guidance_scale = 1.0
    has = frozenset({"features", "images"})

    def __init__(self):
        super().__init__()
        self.name = AnyDigit.name

    def prompts(self, half: str) -> list[str]:
        return [ANY]

    def cases(self, half: str, seeds: int) -> list[Case]:
        base = 0 if half == "tune" else 10_000
        return [Case(ANY, base + s) for s in range(5 * seeds)]
