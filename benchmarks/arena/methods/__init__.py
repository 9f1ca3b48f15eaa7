"""One method a file, each our own short implementation from its paper, as hooks on a diffusers pipeline."""

from .base import Log, Method, Moment, Real, Whole
from .blockguidance import BlockSelfGuidance
from .cfg import Interval, LowerGuidance
from .cno import CNO
from .combined import OSCARLowerGuidance, OursLowerGuidance
from .conditions import CADS, SeedVariance
from .contextual import ContextualRepulsion
from .dave import DAVE
from .diverseflow import DiverseFlow, DiverseFlowFast
from .eddy import EDDY, EDDYProjection
from .guides import ContextualVendi, Ours, OursVivid, Published
from .oscar import OSCAR
from .particle import Particle, PooledParticle
from .pink import PinkNoise
from .plain import Plain
from .selection import GroupInference
from .selfguidance import SelfGuidance
from .spell import SPELL
from .tsr import ScoreRescaling

METHODS: dict[str, type[Method]] = {
    m.name: m
    for m in (
        Plain, LowerGuidance, Interval, ScoreRescaling, CADS, SeedVariance, Particle, PooledParticle, Published,
        ContextualVendi, DiverseFlow, DiverseFlowFast, SPELL, OSCAR, EDDY, EDDYProjection, SelfGuidance, GroupInference,
        PinkNoise, CNO, DAVE, ContextualRepulsion, BlockSelfGuidance,
        Ours, OursVivid, OSCARLowerGuidance, OursLowerGuidance,
    )
}  # fmt: skip

__all__ = ["METHODS", "Log", "Method", "Moment", "Real", "Whole"]
