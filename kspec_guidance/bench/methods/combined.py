"""The best coupled methods with less classifier-free guidance."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from kspec_guidance import KernelGuidance, VendiGuidance
from kspec_guidance.bench.methods.base import Log, Real
from kspec_guidance.bench.methods.guides import OursVivid
from kspec_guidance.bench.methods.oscar import OSCAR
from kspec_guidance.loop.classifier_free import ClassifierFree
from kspec_guidance.loop.components import denoiser_of


@dataclass
class OursLowerGuidance(OursVivid):
    """Conditional entropy of order 0.5, at a lower CFG scale."""

    name = "SPARKE, ours, order 0.5, lower CFG"
    tuned = {"scale": Log(0.05, 10.0), "stop": Real(0.3, 1.0), "weight": Real(1.0, 4.0)}
    needs = frozenset({"guidance"})
    weight: float = 2.0

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        return self._attached(pipe)

    @contextmanager
    def _attached(self, pipe: Any) -> Iterator[Any]:
        def lower(module: Any, args: Any, out: Any) -> Any:
            uncond, cond = out[0].chunk(2)
            lowered = cond + (self.weight - 1) / (pipe.guidance_scale - 1) * (uncond - cond)
            return (torch.cat([lowered, cond]), *out[1:])

        with self.guide(pipe).attach(pipe) as guide:
            denoiser = denoiser_of(pipe)
            assert denoiser is not None
            hook = denoiser.register_forward_hook(lower)
            try:
                yield guide
            finally:
                hook.remove()


@dataclass
class OursLogDetLowerGuidance(OursLowerGuidance):
    """Conditional log determinant, at a lower CFG scale."""

    name = "SPARKE, ours, log det, lower CFG"

    def guide(self, pipe: Any) -> KernelGuidance:
        return VendiGuidance(self.scale, stop=self.stop, order="logdet")


@dataclass
class OSCARLowerGuidance(OSCAR):
    """OSCAR at a lower CFG scale."""

    name = "OSCAR, lower CFG"
    tuned = {"weight": Log(0.01, 3.0), "noise_weight": Log(0.001, 0.5), "cfg": Real(1.0, 4.0)}
    needs = frozenset({"guidance"})
    cfg: float = 2.0

    def weight_of(self, found: ClassifierFree, fraction: float) -> float | None:
        return self.cfg
