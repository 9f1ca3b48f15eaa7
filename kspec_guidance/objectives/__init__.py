"""Guidance objectives: what is to grow, and the direction in which it grows.

An objective sees the feature rows of the batch being made, ``x`` ``[n, d]``, their prompts' features ``t`` ``[n, p]`` (rows
of norm 1) or None, and the memory. ``value`` is differentiable by autograd; ``gradient`` is the same derivative in closed
form, and what guidance uses. Both are to be ascended. Pairs inside the batch count as much as pairs with the memory.
"""

from kspec_guidance.objectives.base import PROMPT_BANDWIDTH, SAMPLE_BANDWIDTH, TOLERANCE, Objective, natural_rows, pull_back
from kspec_guidance.objectives.mmd import MMD
from kspec_guidance.objectives.novelty import Novelty
from kspec_guidance.objectives.rke import RKE, ConditionalRKE
from kspec_guidance.objectives.vendi import Vendi
from kspec_guidance.objectives.witness import Balance

__all__ = [
    "RKE",
    "ConditionalRKE",
    "Novelty",
    "MMD",
    "Vendi",
    "Balance",
    "Objective",
    "PROMPT_BANDWIDTH",
    "SAMPLE_BANDWIDTH",
    "TOLERANCE",
    "natural_rows",
    "pull_back",
]
