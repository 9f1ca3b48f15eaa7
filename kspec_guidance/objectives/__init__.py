"""Guidance objectives: functions of a batch that guidance ascends, with gradients in closed form.

An objective takes the feature rows ``[n, d]`` of a batch, their prompt features ``[n, p]`` (rows of norm 1) or None, and
the memory. ``value`` is differentiable by autograd; ``gradient`` is the same derivative in closed form, which guidance
uses. Pairs within the batch have the same weight as pairs with the memory.
"""

from kspec_guidance.kernels import PROMPT_BANDWIDTH
from kspec_guidance.objectives.base import SAMPLE_BANDWIDTH, TOLERANCE, Gradient, Objective, Pairs, natural_rows
from kspec_guidance.objectives.logdet import LogDet
from kspec_guidance.objectives.mmd import MMD
from kspec_guidance.objectives.novelty import Novelty
from kspec_guidance.objectives.published import PublishedMMD, PublishedRKE
from kspec_guidance.objectives.rke import RKE, ConditionalRKE
from kspec_guidance.objectives.vendi import Vendi
from kspec_guidance.objectives.witness import Balance, Witness

__all__ = [
    "RKE",
    "ConditionalRKE",
    "Novelty",
    "MMD",
    "Vendi",
    "LogDet",
    "Balance",
    "Witness",
    "PublishedRKE",
    "PublishedMMD",
    "Objective",
    "Gradient",
    "Pairs",
    "PROMPT_BANDWIDTH",
    "SAMPLE_BANDWIDTH",
    "TOLERANCE",
    "natural_rows",
]
