"""Coupled methods with less classifier-free guidance: over the whole run, or in an interval of it."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kspec_guidance.bench.methods.base import Log, Method, Real
from kspec_guidance.bench.methods.blockguidance import BlockSelfGuidance
from kspec_guidance.bench.methods.contextual import ContextualRepulsion
from kspec_guidance.bench.methods.diverseflow import DiverseFlow, DiverseFlowFast
from kspec_guidance.bench.methods.eddy import EDDY, EDDYProjection
from kspec_guidance.bench.methods.guides import ContextualVendi, Guided, Ours, OursLogDet, OursVivid, Published
from kspec_guidance.bench.methods.oscar import OSCAR
from kspec_guidance.bench.methods.particle import Particle, PooledParticle
from kspec_guidance.bench.methods.selfguidance import SelfGuidance
from kspec_guidance.bench.methods.spell import SPELL
from kspec_guidance.loop.components import denoiser_of


class GuidedAtWeight(Guided):
    """A guide of the package with the weight of :meth:`weight_of`, by a hook on the denoiser.

    ``cfg_share=`` of a guide is one weight for the whole run, at most the pipeline's; here it may change, and be larger.

    For pipelines as those of the arena: one call a step makes both predictions, that without the prompt first.
    """

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        return self._with_weight(pipe)

    @contextmanager
    def _with_weight(self, pipe: Any) -> Iterator[Any]:
        calls = 0

        def weighted(module: Any, args: Any, out: Any) -> Any:
            nonlocal calls
            total = len(pipe.scheduler.timesteps)
            weight = self.weight_of(calls % total / total)
            calls += 1
            if weight is None:
                return None
            uncond, cond = out[0].chunk(2)
            changed = cond + (weight - 1) / (pipe.guidance_scale - 1) * (uncond - cond)
            return (torch.cat([changed, cond]), *out[1:])

        with super().attach(pipe) as guide:
            denoiser = denoiser_of(pipe)
            assert denoiser is not None
            hook = denoiser.register_forward_hook(weighted)
            try:
                yield guide
            finally:
                hook.remove()


@dataclass
class OursLowerGuidance(GuidedAtWeight, OursVivid):
    """Conditional entropy of order 0.5, at a lower CFG scale."""

    name = "SPARKE, ours, order 0.5, lower CFG"
    tuned = {"scale": Log(0.05, 10.0), "stop": Real(0.3, 1.0), "weight": Real(1.0, 4.0)}
    needs = frozenset({"guidance"})
    weight: float = 2.0

    def weight_of(self, fraction: float) -> float | None:
        return self.weight


@dataclass
class OursLogDetLowerGuidance(OursLowerGuidance, OursLogDet):
    """Conditional log determinant, at a lower CFG scale."""

    name = "SPARKE, ours, log det, lower CFG"


@dataclass
class OSCARLowerGuidance(OSCAR):
    """OSCAR at a lower CFG scale."""

    name = "OSCAR, lower CFG"
    tuned = {"weight": Log(0.01, 3.0), "noise_weight": Log(0.001, 0.5), "cfg": Real(1.0, 4.0)}
    needs = frozenset({"guidance"})
    cfg: float = 2.0

    def weight_of(self, fraction: float) -> float | None:
        return self.cfg


@dataclass
class InInterval:
    """Before a method's class: with CFG for ``cfg_start <= fraction < cfg_stop`` only (arXiv 2404.07724)."""

    cfg_start: float = 0.3
    cfg_stop: float = 1.0

    def __init_subclass__(cls) -> None:
        method: Any = cls.__bases__[-1]
        combined: Any = cls
        combined.name = f"{method.name}, interval CFG"
        combined.tuned = {**method.tuned, "cfg_start": Real(0.0, 0.8), "cfg_stop": Real(0.6, 1.0)}
        combined.needs = method.needs | {"guidance"}

    def weight_of(self, fraction: float) -> float | None:
        """The pipeline's own weight (None) within the interval, and 1 outside of it."""
        return None if self.cfg_start <= fraction < self.cfg_stop else 1.0


@dataclass
class ParticleInInterval(InInterval, Particle):
    """``Particle`` with CFG in an interval."""


@dataclass
class PooledParticleInInterval(InInterval, PooledParticle):
    """``PooledParticle`` with CFG in an interval."""


@dataclass
class PublishedInInterval(InInterval, GuidedAtWeight, Published):
    """``Published`` with CFG in an interval."""


@dataclass
class ContextualVendiInInterval(InInterval, GuidedAtWeight, ContextualVendi):
    """``ContextualVendi`` with CFG in an interval."""


@dataclass
class DiverseFlowInInterval(InInterval, DiverseFlow):
    """``DiverseFlow`` with CFG in an interval."""


@dataclass
class DiverseFlowFastInInterval(InInterval, DiverseFlowFast):
    """``DiverseFlowFast`` with CFG in an interval."""


@dataclass
class SPELLInInterval(InInterval, SPELL):
    """``SPELL`` with CFG in an interval."""


@dataclass
class OSCARInInterval(InInterval, OSCAR):
    """``OSCAR`` with CFG in an interval."""


@dataclass
class EDDYInInterval(InInterval, EDDY):
    """``EDDY`` with CFG in an interval."""


@dataclass
class EDDYProjectionInInterval(InInterval, EDDYProjection):
    """``EDDYProjection`` with CFG in an interval."""


@dataclass
class SelfGuidanceInInterval(InInterval, SelfGuidance):
    """``SelfGuidance`` with CFG in an interval."""


@dataclass
class ContextualRepulsionInInterval(InInterval, ContextualRepulsion):
    """``ContextualRepulsion`` with CFG in an interval."""


@dataclass
class BlockSelfGuidanceInInterval(InInterval, BlockSelfGuidance):
    """``BlockSelfGuidance`` with CFG in an interval."""


@dataclass
class OursInInterval(InInterval, GuidedAtWeight, Ours):
    """``Ours`` with CFG in an interval."""


@dataclass
class OursVividInInterval(InInterval, GuidedAtWeight, OursVivid):
    """``OursVivid`` with CFG in an interval."""


@dataclass
class OursLogDetInInterval(InInterval, GuidedAtWeight, OursLogDet):
    """``OursLogDet`` with CFG in an interval."""


IN_INTERVALS: tuple[type[Method], ...] = (
    ParticleInInterval, PooledParticleInInterval, PublishedInInterval, ContextualVendiInInterval, DiverseFlowInInterval,
    DiverseFlowFastInInterval, SPELLInInterval, OSCARInInterval, EDDYInInterval, EDDYProjectionInInterval,
    SelfGuidanceInInterval, ContextualRepulsionInInterval, BlockSelfGuidanceInInterval,
    OursInInterval, OursVividInInterval, OursLogDetInInterval,
)  # fmt: skip
