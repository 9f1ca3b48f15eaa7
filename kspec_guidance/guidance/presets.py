"""Guides with default objectives: SPARKE, VendiGuidance, MMDGuidance and NoveltyGuidance, and their published settings."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.guide import KernelGuidance
from kspec_guidance.guidance.spaces import FeatureSpace, Latents
from kspec_guidance.guidance.targets import FIRST, Fidelity, VarietyTarget
from kspec_guidance.guidance.term import VARIETY_AT_SCALE_1
from kspec_guidance.kernels import PROMPT_BANDWIDTH, ExpCosineKernel, GaussianKernel, Kernel
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import (
    MMD,
    ConditionalRKE,
    LogDet,
    Novelty,
    Objective,
    PublishedMMD,
    PublishedRKE,
    Vendi,
    Witness,
)
from kspec_guidance.utils.arguments import choices, plain_number

__all__ = ["DEFAULT_VARIETY", "SPARKE", "MMDGuidance", "NoveltyGuidance", "VendiGuidance", "scale_of"]

DEFAULT_VARIETY = 50.0
APART_SCALE = 0.8  # share of the missing distance that a step of apart= makes up


def scale_of(variety: float) -> float:
    """The scale of a variety, in the unit ``spread`` of :class:`~kspec_guidance.guidance.Term`.

    Raises:
        ValueError: outside 0 to 100.
    """
    number = plain_number(variety)
    if number is None or not 0 <= number <= 100:
        raise ValueError(f"variety must be a number from 0 (plain sampling) to 100, got {variety!r}")
    return float(number) / VARIETY_AT_SCALE_1


def _check_baseline(baseline: Tensor | None, prompts: Tensor | None, prompt_feature_map: Any) -> None:
    """Refuse settings that a guide has only with a baseline, or only without.

    Raises:
        ValueError: naming them.
    """
    if baseline is None and prompts is not None:
        raise ValueError("baseline_prompts are the prompts of a baseline; give baseline= too")
    if baseline is not None and prompt_feature_map is not None:
        raise ValueError("a guide with a baseline has no features of prompts; leave prompt_feature_map out")


class SPARKE(KernelGuidance):
    """Increases diversity: images repel each other, and earlier images, *of similar prompts*.

    Ascends conditional RKE (Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173), the conditional Renyi entropy of order 2:
    a sum over all relevant memory rows, for any kind of memory. For other orders see :class:`VendiGuidance`.

    Args:
        scale: largest move of a step relative to the norm of the prediction, at the start of the guided interval, after
            which it fades; a fixed strength instead of ``variety``.
        kernel: kernel of samples scaled to norm 1; by default Gaussian at half the median distance of the pairs.
        prompt_kernel: kernel of unit-norm prompt features; by default Gaussian with bandwidth 0.35.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        variety: strength from 0 (plain sampling) to 100; by default 50: clearly more varied, at little or no loss.
            In proportion to the squared distance between a model's images of one prompt, so that one value has like effects
            on different models (docs/variety.md). The ``scale`` is then ``variety / 40``, in the unit ``spread`` of
            :class:`~kspec_guidance.guidance.Term`.
        target: a number of different images out of several, such as ``"6 of 8"``, instead of a strength: the variety of
            each prompt rises from call to call until its images are as different, see
            :class:`~kspec_guidance.guidance.VarietyTarget`.
        fidelity: the guard of a target; by default it limits the moves, False for none.
        feature_map, prompt_feature_map: random Fourier features of the two kernels, for a memory of constant size.
        kwargs: ``sigma_interval``, ``seed``, ``ease_cfg``, ``cfg_share``, ``recall`` and ``apart``, see
            :class:`~kspec_guidance.guidance.KernelGuidance`. With ``apart`` the scale is 0.8 by default.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for settings outside their ranges, for two of scale, variety and target, or for a fidelity without a
            target.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {  # compared in docs/arena/settings.md
        "default": {},
        "safe": {"scale": 0.5},
        "vivid": {"order": 0.5, "scale": 1.5},
        "explore": {"order": 0.5, "scale": 1.5, "cfg_share": 0.5},
        "faithful": {"order": 0.5, "scale": APART_SCALE, "apart": 0.9, "stop": 0.35},
        "few-step": {"order": 0.5, "scale": 0.6, "stop": 0.6},
        "published": {},
    }

    def __init__(
        self,
        scale: float | None = None,
        kernel: Kernel | None = None,
        prompt_kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.65,
        every: int = 1,
        memory: Memory | None = None,
        *,
        variety: float | None = None,
        target: str | VarietyTarget | None = None,
        fidelity: Fidelity | bool | None = None,
        transforms: Sequence[str] | None = None,
        feature_map: RandomFourierFeatures | None = None,
        prompt_feature_map: RandomFourierFeatures | None = None,
        **kwargs: Any,
    ):
        objective = ConditionalRKE(
            kernel=kernel or GaussianKernel(),
            feature_map=feature_map,
            prompt_kernel=prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            prompt_feature_map=prompt_feature_map,
        )
        settings: dict[str, Any] = {"transforms": transforms, "memory": memory, **kwargs}
        given = {k: v for k, v in {"target": target, "variety": variety, "scale": scale}.items() if v is not None}
        if len(given) > 1:
            listed = " and ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"{listed} {'both' if len(given) == 2 else 'all'} set the strength; give one of them")
        if target is not None:
            if isinstance(target, VarietyTarget):
                target = target.copy() if fidelity is None else VarietyTarget(target.different, target.of, fidelity)
            else:
                target = VarietyTarget.parse(target, fidelity)
            settings["target"], variety = target, FIRST
        elif fidelity is not None:
            raise ValueError("fidelity= is the guard of a target; give target= with it, such as target='6 of 8'")
        if not given and kwargs.get("apart") is not None:
            scale = APART_SCALE
        if scale is None:
            scale = scale_of(DEFAULT_VARIETY if variety is None else variety)
            if settings.setdefault("unit", "spread") != "spread":
                raise ValueError(f"a variety is in the unit 'spread', got unit={settings['unit']!r}; give scale= with it")
        super().__init__(objective, scale, space, start, stop, every, **settings)

    @property
    def variety(self) -> float | None:
        """The strength from 0 to 100; None if the guide has a fixed scale or a target."""
        return self.terms[0].variety

    @property
    def target(self) -> VarietyTarget | None:
        """The target, with what it has learned of each prompt; None if the guide has none."""
        return self.terms[0].target

    @classmethod
    def published(cls, scale: float = 0.03, variant: str = "code", **kwargs: Any) -> "SPARKE":
        """SPARKE as its authors run it, or as their paper writes it; the two are different steps.

        ``code`` is mjalali/sparke-diffusers at commit 968fb0e, to rounding, for images that are generated one by one with
        one guide. At every 10th step the noisy latents move *before* the scheduler's step, whose model output stays as it
        was, by ``scale`` times their norm along the gradient (:class:`~kspec_guidance.objectives.PublishedRKE`, bandwidths
        0.6 and 0.3). The memory holds the noisy latents that each last step started from, for the newest 4,000 images. The
        first image is not guided. What differs: prompt features are those of the pipeline, not of CLIP ViT-B/32; the
        memory grows with any number of steps, where the authors' needs a guided last step at timestep 20, 1 or 0 (51 steps)
        and otherwise stays empty, without guidance; images of one batch also repel each other, where theirs is limited to
        one.

        ``paper`` is Algorithm 1 of arXiv 2506.10173: the gradient of ``||K o K_T||_F^2 / n^2`` times ``scale``, with no
        rescaling, is subtracted *after* every 10th step; bandwidths 0.8 and 0.3, all finished images as memory; 50 steps of
        DPM-Solver with Stable Diffusion 2.1. Samples are scaled to norm 1 as in the code, since the kernel is 0 at the
        distances between latents, about 180. The moves of latents with norm 128 are then below 1e-5 of it: use ``code``.

        Args:
            scale: in ``code`` the size of the move relative to the norm of the latents, 0.03 in the authors' script and 0.4
                in their README; in ``paper`` the factor of the gradient.
            variant: ``code`` or ``paper``.
            kwargs: settings that replace the published ones: those of :class:`~kspec_guidance.guidance.Term`, ``kernel``,
                ``prompt_kernel``, ``seed``, and the context term: ``context``, ``context_prompts`` and ``beta`` of
                :class:`~kspec_guidance.objectives.PublishedRKE`.

        Raises:
            TypeError: for an unknown argument; the message suggests a known one.
            ValueError: for another variant, or settings outside their ranges.
        """
        settings: dict[str, Any] = {"prompt_kernel": GaussianKernel(0.3), "every": 10}
        if variant == "code":
            settings |= {"kernel": GaussianKernel(0.6), "space": Latents(before=True, as_compared=True)}
            settings |= {"transforms": ("rescale_from",)}
        elif variant == "paper":
            settings |= {"kernel": GaussianKernel(0.8), "space": "latents", "transforms": ("plain",)}
        else:
            raise ValueError(f"variant must be 'code' or 'paper', got {variant!r}")
        settings |= kwargs
        context = {name: settings.pop(name) for name in ("context", "context_prompts", "beta") if name in settings}
        objective = PublishedRKE(settings.pop("kernel"), settings.pop("prompt_kernel"), variant, **context)
        guide = cls.__new__(cls)
        KernelGuidance.__init__(guide, objective, scale, **settings)
        return guide

    @staticmethod
    def preset(name: str, **kwargs: Any) -> KernelGuidance:
        """Create a guide from a preset: default, safe, vivid, explore, faithful, few-step or published.

        docs/arena/settings.md compares them with each other and with other methods. ``vivid``, ``explore``, ``faithful``
        and ``few-step`` have order 0.5, so they are :class:`VendiGuidance`. ``explore`` is ``vivid`` with half of the
        pipeline's classifier-free guidance: more modes, at less agreement with the prompt. ``faithful`` moves images only
        until they differ (``apart=``), which keeps agreement.

        Args:
            name: name of the preset.
            kwargs: settings that replace the preset's.

        Raises:
            ValueError: for an unknown name; the message lists the known ones.
        """
        if not isinstance(name, str) or name not in SPARKE.PRESETS:
            raise ValueError(f"unknown preset {name!r}; {choices(name, SPARKE.PRESETS)}")
        settings = SPARKE.PRESETS[name] | kwargs
        if name == "published":
            return SPARKE.published(**settings)
        return VendiGuidance(**settings) if "order" in settings else SPARKE(**settings)


