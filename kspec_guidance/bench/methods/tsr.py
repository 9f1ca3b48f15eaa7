"""Temporal score rescaling."""

from dataclasses import dataclass

from torch import Tensor

from kspec_guidance.bench.methods.base import Log, Method, Moment, Real


@dataclass
class ScoreRescaling(Method):
    """The score of data whose modes are ``1/k`` times as wide (arXiv 2510.01184).

    Data of variance ``s^2`` around a mode has the score ``-x / (alpha^2 s^2 + sigma^2)``, data of variance ``s^2 / k``
    one that is ``(eta s^2 + 1) / (eta s^2 / k + 1)`` times as large, ``eta = alpha^2 / sigma^2``; the model's score is
    multiplied by that. ``k < 1`` samples more widely.
    """

    name = "score rescaling"
    single = True
    code = "score-rescaling"
    paper = "arXiv 2510.01184"
    tuned = {"k": Real(0.3, 1.0), "width": Log(0.05, 5.0)}
    strength = "k"
    falls = True
    k: float = 0.8
    width: float = 1.0

    def move(self, m: Moment) -> Tensor | None:
        if m.alpha < 1e-4 or m.sigma < 1e-4:
            return None
        eta = (m.alpha / m.sigma) ** 2
        ratio = (eta * self.width**2 + 1) / (eta * self.width**2 / self.k + 1)
        return (m.x - m.sigma * ratio * m.noise) / m.alpha - m.x0
