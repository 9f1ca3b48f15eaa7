"""Term: an objective with its scale, guided interval, feature space, transforms and memory."""

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from kspec_guidance.guidance.spaces import X0, FeatureSpace, make_space
from kspec_guidance.guidance.targets import VarietyTarget
from kspec_guidance.guidance.transforms import TRANSFORMS
from kspec_guidance.kernels import PROMPT_BANDWIDTH, ExpCosineKernel, GaussianKernel
from kspec_guidance.memory import Memory, MemoryBank
from kspec_guidance.objectives import Objective
from kspec_guidance.utils.arguments import is_integer, plain_number

__all__ = ["DEFAULT_TRANSFORMS", "FEW_NUMBERS", "VARIETY_AT_SCALE_1", "Term", "least_cfg_share"]

VARIETY_AT_SCALE_1 = 40.0  # in the unit "spread"

# In the unit "spread" the guided interval of short runs is shorter: from this many steps on it is whole, at this many or
# fewer it has this share (python benchmarks/variety.py --windows)
WHOLE_INTERVAL, SHORT_INTERVAL, SHORT_SHARE = 8, 4, 0.5 / 0.65

# docs/arena/ablations.md measures each transform alone: off_score has the largest effect
DEFAULT_TRANSFORMS = ("tangent", "off_score", "bound", "fade")
APART_TRANSFORMS = ("tangent", "off_score", "rescale")  # with apart=, which gives each move its size and its end

# In so many dimensions moves off two directions have at most one left; with less classifier-free guidance, moves in any
# direction gain more there (docs/arena/ablations.md, "Toy data of two dimensions")
FEW_NUMBERS = 3
FIXING = ("tangent", "off_score")  # the transforms that fix a direction

RECALLS = ("all", "nearest")
BY_SIZE = {"plain", "rescale_from", "rescale_damped"}  # transforms that read the size of a gradient

LONGEST = 150  # characters of a setting in the repr
USUAL = {"space": X0(), "start": 0.0, "stop": 1.0, "every": 1, "sigma_interval": None, "transforms": DEFAULT_TRANSFORMS,
         "ease_cfg": None, "cfg_share": None, "recall": "all", "apart": None}  # fmt: skip
USUAL_KERNELS: dict[str, Any] = {"kernel": GaussianKernel(), "prompt_kernel": GaussianKernel(PROMPT_BANDWIDTH)}