class VendiGuidance(KernelGuidance):
    """Increases diversity: the Vendi score of any order, given prompts. :class:`SPARKE` is order 2, without eigenvalues.

    Ascends the conditional Renyi entropy of order q of the batch and the 128 memory rows nearest to it. Order 0.5 finds
    more modes than order 2 (docs/arena.md), at the cost of an eigendecomposition per step.

    Args:
        scale: see :class:`SPARKE`.
        order: q in (0, inf], or ``"logdet"`` for the log determinant instead of an entropy
            (:class:`~kspec_guidance.objectives.LogDet`): with a lower ``guidance_scale`` it finds more modes on
            mixtures of 8 dimensions and more (docs/arena/reviewers.md), without eigenvalues.
        kernel: kernel of samples scaled to norm 1; by default Gaussian at the median distance of the pairs, for the log
            determinant :class:`~kspec_guidance.kernels.ExpCosineKernel`.
        prompt_kernel, space, start, stop, every, memory, transforms, kwargs: see :class:`SPARKE`.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for settings outside their ranges.
    """

    def __init__(
        self,
        scale: float = 1.0,
        kernel: Kernel | None = None,
        prompt_kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.65,
        every: int = 1,
        memory: Memory | None = None,
        *,
        order: float | str = 0.5,
        transforms: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        prompt_kernel = prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH)
        objective: Objective
        if isinstance(order, str):
            if order != "logdet":
                raise ValueError(f"order must be a number in (0, inf] or 'logdet', got {order!r}")
            objective = LogDet(kernel or ExpCosineKernel(), prompt_kernel=prompt_kernel)
        else:
            number = plain_number(order)
            if number is None:
                raise ValueError(f"order must be a number in (0, inf] or 'logdet', got {order!r}")
            objective = Vendi(kernel or GaussianKernel(), number, prompt_kernel)
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)


