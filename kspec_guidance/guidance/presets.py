"""Guides with default objectives: SPARKE, VendiGuidance, MMDGuidance and NoveltyGuidance, and their published settings."""

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
    """Increases diversity: images repel each other, and earlier images, *of similar prompts*.

    Ascends conditional RKE (Jalali, Lei, Gohari, Farnia 2025, arXiv 2506.10173), the conditional Renyi entropy of order 2:
    a sum over all relevant memory rows, for any kind of memory. For other orders see :class:`VendiGuidance`.

    Args:
        scale: largest move of a step relative to the norm of the prediction, at the start of the guided interval, after
            which it fades. See docs/arena.md for its effect; ``kspec-guidance tune`` finds a value for a pipeline.
        kernel: kernel of samples scaled to norm 1; by default Gaussian at half the median distance of the pairs.
        prompt_kernel: kernel of unit-norm prompt features; by default Gaussian with bandwidth 0.35.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        feature_map, prompt_feature_map: random Fourier features of the two kernels, for a memory of constant size.
        kwargs: ``sigma_interval`` and ``seed``, see :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
        ValueError: for settings outside their ranges.
    """

    PRESETS: ClassVar[dict[str, dict[str, Any]]] = {  # compared in docs/which-method.md
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
        """The paper's settings: noisy latents, fixed bandwidths, the gradient rescaled to the norm at every 10th step.

        Args:
            scale: size of the move, relative to the norm of the latents.
            kwargs: settings that replace the paper's.
        """
        settings: dict[str, Any] = {"space": "latents", "stop": 1.0, "every": 10, "transforms": ("rescale",)}
        return cls(scale, GaussianKernel(0.7), GaussianKernel(0.35), **(settings | kwargs))

    @staticmethod
    def preset(name: str, **kwargs: Any) -> KernelGuidance:
        """Create a guide from a preset: ``default``, ``safe``, ``vivid``, ``few-step`` or ``published``.

        docs/which-method.md compares them with each other and with other methods. ``vivid`` and ``few-step`` have order
        0.5, so they are :class:`VendiGuidance`.

        Args:
            name: name of the preset.
            kwargs: settings that replace the preset's.

        Raises:
            ValueError: for an unknown name; the message lists the known ones.
        """
        if name not in SPARKE.PRESETS:
            raise ValueError(f"unknown preset {name!r}; choose one of {', '.join(SPARKE.PRESETS)}")
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
        order: q in (0, inf].
        kernel: kernel of samples scaled to norm 1; by default Gaussian at the median distance of the pairs.
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
        order: float = 0.5,
        transforms: Sequence[str] = DEFAULT_TRANSFORMS,
        **kwargs: Any,
    ):
        objective = Vendi(kernel or GaussianKernel(), order, prompt_kernel or GaussianKernel(PROMPT_BANDWIDTH))
        super().__init__(objective, scale, space, start, stop, every, transforms=transforms, memory=memory, **kwargs)


class MMDGuidance(KernelGuidance):
    """Moves the distribution of generated images, memory included, toward that of a reference set.

    Descends the squared maximum mean discrepancy (Sani, Jamali, Jalali, Farnia 2026), which compares whole distributions:
    for a batch of one prompt against references of many subjects the gradient first increases the diversity within the
    batch. To move a style or a domain, generate several prompts in one batch, or share one memory over many calls.

    Args:
        reference: samples ``[m, ...]`` in the pipeline's latent space, see :func:`encode_reference`.
        scale: size of the move per step, relative to the norm of the prediction.
        kernel: by default Gaussian at the median distance of the references; the paper uses ``PolynomialKernel()``.
        reference_prompts: prompt features ``[m, p]`` of the references; each prompt then moves toward references of
            similar prompts.
        prompt_kernel: kernel of unit-norm prompt features; by default Gaussian with bandwidth 0.35.
        feature_map, prompt_feature_map: random Fourier features of the two kernels (Gaussian or Laplacian), for a memory of
            constant size.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        kwargs: ``sigma_interval`` and ``seed``, see :class:`~kspec_guidance.guidance.KernelGuidance`.

    Raises:
        TypeError: for an unknown argument; the message suggests a known one.
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
        """The paper's settings: cubic kernel, noisy latents, the gradient rescaled to the norm at every step.

        Args:
            reference: see :class:`MMDGuidance`.
            scale: size of the move, relative to the norm of the latents.
            kwargs: settings that replace the paper's.
        """
        settings: dict[str, Any] = {
            "space": "latents",
            "stop": 1.0,
            "transforms": ("rescale",),
            "kernel": PolynomialKernel(),
        }
        return cls(reference, scale, **(settings | kwargs))


class NoveltyGuidance(KernelGuidance):
    """Moves images away from a fixed reference set, which they must not repeat.

    Args:
        reference: samples ``[m, ...]`` in the pipeline's latent space, see :func:`encode_reference`.
        reference_prompts: prompt features ``[m, p]`` of the references; only those of similar prompts then repel.
        scale, kernel, prompt_kernel, feature_map, prompt_feature_map: see :class:`SPARKE`.
        space, start, stop, every, transforms, memory: see :class:`~kspec_guidance.guidance.Term`.
        kwargs: ``sigma_interval`` and ``seed``, see :class:`~kspec_guidance.guidance.KernelGuidance`.

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