class Term:
    """An objective with its scale, guided interval, feature space, transforms and memory.

    Args:
        objective: the objective to ascend.
        scale: size of a move, at least 0.
        unit: unit of the scale: ``norm``, the norm of the moved sample, or ``spread``, that norm times the squared median
            distance between samples of the same prompt, of norm 1. The latter adapts to how much a model varies its
            images, so that one scale has like effects on different models (docs/variety.md).
        space: feature space for comparisons: ``x0`` (the clean prediction), ``latents`` (the noisy sample, as in the
            papers), ``pooled``, ``pixels``, ``activations``, ``block``, ``context``, or a
            :class:`~kspec_guidance.guidance.spaces.FeatureSpace`. ``latents`` moves the noisy sample after the step,
            ``block`` and ``context`` move hidden states inside the denoiser, the others move the clean prediction, through
            the model output.
        start, stop: the guided interval as fractions of the run, ``0 <= start <= stop <= 1``.
        every: number of steps from one guided step to the next.
        sigma_interval: bounds ``(low, high)`` of the noise-to-signal ratio, as a further condition.
        transforms: names of :mod:`kspec_guidance.guidance.transforms`, in order; by default ``DEFAULT_TRANSFORMS``, and for
            samples of three numbers or fewer what :meth:`for_numbers` leaves of them.
        memory: memory of earlier samples; by default a new one.
        target: chooses the scale of each prompt, from call to call; with unit ``spread``.
        ease_cfg: weight of classifier-free guidance at the start of the guided interval, at least 0, where the pipeline's
            own is larger; it returns to the pipeline's at the end of the interval, as moves fade. 1 is the prediction with
            the prompt alone. Has no effect on pipelines or calls without classifier-free guidance.
        cfg_share: share in 0..1 of the pipeline's classifier-free guidance that is left for the whole call: its weight is
            ``1 + cfg_share (w - 1)``, w the pipeline's own. 1 changes nothing, 0 is the prediction with the prompt alone.
            ``ease_cfg`` then starts from this weight and returns to it; of several terms the least share counts; a term of
            scale 0 has none. No effect without classifier-free guidance, as ``ease_cfg``.
        recall: how a memory repels: ``all``, as the objective weighs all rows, or ``nearest``: each sample moves away from
            the memory rows to which its *noisy* sample is nearest, as much as from the batch. The latter finds more modes
            over several calls of one prompt on mixtures, fewer on digits (docs/arena/sets.md). It is for the objectives of
            SPARKE and VendiGuidance, the space ``x0``, memories that keep rows, and transforms that do not read the size of
            a gradient.
        apart: distance above 0, relative to the norm of a prediction, from which samples of one prompt no longer repel.
            A move is then ``scale`` times the distance that is missing to the nearest sample of the batch or the memory,
            times the norm; samples that differ enough stay as they are, which keeps more of their agreement with the
            prompt (docs/arena/ablations.md). By default each guided step moves whatever the distances. It is for the
            same objectives, space and memories as ``recall="nearest"``, and for the unit ``norm``.

    Raises:
        TypeError: for a memory that is none.
        ValueError: for settings outside their ranges.
    """

    def __init__(
        self,
        objective: Objective,
        scale: float,
        space: FeatureSpace | str = "x0",
        start: float = 0.0,
        stop: float = 1.0,
        every: int = 1,
        sigma_interval: tuple[float, float] | None = None,
        transforms: Sequence[str] | None = None,
        memory: Memory | None = None,
        unit: str = "norm",
        target: VarietyTarget | None = None,
        ease_cfg: float | None = None,
        recall: str = "all",
        cfg_share: float | None = None,
        apart: float | None = None,
    ):
        size = plain_number(scale)
        if size is None or not 0 <= size < math.inf:
            raise ValueError(
                f"scale must be a finite number of at least 0, got {scale!r}; to move images toward a reference set use "
                "MMDGuidance: with a negative scale moves would be unbounded"
            )
        begin, end = plain_number(start), plain_number(stop)
        if begin is None or end is None or not 0 <= begin <= end <= 1:
            raise ValueError(f"need 0 <= start <= stop <= 1 as fractions of the run, got {start!r} and {stop!r}")
        if not is_integer(every, 1):
            raise ValueError(f"every must be an integer of at least 1, got {every!r}")
        if sigma_interval is not None:
            sigma_interval = _interval(sigma_interval)
        self.own_transforms = transforms is not None  # whether they were given
        transforms = usual_transforms(apart) if transforms is None else transforms
        if isinstance(transforms, str) or not isinstance(transforms, Sequence):
            raise ValueError(f"transforms is a tuple of names, such as {DEFAULT_TRANSFORMS}, got {transforms!r}")
        unknown = [name for name in transforms if name not in TRANSFORMS]
        if unknown:
            raise ValueError(f"unknown transforms {unknown}; known are {', '.join(TRANSFORMS)}")
        if unit not in ("norm", "spread"):
            raise ValueError(f"unit must be 'norm' or 'spread', got {unit!r}")
        if unit == "spread" and not objective.measures_spread:
            raise ValueError(
                f"{type(objective).__name__} does not measure the spread of samples; use unit='norm', or SPARKE's objective"
            )
        if target is not None and unit != "spread":
            raise ValueError(f"a target chooses scales in the unit 'spread', got unit={unit!r}")
        weight = plain_number(ease_cfg)
        if ease_cfg is not None and (weight is None or not 0 <= weight < math.inf):
            raise ValueError(
                "ease_cfg must be a weight of classifier-free guidance of at least 0, such as 1 for the prediction with "
                f"the prompt alone, or None, got {ease_cfg!r}"
            )
        share = plain_number(cfg_share)
        if cfg_share is not None and (share is None or not 0 <= share <= 1):
            raise ValueError(
                "cfg_share must be the share of classifier-free guidance that is left, from 0, for the prediction with the "
                f"prompt alone, to 1, or None, got {cfg_share!r}"
            )
        distance = plain_number(apart)
        if apart is not None and (distance is None or not 0 < distance < math.inf):
            raise ValueError(
                "apart must be a distance above 0, relative to the norm of a prediction, such as 0.8, or None, got "
                f"{apart!r}"
            )
        if apart is not None and unit == "spread":
            raise ValueError(
                f"apart={apart!r} sets how far samples move apart, as a variety or the unit 'spread' does; with it give "
                "scale= in the unit 'norm'"
            )
        if recall not in RECALLS:
            raise ValueError(f"recall must be 'all' or 'nearest', got {recall!r}")
        self.recall = recall
        if memory is not None and not isinstance(memory, Memory):
            raise TypeError(f"memory must be a memory such as MemoryBank(), or None for a new one, got {memory!r:.80}")
        self.target, self.ease_cfg = target, None if weight is None else float(weight)
        self.cfg_share = None if share is None else float(share)
        self.apart = None if distance is None else float(distance)
        self.objective, self.scale, self.unit, self.space = objective, size, unit, make_space(space)
        self.start, self.stop, self.every = begin, end, int(every)
        self.sigma_interval, self.transforms = sigma_interval, tuple(transforms)
        if self.space.step_by_step and sigma_interval is not None:
            raise ValueError(
                f"space={self.space.name!r} compares features of the same step, so the guided steps must be known in "
                "advance; give start= and stop= instead of sigma_interval="
            )
        if self.space.step_by_step and objective.has_reference:
            raise ValueError(
                f"{type(objective).__name__} compares with fixed references, and features of space={self.space.name!r} "
                "differ from step to step; choose 'x0' or 'pooled'. To move away from images in this space: "
                "SPARKE(space=...).remember_images(pipe, images, prompt, ...)"
            )
        if self.space.inside:
            if target is not None:
                raise ValueError(
                    f"a target limits moves of predictions, and space={self.space.name!r} moves none; use 'x0'"
                )
            if "keep_prompt" in transforms:
                raise ValueError(f"keep_prompt is for moves of predictions, and space={self.space.name!r} moves none")
            self.transforms = tuple(name for name in transforms if name != "off_score")  # hidden states have no score
        self.memory: Memory = objective.make_memory() if memory is None else memory
        if recall == "nearest":
            self._check_rows("recall='nearest' compares noisy samples with rows of the memory", "Use recall='all'")
            by_size = ", ".join(sorted(BY_SIZE.intersection(self.transforms)))
            if by_size:
                raise ValueError(
                    "recall='nearest' needs transforms that do not read the size of a gradient, got "
                    f"{by_size}. Use recall='all'"
                )
        if apart is not None:
            self._check_rows(f"apart={apart!r} compares predictions with rows of the memory", "Leave it out")

    def _check_rows(self, what: str, advice: str) -> None:
        """Raise an error where samples are not compared with rows of a memory one by one."""
        space = self.space
        if not self.objective.recalls or not self.objective.normalize:
            why = f"the objective of SPARKE or VendiGuidance, got {type(self.objective).__name__}"
        elif not space.direct or space.noisy or space.inside:
            why = f"space='x0', got {space.name!r}"
        elif not isinstance(self.memory, MemoryBank):
            why = f"a memory that keeps rows, got {type(self.memory).__name__}"
        else:
            return
        raise ValueError(f"{what}; it needs {why}. {advice}")

    @property
    def variety(self) -> float | None:
        """The scale as a variety, usually from 0 to 100; None for scales relative to the norm, and with a target."""
        return VARIETY_AT_SCALE_1 * self.scale if self.unit == "spread" and self.target is None else None

    @property
    def strength(self) -> tuple[str, float]:
        """Name and value of the setting that gives the strength: ``variety``, ``apart`` or ``scale``."""
        if self.apart is not None and self.scale:
            return "apart", self.apart
        return ("scale", float(self.scale)) if self.variety is None else ("variety", self.variety)

    def for_numbers(self, count: int) -> "Term":
        """This term for samples of so many numbers: of three or fewer, such as points of the plane, a changed copy.

        The default transforms and rows of norm 1 keep a prediction's norm and, to first order, its likelihood, which leaves
        at most one direction of three. So the copy has none of the transforms that fix a direction, and the objectives of
        SPARKE and VendiGuidance compare predictions as they are, with a Gaussian kernel at their median distance where the
        kernel was of cosines (:class:`~kspec_guidance.kernels.ExpCosineKernel`). They still compare them at norm 1 where
        something given depends on it: another kernel, random features, another memory than a
        :class:`~kspec_guidance.memory.MemoryBank`, or ``recall="nearest"``.

        Terms with transforms of their own, and those that compare in another space than ``x0``, stay as they are.
        """
        if count > FEW_NUMBERS or self.own_transforms or not self.space.direct or self.space.noisy or self.space.inside:
            return self
        few = copy.copy(self)
        few.transforms = tuple(name for name in self.transforms if name not in FIXING)
        kernel = getattr(self.objective, "kernel", None)
        free = isinstance(kernel, ExpCosineKernel) or (isinstance(kernel, GaussianKernel) and kernel.open)
        free = free and getattr(self.objective, "feature_map", None) is None and isinstance(self.memory, MemoryBank)
        if free and self.objective.recalls and self.recall == "all":
            objective: Any = copy.copy(self.objective)
            objective.normalize = False
            objective.kernel = GaussianKernel() if isinstance(kernel, ExpCosineKernel) else kernel
            few.objective = objective
        return few

    def check_order(self, shape: tuple[int, ...]) -> None:
        """Refuse references with as many numbers as samples of this shape in another order, which rows would not show.

        Raises:
            ValueError: naming both shapes. References of rows ``[m, d]`` tell no order, and are taken as they are.
        """
        if not self.scale or not self.space.direct or len(shape) < 2:
            return
        given = [getattr(self.objective, name, None) for name in ("reference", "baseline")]
        for found in [*given, *getattr(self.objective, "references", ())]:
            own = tuple(found.shape[1:]) if isinstance(found, Tensor) and found.ndim > 2 else shape
            if [n for n in own if n > 1] != [n for n in shape if n > 1] and math.prod(own) == math.prod(shape):
                raise ValueError(
                    f"references or a baseline have samples of shape {list(own)}, and those of this call have "
                    f"{list(shape)}: as many numbers in another order; make them with this pipeline, at the height and "
                    "width of the call"
                )

    def guided_steps(self, total: int) -> frozenset[int]:
        """Indices of the guided steps in a run of ``total`` steps, regardless of their noise level."""
        if self.scale == 0:
            return frozenset()
        start, stop = self.interval(total)
        first = math.ceil(start * total - 1e-9)
        return frozenset(
            step for step in range(total) if start <= step / total < stop - 1e-9 and (step - first) % self.every == 0
        )

    def interval(self, total: int) -> tuple[float, float]:
        """The guided interval of a run of ``total`` steps, as fractions; with unit ``spread`` shorter below 8 steps."""
        if self.unit == "norm":
            return self.start, self.stop
        whole = min(max((total - SHORT_INTERVAL) / (WHOLE_INTERVAL - SHORT_INTERVAL), 0.0), 1.0)
        share = SHORT_SHARE + (1 - SHORT_SHARE) * whole
        return self.start, self.start + (self.stop - self.start) * share

    @property
    def settings(self) -> str:
        """The objective, the scale, and the settings that differ from the usual ones, on one line."""
        usual_here = USUAL | {"transforms": usual_transforms(self.apart)}
        found = [(name, getattr(self, name), usual) for name, usual in usual_here.items()]
        if dataclasses.is_dataclass(self.objective):
            fields = [f for f in dataclasses.fields(self.objective) if f.init]
            found += [(f.name, getattr(self.objective, f.name), USUAL_KERNELS.get(f.name, f.default)) for f in fields]
        texts = [(name, _text(value), _text(usual)) for name, value, usual in found if value is not None]
        changed = [f"{name}={text}" for name, text, usual in texts if text != usual]
        strength = f"scale={self.scale:g}" if self.variety is None else f"variety={self.variety:g}"
        strength = strength if self.target is None else f"target='{self.target}'"
        return ", ".join([type(self.objective).__name__, strength, *changed])

    def __repr__(self) -> str:
        return f"Term({self.settings}; {type(self.memory).__name__} with {len(self.memory)} entries)"