class MMDGuidance(KernelGuidance):
    """Moves the distribution of generated images, memory included, toward that of a reference set.

    Descends the squared maximum mean discrepancy (Sani, Jamali, Jalali, Farnia 2026), which compares whole distributions:
    for a batch of one prompt against references of many subjects the gradient first increases the diversity within the
    batch. To move a style or a domain, give a ``baseline``: samples that the model makes anyway, over many prompts. The
    move is then toward what the references have and the baseline has not, for each image alone and whatever its prompt
    (:class:`~kspec_guidance.objectives.Witness`). :func:`make_baseline` makes one, once for a pipeline. Without it, to
    match a distribution as a whole, generate several prompts in one batch, or share one memory over many calls.

    Args:
        reference: samples ``[m, ...]`` in the pipeline's latent space, see :func:`encode_reference`.
        scale: size of the move per step, relative to the norm of the prediction; by default 1 with a baseline, else 0.7.
            With a baseline, 3 with ``stop=0.2`` can do more for a style (docs/toward-style.md).
        kernel: by default Gaussian at the median distance of the references, with a baseline at twice that;
            :meth:`published` has ``PolynomialKernel()``.
        reference_prompts: prompt features ``[m, p]`` of the references; each prompt then moves toward references of
            similar prompts.
        baseline: samples ``[b, ...]`` of the model without guidance, see :func:`make_baseline`.
        baseline_prompts: prompt features ``[b, p]`` of the baseline; needed with ``reference_prompts``.
        count_memory: with a baseline, whether images of earlier calls count as rows of it. They then repel, and with them
            the style that they have taken on (docs/toward-style.md).
        prompt_kernel: kernel of unit-norm prompt features; by default Gaussian with bandwidth 0.35.
        feature_map, prompt_feature_map: random Fourier features of the two kernels (Gaussian or Laplacian), for a memory of
            constant size.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        kwargs: ``sigma_interval``, ``seed``, ``ease_cfg`` and ``cfg_share``, see
            :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for settings outside their ranges.
    """

    def __init__(
        self,
        reference: Tensor,
        scale: float | None = None,
        kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.6,
        every: int = 1,
        memory: Memory | None = None,
        *,
        reference_prompts: Tensor | None = None,
        prompt_kernel: Kernel | None = None,
        baseline: Tensor | None = None,
        baseline_prompts: Tensor | None = None,
        count_memory: bool = False,
        feature_map: RandomFourierFeatures | None = None,
        prompt_feature_map: RandomFourierFeatures | None = None,
        transforms: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        _check_baseline(baseline, baseline_prompts, prompt_feature_map)
        about: dict[str, Any] = {
            "kernel": kernel or GaussianKernel(),
            "reference_prompts": reference_prompts,
            "prompt_kernel": prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            "feature_map": feature_map,
        }
        objective: Objective
        if baseline is None:
            if count_memory:
                raise ValueError("count_memory is for a baseline; without one the memory counts anyway")
            objective = MMD(reference, prompt_feature_map=prompt_feature_map, **about)
        else:
            about |= {"baseline_prompts": baseline_prompts, "count_memory": count_memory}
            objective = Witness(reference, baseline, **about)
        scale = (0.7 if baseline is None else 1.0) if scale is None else scale
        if transforms is None:  # a baseline does not know the batch, so its moves must end by themselves
            transforms = ("off_score", "rescale") if baseline is None else ("off_score", "rescale", "fade")
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)

    @classmethod
    def published(cls, reference: Tensor, scale: float = 2e-3, **kwargs: Any) -> "MMDGuidance":
        """MMD guidance as its authors run it: matinamehdizadeh/MMD-Guidance at commit 6246126, to rounding.

        That is for images generated one by one with one guide. After each of the 1,000 steps of a DDPM sampler, the latents
        move by ``scale`` times their norm against the gradient of the squared MMD with the cubic kernel, for the image and
        the memory of earlier ones. The memory holds what each last step gave, before its move; when it has 100 rows, it
        keeps only the newest. The first image is not guided. Images of a larger batch count as memory rows, where the
        authors' step is for one.

        The paper (arXiv 2601.08379) writes another step: the gradient for a whole batch, times a factor, with no rescaling
        and no memory. The prompt-aware part of the authors' code is not published.

        Args:
            reference: see :class:`MMDGuidance`.
            scale: size of the move, relative to the norm of the latents; the authors' README has 2e-3, the default of their
                sampling loop is 2.5e-4.
            kwargs: settings that replace the published ones: those of :class:`~kspec_guidance.guidance.Term`, ``kernel``,
                ``reference_prompts``, ``prompt_kernel`` and ``seed``.

        Raises:
            TypeError: for an unknown argument; the message suggests a known one.
            ValueError: for settings outside their ranges.
        """
        settings: dict[str, Any] = {"space": Latents(as_compared=True), "transforms": ("rescale_damped",)} | kwargs
        of_objective = ("kernel", "reference_prompts", "prompt_kernel")
        objective = PublishedMMD(reference, **{name: settings.pop(name) for name in of_objective if name in settings})
        guide = cls.__new__(cls)
        KernelGuidance.__init__(guide, objective, scale, **settings)
        return guide


