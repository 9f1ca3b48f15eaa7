"""The guides by name: SPARKE, VendiGuidance, MMDGuidance and NoveltyGuidance, and the settings their papers used."""

from collections.abc import Sequence
from typing import Any, ClassVar

from torch import Tensor

from kspec_guidance.features import RandomFourierFeatures
from kspec_guidance.guidance.guide import KernelGuidance
from kspec_guidance.guidance.spaces import FeatureSpace
from kspec_guidance.guidance.term import DEFAULT_TRANSFORMS
from kspec_guidance.kernels import PROMPT_BANDWIDTH, GaussianKernel, Kernel, PolynomialKernel
from kspec_guidance.memory import Memory
from kspec_guidance.objectives import MMD, ConditionalRKE, Novelty, Vendi

__all__ = ["SPARKE", "MMDGuidance", "NoveltyGuidance", "VendiGuidance"]


class SPARKE(KernelGuidance):
    """More variety: every image away from the others, and from earlier ones, *of similar prompts*.

    Ascends conditional RKE (Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173), the conditional Renyi entropy of order 2:
    a sum over every memory row that matters, whatever the kind of memory. For other orders see :class:`VendiGuidance`.

    Args:
        scale: largest move of a step relative to the norm of the prediction, at the start of the guided interval, from
            where it fades. See docs/arena.md for what it buys, and ``kspec-guidance tune`` to find it for a pipeline.
        kernel: of samples scaled to norm 1; by default Gaussian at half the median distance of the pairs at hand.
        prompt_kernel: of prompt features of norm 1; by default Gaussian with bandwidth 0.35.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        feature_map, prompt_feature_map: random Fourier features of the two kernels, for a memory of constant size.
        kwargs: ``sigma_interval`` and ``seed``, see :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument, naming the one that was probably meant.
        ValueError: for settings outside their ranges.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {  # docs/which-method.md says what each is for
        "default": {},
        "safe": {"scale": 0.5},
        "vivid": {"order": 0.5, "scale": 1.5},
        "few-step": {"order": 0.5, "scale": 0.6, "stop": 0.6},
        "published": {},
    }

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
        transforms: Sequence[str] = DEFAULT_TRANSFORMS,
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
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)

    @classmethod
    def published(cls, scale: float = 0.1, **kwargs: Any) -> "SPARKE":
        """The paper's chain: noisy latents, fixed bandwidths, the gradient rescaled to the norm at every 10th step.

        Args:
            scale: of the move, relative to the norm of the latents.
            kwargs: settings that take the place of the paper's.
        """
        settings: dict[str, Any] = {"space": "latents", "stop": 1.0, "every": 10, "transforms": ("rescale",)}
        return cls(scale, GaussianKernel(0.7), GaussianKernel(0.35), **(settings | kwargs))

    @staticmethod
    def preset(name: str, **kwargs: Any) -> KernelGuidance:
        """A guide by the name of its purpose: ``default``, ``safe``, ``vivid``, ``few-step`` or ``published``.

        What each buys and costs was measured side by side with other methods: docs/which-method.md. ``vivid`` and
        ``few-step`` are of order 0.5, so they are :class:`VendiGuidance`.

        Args:
            kwargs: settings that take the place of the preset's.

        Raises:
            ValueError: for another name; the message lists those there are.
        """
        if name not in SPARKE.PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(SPARKE.PRESETS)}")
        settings = SPARKE.PRESETS[name] | kwargs
        if name == "published":
            return SPARKE.published(**settings)
        return VendiGuidance(**settings) if "order" in settings else SPARKE(**settings)


class VendiGuidance(KernelGuidance):
    """More variety, by the Vendi score of any order, given prompts: :class:`SPARKE` is its order 2, without eigenvalues.

    Ascends the conditional Renyi entropy of order q of the batch and the 128 memory rows nearest to it. Order 0.5 finds
    more modes than order 2 (docs/arena.md), at the cost of an eigendecomposition a step.

    Args:
        scale: see :class:`SPARKE`.
        order: q in (0, inf].
        kernel: of samples scaled to norm 1; by default Gaussian at the median distance of the pairs at hand.
        prompt_kernel, space, start, stop, every, memory, transforms, kwargs: see :class:`SPARKE`.

    Raises:
        TypeError: for an unknown argument, naming the one that was probably meant.
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
        order: float = 0.5,
        transforms: Sequence[str] = DEFAULT_TRANSFORMS,
        **kwargs: Any,
    ):
        objective = Vendi(kernel or GaussianKernel(), order, prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH))
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)