def usual_transforms(apart: float | None) -> tuple[str, ...]:
    """The transforms of a term without ones of its own, given its ``apart=``."""
    return DEFAULT_TRANSFORMS if apart is None else APART_TRANSFORMS


def least_cfg_share(terms: Sequence[Term]) -> float | None:
    """The least ``cfg_share`` of terms that guide; None if it leaves all of the classifier-free guidance."""
    found = min((term.cfg_share for term in terms if term.scale and term.cfg_share is not None), default=1.0)
    return found if found < 1 else None


def _interval(given: Any) -> tuple[float, float]:
    """Bounds of noise-to-signal ratios.

    Raises:
        ValueError: for anything else.
    """
    bounds = [plain_number(value) for value in given] if isinstance(given, tuple | list) else []
    low, high = bounds if len(bounds) == 2 else (None, None)
    if low is None or high is None or not 0 <= low <= high:
        raise ValueError(f"sigma_interval must be (low, high) with 0 <= low <= high, got {given!r}")
    return low, high


def _text(value: Any) -> str:
    """A setting on one line: tensors by their shape, lists of tensors by their number, and networks by their class."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, list) and any(isinstance(v, Tensor) for v in value):
        return f"{len(value)} tensors"
    text = " ".join(repr(value).split())
    return text if len(text) <= LONGEST else f"{type(value).__name__}(...)"
