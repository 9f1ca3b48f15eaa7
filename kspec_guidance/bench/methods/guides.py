"""Methods that are guides of the package: its defaults, the published settings, and the Vendi gradient of c-VSG."""

import functools
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from kspec_guidance import SPARKE, KernelGuidance, MMDGuidance, VendiGuidance
from kspec_guidance.bench.methods.base import Log, Method, Real, Whole
from kspec_guidance.guidance.spaces import Pixels
from kspec_guidance.objectives import Vendi


class Guided(Method):
    """A method that is a guide of the package, with a new memory for each run unless told to remember."""

    def guide(self, pipe: Any) -> KernelGuidance:
        """The guide of one run."""
        raise NotImplementedError

    def remember(self) -> None:
        self.guide = functools.cache(self.guide)  # type: ignore[method-assign]

    def attach(self, pipe: Any) -> AbstractContextManager[Any]:
        return self.guide(pipe).attach(pipe)


@dataclass
class Ours(Guided):
    """SPARKE with the package's defaults: x0, half the median distance, tangent, off the score, bounded, fading."""

    name = "SPARKE, ours"
    paper = "arXiv 2506.10173"
    tuned = {"scale": Log(0.05, 10.0), "stop": Real(0.3, 1.0)}
    strength = "scale"
    scale: float = 1.0
    stop: float = 0.65

    @classmethod
    def first(cls, steps: int) -> dict[str, Any]:
        return {k: SPARKE.PRESETS["few-step"][k] for k in ("scale", "stop")} if steps <= 4 else {}

    def guide(self, pipe: Any) -> KernelGuidance:
        return SPARKE(self.scale, stop=self.stop)


class OursVivid(Ours):
    """The same with conditional entropy of order 0.5 at the median distance: the preset ``vivid``."""

    name = "SPARKE, ours, order 0.5"

    def guide(self, pipe: Any) -> KernelGuidance:
        return VendiGuidance(self.scale, stop=self.stop, order=0.5)


@dataclass
class OursLogDet(OursVivid):
    """The same with the conditional log determinant."""

    name = "SPARKE, ours, log det"

    def guide(self, pipe: Any) -> KernelGuidance:
        return VendiGuidance(self.scale, stop=self.stop, order="logdet")


@dataclass
class OursApart(Guided):
    """Conditional entropy of order 0.5, with moves that end where images are ``apart``: the preset ``faithful``.

    ``apart`` is relative to the norm of a prediction; ``scale`` is the share of what is missing that a step makes up.
    """

    name = "SPARKE, ours, until apart"
    paper = "arXiv 2506.10173"
    tuned = {"apart": Log(0.1, 3.0), "stop": Real(0.3, 1.0)}
    strength = "apart"
    apart: float = SPARKE.PRESETS["faithful"]["apart"]
    scale: float = SPARKE.PRESETS["faithful"]["scale"]
    stop: float = SPARKE.PRESETS["faithful"]["stop"]

    def guide(self, pipe: Any) -> KernelGuidance:
        return VendiGuidance(self.scale, stop=self.stop, order=0.5, apart=self.apart)


@dataclass
class Dial(Guided):
    """SPARKE as users have it: the dial from 0 to 100, in the unit of a model's own variety (docs/variety.md)."""

    name = "SPARKE"
    code = "sparke"
    paper = "arXiv 2506.10173"
    strength = "variety"
    strengths = (10.0, 25.0, 50.0, 75.0, 100.0)
    variety: float = 50.0

    def guide(self, pipe: Any) -> KernelGuidance:
        return SPARKE(variety=self.variety)


@dataclass
class Preset(Guided):
    """A preset of SPARKE, named by ``code``."""

    paper = "arXiv 2506.10173"
    strength = "scale"
    scale: float = 1.0

    def guide(self, pipe: Any) -> KernelGuidance:
        return SPARKE.preset(self.code, scale=self.scale)


@dataclass
class Vivid(Preset):
    """The preset ``vivid``: conditional entropy of order 0.5."""

    name = "vivid"
    code = "vivid"
    strengths = (0.4, 0.75, 1.5, 3.0)
    scale: float = SPARKE.PRESETS["vivid"]["scale"]