class MMDGuidance(KernelGuidance):
    """Toward a reference set: the distribution of what is generated, memory included, approaches the references'.

    Descends the squared maximum mean discrepancy (Sani, Jamali, Jalali, Farnia 2026). That compares whole distributions:
    for a batch of one prompt against references of many subjects the gradient first increases the diversity within the
    batch. To move a style or a domain, generate several prompts in one batch, or share one memory over many calls.

    Args:
        reference: ``[m, ...]`` samples in the pipeline's own latent space (:func:`encode_reference` makes them).
        scale: move per step, relative to the norm of the prediction.
        kernel: by default Gaussian at the median distance of the references; the paper's is ``PolynomialKernel()``.
        reference_prompts: prompt features ``[m, p]`` of the references; each prompt is then drawn to those of similar
            prompts.
        prompt_kernel: for these; by default Gaussian with bandwidth 0.35.
        feature_map, prompt_feature_map: random Fourier features of the two kernels (Gaussian or Laplacian), for a memory of
            constant size.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        kwargs: ``sigma_interval`` and ``seed``, see :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument, naming the one that was probably meant.
        ValueError: for settings outside their ranges.
    """

    def __init__(
        self,
        reference: Tensor,
        scale: float = 0.7,
        kernel: Kernel | None = None,
        space: str | FeatureSpace = "x0",
        start: float = 0.0,
        stop: float = 0.6,
        every: int = 1,
        memory: Memory | None = None,
        *,
        reference_prompts: Tensor | None = None,
        prompt_kernel: Kernel | None = None,
        feature_map: RandomFourierFeatures | None = None,
        prompt_feature_map: RandomFourierFeatures | None = None,
        transforms: Sequence[str] = ("off_score", "rescale"),
        **kwargs: Any,
    ):
        objective = MMD(
            reference,
            kernel=kernel or GaussianKernel(),
            reference_prompts=reference_prompts,
            prompt_kernel=prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            feature_map=feature_map,
            prompt_feature_map=prompt_feature_map,
        )
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)

    @classmethod
    def published(cls, reference: Tensor, scale: float = 1e-3, **kwargs: Any) -> "MMDGuidance":
        """The paper's chain: cubic kernel, noisy latents, the gradient rescaled to the norm at every step.

        Args:
            reference: see :class:`MMDGuidance`.
            scale: of the move, relative to the norm of the latents.
            kwargs: settings that take the place of the paper's.
        """
        settings: dict[str, Any] = {
            "space": "latents",
            "stop": 1.0,
            "transforms": ("rescale",),
            "kernel": PolynomialKernel(),
        }
        return cls(reference, scale, **(settings | kwargs))


class NoveltyGuidance(KernelGuidance):
    """Away from a fixed reference set: what must not be repeated.

    Args:
        reference: ``[m, ...]`` samples in the pipeline's own latent space.
        reference_prompts: prompt features ``[m, p]`` of the references; only those of similar prompts then repel.
        scale, kernel, prompt_kernel, feature_map, prompt_feature_map: see :class:`SPARKE`.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        kwargs: ``sigma_interval`` and ``seed``, see :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument, naming the one that was probably meant.
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
        feature_map: RandomFourierFeatures | None = None,
        prompt_feature_map: RandomFourierFeatures | None = None,
        transforms: Sequence[str] = DEFAULT_TRANSFORMS,
        **kwargs: Any,
    ):
        objective = Novelty(
            kernel=kernel or GaussianKernel(),
            feature_map=feature_map,
            prompt_kernel=prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH),
            prompt_feature_map=prompt_feature_map,
            reference=reference,
            reference_prompts=reference_prompts,
        )
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)
