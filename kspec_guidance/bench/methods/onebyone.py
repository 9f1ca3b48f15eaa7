"""Methods with a memory that make the images of a run one after another, as calls of one image do."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from kspec_guidance import SPARKE, KernelGuidance
from kspec_guidance.bench.methods.base import Real
from kspec_guidance.bench.methods.combined import GuidedAtWeight, InInterval, OursLowerGuidance
from kspec_guidance.bench.methods.guides import Ours
from kspec_guidance.bench.methods.spell import SPELL


class OneByOne:
    """Before a method's class: each image is made in a call of its own, and the next ones remember it."""

    single: ClassVar[bool] = True

    def sample(self, bed: Any, case: Any) -> Any:
        """The samples of a case, in the form in which ``bed.run`` makes them."""
        method: Any = self
        method.remember()
        return bed.joined([self.alone(bed, case, noise[None]) for noise in bed.start(case, bed.images)])

    def alone(self, bed: Any, case: Any, latents: Tensor) -> Any:
        """The sample of one start noise ``[1, ...]``."""
        method: Any = self
        with method.attach(bed.pipe):
            return bed.run(case, 1, latents)


@dataclass
class OursOneByOne(OneByOne, Ours):
    """SPARKE with ``recall="nearest"``: away from the earlier images that the noisy sample is nearest to."""

    name = "SPARKE, ours, one by one"
    tuned_as = "SPARKE, ours"

    def guide(self, pipe: Any) -> KernelGuidance:
        return SPARKE(self.scale, stop=self.stop, recall="nearest")


@dataclass
class OursOneByOneLowerGuidance(OursOneByOne, OursLowerGuidance):
    """The same at a lower CFG scale."""

    name = "SPARKE, ours, one by one, lower CFG"
    tuned_as = "SPARKE, ours, order 0.5, lower CFG"


@dataclass
class OursOneByOneInInterval(InInterval, GuidedAtWeight, OursOneByOne):
    """``OursOneByOne`` with CFG in an interval."""

    tuned_as = "SPARKE, ours, interval CFG"


@dataclass
class SPELLOneByOne(OneByOne, SPELL):
    """``SPELL`` from the finished images alone."""

    name = "SPELL, one by one"
    tuned_as = "SPELL"

    def sample(self, bed: Any, case: Any) -> Any:
        self.radius_unit = bed.radius_unit()
        return super().sample(bed, case)

    def alone(self, bed: Any, case: Any, latents: Tensor) -> Any:
        assert self.earlier is not None
        found = super().alone(bed, case, latents)
        self.earlier.append(found)
        return found


@dataclass
class SPELLOneByOneLowerGuidance(SPELLOneByOne):
    """The same at a lower CFG scale."""

    name = "SPELL, one by one, lower CFG"
    tuned = {**SPELL.tuned, "cfg": Real(1.0, 4.0)}
    tuned_as = ""
    needs = frozenset({"guidance"})
    cfg: float = 2.0

    def weight_of(self, fraction: float) -> float | None:
        return self.cfg
