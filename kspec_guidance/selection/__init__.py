"""Choice among generators while they run: which arm should make the next image, by quality, diversity or cost.

from kspec_guidance.selection import MixtureGreedy
"""

from kspec_guidance.selection.base import Selector
from kspec_guidance.selection.baselines import Greedy, OneArm, Oracle, Uniform
from kspec_guidance.selection.best_arm import FDUCB, ISUCB
from kspec_guidance.selection.contextual import PAKUCB, RFFUCB
from kspec_guidance.selection.diverse import DAKUCB
from kspec_guidance.selection.mixture import MixtureGreedy, MixtureUCB
from kspec_guidance.selection.promptwise import PromptWise

__all__ = [
    "MixtureGreedy",
    "MixtureUCB",
    "FDUCB",
    "ISUCB",
    "PAKUCB",
    "RFFUCB",
    "DAKUCB",
    "PromptWise",
    "Uniform",
    "OneArm",
    "Greedy",
    "Oracle",
    "Selector",
]