@dataclass
class Explore(Preset):
    """The preset ``explore``: ``vivid`` with half of the pipeline's classifier-free guidance."""

    name = "explore"
    code = "explore"
    needs = frozenset({"guidance"})
    strengths = Vivid.strengths
    scale: float = SPARKE.PRESETS["explore"]["scale"]


@dataclass
class Faithful(OursApart):
    """The preset ``faithful``: images are moved only until they differ."""

    name = "faithful"
    code = "faithful"
    strengths = (0.5, 0.7, 0.9, 1.2)


@dataclass
class FewStep(Preset):
    """The preset ``few-step``, for samplers of 1 to 4 steps."""

    name = "few-step"
    code = "few-step"
    strengths = (0.3, 0.6, 1.2)
    scale: float = SPARKE.PRESETS["few-step"]["scale"]


@dataclass
class Entropy(Guided):
    """The Vendi score of order 1, given prompts."""

    name = "Vendi, order 1"
    code = "vendi"
    paper = "arXiv 2210.02410"
    strength = "scale"
    strengths = (0.5, 1.0, 2.0)
    scale: float = 1.0

    def guide(self, pipe: Any) -> KernelGuidance:
        return VendiGuidance(self.scale, order=1.0)


@dataclass
class TowardReference(Guided):
    """Moves toward what reference images have and the model's own images have not: MMD guidance with a baseline.

    Without a baseline, a batch of one prompt does not take on the style of the references (docs/toward-style.md).

    Args:
        scale: size of the move.
        baseline_samples: the number of samples of the baseline.
        reference: latents ``[m, ...]`` of the references.
        baseline: latents ``[b, ...]`` that the pipeline makes without guidance.
    """

    name = "MMD"
    code = "mmd"
    paper = "arXiv 2601.08379"
    strength = "scale"
    strengths = (0.5, 1.0, 2.0)
    needs = frozenset({"reference"})
    scale: float = 1.0
    baseline_samples: int = 100
    reference: Tensor | None = field(default=None, repr=False)
    baseline: Tensor | None = field(default=None, repr=False)

    def guide(self, pipe: Any) -> KernelGuidance:
        assert self.reference is not None
        return MMDGuidance(self.reference, self.scale, baseline=self.baseline)


@dataclass
class Published(Guided):
    """The step of SPARKE's authors, with images one after another and a memory of them (commit in SPARKE.published).

    Their memory would be empty here, since no last step is at timestep 20, 1 or 0; this one is filled.
    """

    name = "SPARKE, authors' code"
    single = True
    code = "sparke-published"
    paper = "arXiv 2506.10173"
    tuned = {"scale": Log(0.003, 1.0), "every": Whole(1, 10)}
    strength = "scale"
    scale: float = 0.03
    every: int = 10

    def guide(self, pipe: Any) -> KernelGuidance:
        return SPARKE.published(self.scale, every=self.every)

    def sample(self, bed: Any, case: Any) -> Any:
        start = bed.start(case, bed.images)
        with self.attach(bed.pipe):
            return bed.joined([bed.run(case, 1, noise[None]) for noise in start])


@dataclass
class ContextualVendi(Guided):
    """The Vendi score's gradient, cosine kernel, rescaled to the norm, every few steps (c-VSG, 2024).

    Features are the decoded prediction at 16 x 16 pixels where there is a decoder, in place of the paper's CLIP, whose
    weights are not available; otherwise the prediction itself.
    """

    name = "c-VSG"
    code = "c-vsg"
    paper = "c-VSG 2024"
    tuned = {"scale": Log(0.003, 1.0), "every": Whole(1, 5)}
    strength = "scale"
    scale: float = 0.05
    every: int = 5

    def guide(self, pipe: Any) -> KernelGuidance:
        space = Pixels(chunk=16) if getattr(pipe, "vae", None) is not None else "x0"
        return KernelGuidance(Vendi(), self.scale, space, every=self.every, transforms=("rescale",))
