"""Less classifier-free guidance: over the whole run, or in an interval of it."""

from dataclasses import dataclass

from kspec_guidance.bench.methods.base import Method, Real


@dataclass
class LowerGuidance(Method):
    """The scale ``w'`` in place of the pipeline's ``w`` (Ho, Salimans 2022, arXiv 2207.12598)."""

    name = "lower CFG"
    single = True
    code = "lower-cfg"
    paper = "arXiv 2207.12598"
    tuned = {"weight": Real(1.0, 4.0)}
    strength = "weight"
    needs = frozenset({"guidance"})
    falls = True
    weight: float = 2.0

    def weight_of(self, fraction: float) -> float | None:
        return self.weight


@dataclass
class Interval(Method):
    """Guidance for ``start <= fraction < stop`` only (Kynkaanniemi and others 2024, arXiv 2404.07724)."""

    name = "interval CFG"
    single = True
    code = "interval-cfg"
    paper = "arXiv 2404.07724"
    tuned = {"start": Real(0.0, 0.8), "stop": Real(0.6, 1.0)}
    strength = "start"
    needs = frozenset({"guidance"})
    start: float = 0.3
    stop: float = 1.0

    def weight_of(self, fraction: float) -> float | None:
        return None if self.start <= fraction < self.stop else 1.0