class NoveltyGuidance(KernelGuidance):
    """Moves images away from a fixed reference set, which they must not repeat.

    References repel by all that they show, subjects too. With a ``baseline``, samples that the model makes anyway, images
    move away only from what the references have and the baseline has not, such as a style, whatever their prompt
    (:class:`~kspec_guidance.objectives.Witness`, with the two sets exchanged).

    Args:
        reference: samples ``[m, ...]`` in the pipeline's latent space, see :func:`encode_reference`.
        reference_prompts: prompt features ``[m, p]`` of the references; only those of similar prompts then repel.
        baseline: samples ``[b, ...]`` of the model without guidance, see :func:`make_baseline`.
        baseline_prompts: prompt features ``[b, p]`` of the baseline; needed with ``reference_prompts``.
        scale, kernel, prompt_kernel, feature_map, prompt_feature_map: see :class:`SPARKE`.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        kwargs: ``sigma_interval``, ``seed``, ``ease_cfg`` and ``cfg_share``, see
            :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for settings outside their ranges.
    """

    def __init__(
        self,
        reference: Tensor,
        scale: float = 1.0,
        kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.65,
        every: int = 1,
        memory: Memory | None = None,
        *,
        reference_prompts: Tensor | None = None,
        prompt_kernel: Kernel | None = None,
        baseline: Tensor | None = None,
        baseline_prompts: Tensor | None = None,
        feature_map: RandomFourierFeatures | None = None,
        prompt_feature_map: RandomFourierFeatures | None = None,
        transforms: Sequence[str] | None = None,
        **kwargs: Any,
    ):
        _check_baseline(baseline, baseline_prompts, prompt_feature_map)
        about: dict[str, Any] = {
            "kernel": kernel or GaussianKernel(),
            "prompt_kernel": prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            "feature_map": feature_map,
        }
        objective: Objective
        if baseline is None:
            objective = Novelty(
                prompt_feature_map=prompt_feature_map, reference=reference, reference_prompts=reference_prompts, **about
            )
        else:  # from the references to the baseline
            objective = Witness(
                baseline, reference, reference_prompts=baseline_prompts, baseline_prompts=reference_prompts, **about
            )
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)
