"""One method a file, each our own short implementation from its paper, as hooks on a diffusers pipeline."""

from kspec_guidance.bench.methods.base import Log, Method, Moment, Real, Whole
from kspec_guidance.bench.methods.blockguidance import BlockSelfGuidance
from kspec_guidance.bench.methods.cfg import Interval, LowerGuidance
from kspec_guidance.bench.methods.cno import CNO
from kspec_guidance.bench.methods.combined import (
    IN_INTERVALS,
    OSCARLowerGuidance,
    OursLogDetLowerGuidance,
    OursLowerGuidance,
)
from kspec_guidance.bench.methods.conditions import CADS, SeedVariance
from kspec_guidance.bench.methods.contextual import ContextualRepulsion
from kspec_guidance.bench.methods.dave import DAVE
from kspec_guidance.bench.methods.diverseflow import DiverseFlow, DiverseFlowFast
from kspec_guidance.bench.methods.eddy import EDDY, EDDYProjection
from kspec_guidance.bench.methods.gass import GASS
from kspec_guidance.bench.methods.guides import (
    ContextualVendi,
    Dial,
    Entropy,
    Explore,
    Faithful,
    FewStep,
    Ours,
    OursApart,
    OursVivid,
    Published,
    TowardReference,
    Vivid,
)
from kspec_guidance.bench.methods.noiseopt import NoiseOptimisation
from kspec_guidance.bench.methods.onebyone import (
    OursOneByOne,
    OursOneByOneInInterval,
    OursOneByOneLowerGuidance,
    SPELLOneByOne,
    SPELLOneByOneLowerGuidance,
)
from kspec_guidance.bench.methods.oscar import OSCAR
from kspec_guidance.bench.methods.particle import Particle, PooledParticle
from kspec_guidance.bench.methods.pink import PinkNoise
from kspec_guidance.bench.methods.plain import Plain
from kspec_guidance.bench.methods.selection import GroupInference
from kspec_guidance.bench.methods.selfguidance import SelfGuidance
from kspec_guidance.bench.methods.spell import SPELL
from kspec_guidance.bench.methods.tsr import ScoreRescaling

_TUNED: tuple[type[Method], ...] = (
    Plain, LowerGuidance, Interval, ScoreRescaling, CADS, SeedVariance, Particle, PooledParticle, Published,
    ContextualVendi, DiverseFlow, DiverseFlowFast, SPELL, OSCAR, EDDY, EDDYProjection, SelfGuidance, GroupInference,
    PinkNoise, CNO, NoiseOptimisation, GASS, DAVE, ContextualRepulsion, BlockSelfGuidance,
    Ours, OursVivid, OSCARLowerGuidance, OursLowerGuidance, OursLogDetLowerGuidance, OursApart,
    *IN_INTERVALS,
    OursOneByOne, OursOneByOneLowerGuidance, OursOneByOneInInterval, SPELLOneByOne, SPELLOneByOneLowerGuidance,
)  # fmt: skip
METHODS: dict[str, type[Method]] = {m.name: m for m in _TUNED}  # those whose parameters are tuned, by names in tables
DIALS: tuple[type[Method], ...] = (Dial, Vivid, Explore, Faithful, FewStep, Entropy, TowardReference)
CODES: dict[str, type[Method]] = {  # those that run on pipelines as they are, by their names in commands
    m.code: m
    for m in (*METHODS.values(), *DIALS)
    if "code" in vars(m)  # combinations inherit one
}

__all__ = ["CODES", "METHODS", "Log", "Method", "Moment", "Real", "Whole"]
